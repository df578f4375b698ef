"""The launcher on real processes: exit codes, one message per failure, signals, restarts, several nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mindspeed_wan.cli import launch, nodes, output
from mindspeed_wan.errors import ConfigError, ResourceError

PREAMBLE = """
import json, os, signal, sys, time
from mindspeed_wan.errors import *
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def main():
{body}
run_main(main)
"""


@pytest.fixture
def script(tmp_path):
    """Return a function that writes a rank's main from its body and returns the path."""

    def write(body: str, name: str = "job with spaces.py"):
        path = tmp_path / name
        path.write_text(PREAMBLE.format(body=textwrap.indent(textwrap.dedent(body), "    ")))
        return path

    return write


def environment(**extra):
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "PYTHONPATH": os.getcwd(), **extra}


def start(*arguments, **extra):
    return subprocess.Popen(
        [sys.executable, "-m", "mindspeed_wan.cli.launch", *map(str, arguments)],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=60):
    """Wait for the launcher; ranks that nobody ends sleep for far longer than this."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(*arguments, **extra):
    return finish(start(*arguments, **extra))


def wait_for(path, timeout=20):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_ranks_get_torchruns_variables_and_their_arguments(script):
    path = script(
        """
        print(json.dumps([rank, world, sys.argv[1:], os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"].isdigit()]))
        """
    )
    code, out, err = run("--nproc-per-node", 3, path, "--save", "a b", "--flag", RANK="7", WORLD_SIZE="9")
    assert code == 0, err
    lines = sorted(map(__import__("json").loads, out.splitlines()))
    assert lines == [[rank, 3, ["--save", "a b", "--flag"], str(rank), True] for rank in range(3)]


def test_one_rank_runs_the_same_way(script):
    code, out, _ = run(script("print('world', world)"))
    assert (code, out) == (0, "world 1\n")


@pytest.mark.parametrize(("error", "exit_code"), [("ConfigError", 2), ("CheckpointError", 4), ("DataError", 7)])
def test_an_error_on_all_ranks_is_printed_once_and_gives_its_code(script, error, exit_code):
    code, _, err = run("--nproc-per-node", 3, script(f"raise {error}('the width is odd', fix='make it even')"))
    assert code == exit_code
    assert err == "error: the width is odd\n  fix: make it even\n"


def test_an_error_on_one_rank_names_it_and_ends_the_others(script):
    path = script(
        """
        if rank == 1:
            raise DataError("clip 5 is empty")
        time.sleep(600)
        """
    )
    code, _, err = run("--nproc-per-node", 2, path)
    assert code == 7 and "error: [rank 1] clip 5 is empty" in err


def test_the_cause_wins_over_its_consequence(script):
    """Rank 0 only lost its peer, and says so first; rank 1 has the reason."""
    path = script(
        """
        if rank == 0:
            raise ParallelError("lost connection to rank 1")
        time.sleep(0.3)
        raise CheckpointError("shard 1 is damaged")
        """
    )
    code, _, err = run("--nproc-per-node", 2, path)
    assert code == 4 and "shard 1 is damaged" in err and "lost connection" not in err


def test_a_crash_keeps_the_ranks_own_traceback_and_no_other(script):
    code, _, err = run("--nproc-per-node", 2, script("assert rank == 0, 'a bug'; time.sleep(600)"))
    assert code == 1
    assert err.count("Traceback") == 1 and "AssertionError: a bug" in err
    assert "rank 1 ended with exit code 1" in err


def test_a_killed_rank_is_a_lost_rank(script):
    code, _, err = run("--nproc-per-node", 2, script("os.kill(os.getpid(), 9) if rank else time.sleep(600)"))
    assert code == 6
    assert "rank 1 was killed by SIGKILL" in err and "Traceback" not in err


SAVES_AND_STOPS = """
stop = []
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), lambda signum, frame: stop.append(signum))
open(f"{sys.argv[1]}/ready{rank}", "w").close()
while not stop:
    time.sleep(0.02)
time.sleep(0.3)
open(f"{sys.argv[1]}/saved{rank}", "w").write(signal.Signals(stop[0]).name)
raise StopRequested("saved at iteration 12; run again to go on")
"""


@pytest.mark.parametrize(
    ("name", "reaches_as"),
    [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_a_signal_reaches_every_rank_once_and_waits_for_the_save(script, tmp_path, name, reaches_as):
    process = start("--nproc-per-node", 2, "--max-restarts", 3, script(SAVES_AND_STOPS), tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(getattr(signal, name))
    code, _, err = finish(process)
    assert code == 75
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [reaches_as, reaches_as]
    assert err.count("saved at iteration 12") == 1


def test_a_second_signal_ends_everything_at_once(script, tmp_path):
    path = script(SAVES_AND_STOPS.replace("time.sleep(0.3)", "time.sleep(600)"))
    process = start("--nproc-per-node", 2, path, tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert "second signal" in err and not (tmp_path / "saved0").exists()


def test_sigterm_after_sigusr1_does_not_cut_the_save_short(script, tmp_path):
    process = start("--nproc-per-node", 2, script(SAVES_AND_STOPS), tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code == 75 and (tmp_path / "saved1").read_text() == "SIGUSR1"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_do_not_handle_the_signal_give_its_code(script, tmp_path, signum):
    path = script("open(f'{sys.argv[1]}/ready{rank}', 'w').close(); time.sleep(600)")
    process = start("--nproc-per-node", 2, path, tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(signum)
    assert finish(process)[0] == 128 + signum


def test_ranks_that_ignore_the_signal_end_after_the_grace(script, tmp_path):
    path = script(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{sys.argv[1]}/ready{rank}", "w").close()
        time.sleep(600)
        """
    )
    process = start("--nproc-per-node", 2, "--grace-seconds", 0.5, path, tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 6 and "rank 0, 1 did not stop within 0 s" in err


def test_a_lost_rank_is_restarted_with_a_new_port(script, tmp_path):
    path = script(
        """
        open(f"{sys.argv[1]}/port{attempt}", "w").write(os.environ["MASTER_PORT"])
        if attempt < 2:
            os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)
        print("finished in attempt", attempt)
        """
    )
    code, out, err = run("--nproc-per-node", 2, "--max-restarts", 3, path, tmp_path)
    assert code == 0 and out.count("finished in attempt 2") == 2
    assert "restart 2 of 3" in err
    assert len({(tmp_path / f"port{attempt}").read_text() for attempt in range(3)}) == 3


def test_a_wrong_configuration_is_not_restarted(script):
    code, _, err = run("--max-restarts", 3, script("print('try'); raise ConfigError('no')"))
    assert code == 2 and "restart" not in err


def test_restarts_run_out_with_the_code_of_the_last_failure(script):
    code, out, err = run("--max-restarts", 1, script("print('try', flush=True); os.kill(os.getpid(), 9)"))
    assert code == 6 and out.count("try") == 2 and "rank 0 was killed by SIGKILL" in err


def test_a_hang_is_ended_with_the_silent_rank_and_every_stack(script, tmp_path):
    path = script(
        """
        from mindspeed_wan.platforms import rank as to_launcher
        to_launcher.answer_stack_requests()
        to_launcher.beat(41)
        time.sleep(0.6 * (1 - rank))
        to_launcher.beat(41 + (rank == 0))
        def waits_for_the_other(): time.sleep(600)
        waits_for_the_other()
        """
    )
    code, _, err = run("--nproc-per-node", 2, "--hang-timeout-minutes", 1 / 60, path)
    assert code == 6
    assert "no rank has made a step" in err and "silent longest: rank 1" in err and "since iteration 41" in err
    assert "stacks of rank 0" in err and "stacks of rank 1" in err and err.count("waits_for_the_other") == 2


def test_a_suspended_rank_is_named_and_killed(script, tmp_path):
    path = script(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)
        raise ParallelError("timed out after 10 s waiting for the other ranks")
        """
    )
    code, _, err = run("--nproc-per-node", 2, path)
    assert code == 6 and "suspended (SIGSTOP): rank 1" in err


def test_ranks_die_with_their_launcher(script, tmp_path):
    path = script("open(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close(); time.sleep(600)")
    process = start("--nproc-per-node", 2, path, tmp_path)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


def test_everything_printed_is_in_the_log_file_too(script, tmp_path):
    log = tmp_path / "logs" / "run 1.log"
    path = script(
        "print('out', rank); print('err', rank, file=sys.stderr); raise DataError('bad') if rank else SystemExit(0)"
    )
    code, out, err = run("--nproc-per-node", 2, "--log-file", log, path)
    text = log.read_text()
    assert code == 7
    for line in ("out 0", "out 1", "err 0", "err 1", "error: [rank 1] bad"):
        assert line in text and line in out + err


def test_lines_of_many_ranks_stay_whole(script):
    path = script("[print(str(rank) * 3000, flush=i % 7 == 0) for i in range(200)]")
    code, out, _ = run("--nproc-per-node", 4, path)
    assert code == 0
    assert all(len(line) == 3000 and len(set(line)) == 1 for line in out.splitlines())
    assert len(out.splitlines()) == 800


def nodes_of(script_path, count, *options, ranks=1, arguments=(), addr="127.0.0.1"):
    port = nodes.free_port()
    common = ["--nnodes", count, "--nproc-per-node", ranks, "--master-addr", addr, "--master-port", port, *options]
    return [start(*common, "--node-rank", node, script_path, *arguments) for node in range(count)]


def test_two_nodes_share_one_world(script):
    path = script("print(rank, world, os.environ['LOCAL_RANK'], os.environ['GROUP_RANK'], os.environ['MASTER_PORT'])")
    results = [finish(process) for process in nodes_of(path, 2, ranks=2)]
    assert [code for code, _, _ in results] == [0, 0]
    lines = sorted(line.split() for _, out, _ in results for line in out.splitlines())
    assert [line[:4] for line in lines] == [
        ["0", "4", "0", "0"],
        ["1", "4", "1", "0"],
        ["2", "4", "0", "1"],
        ["3", "4", "1", "1"],
    ]
    assert len({line[4] for line in lines}) == 1


def test_a_failure_on_one_node_ends_all_with_its_code(script):
    path = script("time.sleep(600) if rank < 2 else None; raise CheckpointError('damaged') if rank == 2 else None")
    results = [finish(process) for process in nodes_of(path, 3)]
    assert [code for code, _, _ in results] == [4, 4, 4]
    assert all("[rank 2] damaged" in err for _, _, err in results)


def test_all_nodes_restart_together(script):
    path = script(
        "(os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)) if attempt == 0 else print('again', rank)"
    )
    results = [finish(process) for process in nodes_of(path, 2, "--max-restarts", 1)]
    assert [code for code, _, _ in results] == [0, 0]
    assert [out for _, out, _ in results] == ["again 0\n", "again 1\n"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_ends_the_job(script, tmp_path, lost):
    path = script("open(f'{sys.argv[1]}/ready{rank}', 'w').close(); time.sleep(600)")
    processes = nodes_of(path, 2, arguments=(tmp_path,))
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    processes[lost].kill()
    code, _, err = finish(processes[1 - lost])
    finish(processes[lost])
    assert code == 6 and f"node {lost} was lost" in err


def test_nodes_that_disagree_are_refused(script):
    path, port = script("pass"), nodes.free_port()
    common = ["--nnodes", 2, "--master-port", port]
    leader = start(*common, "--nproc-per-node", 1, path)
    follower = start(*common, "--nproc-per-node", 2, "--node-rank", 1, path)
    assert finish(follower)[0] == 2
    code, _, err = finish(leader)
    assert code != 0 and "2 nodes x 1 ranks" in err


def test_a_node_that_never_joins_is_named(script):
    code, _, err = run(
        "--nnodes", 3, "--master-port", nodes.free_port(), "--join-timeout-minutes", 0.01, script("pass")
    )
    assert code == 6 and "node 1, 2 did not join" in err and "NODE_RANK" in err


def test_a_master_address_that_does_not_resolve(script):
    options = ["--nnodes", 2, "--node-rank", 1, "--master-addr", "no-such-host.invalid", "--join-timeout-minutes", 0.01]
    code, _, err = run(*options, script("pass"))
    assert code == 2 and "MASTER_ADDR" in err and "no-such-host.invalid" in err


def test_a_port_in_use_is_named(script):
    with nodes.socket.create_server(("", 0)) as taken:
        code, _, err = run("--nnodes", 2, "--master-port", taken.getsockname()[1], script("pass"))
    assert code == 2 and "MASTER_PORT" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node: 0 is below 1"),
        (["--nnodes", "2", "--node-rank", "2"], "number the nodes 0 to 1"),
        (["--max-restarts", "-1"], "--max-restarts"),
        (["--grace-seconds", "nan"], "--grace-seconds: nan is no length of time"),
        (["--hang-timeout-minutes", "-1"], "--hang-timeout-minutes"),
        (["--join-timeout-minutes", "inf"], "--join-timeout-minutes"),
        (["--master-port", "70000"], "--master-port: 70000 is no port"),
    ],
)
def test_options_that_cannot_be_meant(script, options, message):
    with pytest.raises(ConfigError, match=message):
        launch.launch([*options, str(script("pass"))])


def test_more_ranks_than_the_node_has_memory_for_are_not_started(script):
    with pytest.raises(ResourceError, match="10000000 ranks do not fit the memory of this node"):
        launch.launch(["--nproc-per-node", "10000000", str(script("pass"))])


def test_a_missing_script_and_an_unwritable_log(tmp_path):
    with pytest.raises(ConfigError, match="the script does not exist"):
        launch.launch([str(tmp_path / "nothing.py")])
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="log file cannot be written"):
        output.Output(tmp_path / "file" / "run.log")


def test_the_launcher_imports_no_torch():
    code = "import sys; import mindspeed_wan.cli.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
