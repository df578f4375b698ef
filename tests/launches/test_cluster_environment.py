"""Which node am I: every scheduler's variables become the launcher's options."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "wan2.2" / "A14B" / "t2v" / "pretrain_high.sh"
ENTRY = ROOT / "examples" / "wan2.2" / "cluster" / "entry.sh"

CLUSTERS = {
    "bare": ({"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29511"},
             ("3", "1", "10.0.0.9", "29511")),
    "nothing": ({}, ("1", "0", "127.0.0.1", None)),
    "Slurm": ({"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "2", "SLURM_JOB_ID": "123456",
               "SLURM_STEP_NODELIST": "node[07-10]"}, ("4", "2", "node07", "23456")),
    "Slurm, node 0 known": ({"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
                            ("4", "3", "a", "1")),
    "Slurm on one node": ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}, ("1", "0", "127.0.0.1", None)),
    "Kubeflow PyTorchJob": ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "RANK": "1",
                             "WORLD_SIZE": "16", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
                            ("2", "1", "job-master-0", "23456")),
    "Kubeflow TrainJob": ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0",
                           "PET_MASTER_PORT": "29400"}, ("2", "1", "job-node-0-0", "29400")),
    "old PyTorchJob": ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "WORLD_SIZE": "2", "RANK": "1",
                        "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}, ("2", "1", "job-master-0", "23456")),
    "Volcano": ({"VC_TASK_INDEX": "1", "VC_WORKER_NUM": "2", "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job"},
                ("2", "1", "job-worker-0.job", None)),
    "ModelArts": ({"MA_NUM_HOSTS": "2", "MA_NUM_GPUS": "8", "VC_TASK_INDEX": "0",
                   "VC_WORKER_HOSTS": "modelarts-worker-0.x,modelarts-worker-1.x"},
                  ("2", "0", "modelarts-worker-0.x", None)),
    "AscendJob": ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8", "RANK": "3",
                   "LOCAL_RANK": "0,1,2,3,4,5,6,7", "MASTER_ADDR": "10.1.0.4", "MASTER_PORT": "2222"},
                  ("4", "3", "10.1.0.4", "2222")),
    "rendered for Volcano": ({"NNODES": "2", "VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "h0,h1"}, ("2", "1", "h0", None)),
}
"""Variables -> (--nnodes, --node-rank, --master-addr, --master-port)."""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A python that prints its arguments, and scontrol."""
    for name, text in (("fakepython", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'node07\\nnode08\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(commands: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "PYTHON": "fakepython", "DEVICE": "cpu", "LOAD_PATH": "",
                   "SAVE_PATH": "", **variables}
    return subprocess.run(["bash", str(SCRIPT), "--from-scratch"], env=environment, capture_output=True, text=True,
                          timeout=60, check=False)


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


@pytest.mark.parametrize("name", CLUSTERS)
def test_scheduler_says_which_node_this_is(name: str, commands: Path) -> None:
    variables, expected = CLUSTERS[name]
    done = run(commands, variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    names = ("--nnodes", "--node-rank", "--master-addr", "--master-port")
    assert tuple(option(words, flag) for flag in names) == expected


def test_several_tasks_per_node_are_refused(commands: Path) -> None:
    done = run(commands, {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NODEID": "0"})
    assert done.returncode == 2
    assert "--ntasks-per-node=1" in done.stderr


def test_missing_host_list_is_explained(commands: Path) -> None:
    (commands / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    done = run(commands, {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-2]"})
    assert done.returncode == 2
    assert "MASTER_ADDR" in done.stderr


def test_logs_go_where_the_cluster_wants_them(commands: Path) -> None:
    words = run(commands, {"LOG_FOLDER": "/data/logs"}).stdout.splitlines()
    assert str(option(words, "--log-file")).startswith("/data/logs/pretrain_")


@pytest.mark.parametrize(("code", "retry", "expected"), [
    (75, "138", 138), (6, "138", 138), (75, "", 75), (2, "138", 2), (0, "138", 0), (143, "138", 143)])
def test_entry_turns_codes_that_mean_again(code: int, retry: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(f"exit {code}\n")
    done = subprocess.run(["bash", str(ENTRY), str(tmp_path / "job.sh")], env={"PATH": "/usr/bin:/bin",
                          "RETRY_EXIT_CODE": retry}, check=False, capture_output=True, timeout=30)
    assert done.returncode == expected


@pytest.mark.parametrize(("number", "name"), [(15, "TERM"), (10, "USR1")])
def test_entry_passes_signals_on_and_waits(number: int, name: str, tmp_path: Path) -> None:
    script = f"trap 'sleep 0.3; echo saved; exit 75' {name}\ntouch {tmp_path}/ready\nwhile :; do sleep 0.05; done\n"
    (tmp_path / "job.sh").write_text(script)
    job = subprocess.Popen(["bash", str(ENTRY), str(tmp_path / "job.sh")], stdout=subprocess.PIPE)
    for _ in range(200):
        if (tmp_path / "ready").exists():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    job.send_signal(number)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, output) == (75, b"saved\n")
