"""A run that was killed or stopped goes on as if it had not been: weights, moments, average and losses, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.spawn import run_ranks
from tests.helpers.world import (
    REPOSITORY,
    World,
    checkpoint_tensors,
    losses,
    make_world,
    metrics,
    train_rank,
    train_until_stopped,
    with_cached_features,
)

FSDP2 = ["--use-torch-fsdp2"]
CASES: dict[str, tuple[int, str, list[str]]] = {
    "high_one_rank": (1, "high", []),
    "low_fsdp2_async_ema": (2, "low", [*FSDP2, "--async-save", "--ema-decay", "0.9"]),
    "high_tp2_warmup": (2, "high", ["--tensor-model-parallel-size", "2", "--lr-warmup-iters", "4",
                                    "--lr-decay-style", "cosine", "--min-lr", "0"]),
    "high_bf16_cp2": (2, "high", [*FSDP2, "--context-parallel-size", "2", "--bf16"]),
    "high_bf16_pp2_async_ema": (2, "high", ["--pipeline-model-parallel-size", "2", "--bf16", "--async-save",
                                            "--ema-decay", "0.9"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("world"))


def assert_same_end(straight: Path, resumed: Path, iteration: int) -> None:
    assert [row["loss"].hex() for row in metrics(resumed)] == [row["loss"].hex() for row in metrics(straight)]
    assert [row["grad_norm"].hex() for row in metrics(resumed)] == [row["grad_norm"].hex() for row in metrics(straight)]
    wanted = checkpoint_tensors(straight / f"iter_{iteration:07d}")
    found = checkpoint_tensors(resumed / f"iter_{iteration:07d}")
    assert found.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_started_again_equals_straight(case: str, world: World, tmp_path: Path) -> None:
    ranks, expert, flags = CASES[case]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_ranks(train_rank, ranks, world.flags(straight, *flags, expert=expert, iters=8), init=ranks > 1)
    command = world.flags(stopped, *flags, "--save-interval", "2", expert=expert, iters=8)
    codes = run_ranks(train_until_stopped, ranks, [*command, "--exit-interval", "3"], init=ranks > 1)
    assert codes == [75] * ranks
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "3"
    run_ranks(train_rank, ranks, command, init=ranks > 1)
    assert_same_end(straight, stopped, 8)


def launch(world: World, save: Path, *flags: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    """Start a job through the launcher, in a session of its own."""
    command = [sys.executable, "-m", "mindspeed_wan.cli.launch", "--nproc-per-node", str(ranks),
               str(REPOSITORY / "pretrain_sora.py"), *world.flags(save, *flags, iters=20)]
    return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_iteration(job: subprocess.Popen[bytes], save: Path, iteration: int) -> None:
    """Wait until ``metrics.jsonl`` has reached ``iteration``."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None:
        if (save / "metrics.jsonl").exists() and len(losses(save)) >= iteration:
            return
        time.sleep(0.02)
    pytest.fail(f"iteration {iteration} was not reached: {job.communicate(timeout=30)[0].decode()[-2000:]}")


def test_kill_9_after_seven_of_twenty_iterations(world: World, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ranks(train_rank, 2, world.flags(straight, *FSDP2, iters=20))
    job = launch(world, killed, *FSDP2, "--save-interval", "7")
    wait_for_iteration(job, killed, 8)
    os.killpg(job.pid, signal.SIGKILL)  # the ranks die with their launcher
    job.communicate()
    assert (killed / "latest_checkpointed_iteration.txt").read_text() in ("7", "14")
    output, _ = (again := launch(world, killed, *FSDP2, "--save-interval", "7")).communicate(timeout=300)
    assert again.returncode == 0, output.decode()[-3000:]
    assert b"resumed from" in output
    assert_same_end(straight, killed, 20)


def iterations(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def test_a_step_back_leaves_the_newer_branch_and_is_made_once(world: World, tmp_path: Path) -> None:
    """``--ckpt-step`` on the save folder itself: later saves are moved aside; a restart goes on."""
    save = tmp_path / "run"
    every = ["--save-interval", "1", "--train-iters", "4"]
    run_ranks(train_rank, 1, world.flags(save, *every))
    straight = checkpoint_tensors(save / "iter_0000004")
    before = metrics(save)
    back = world.flags(save, *every, "--load", str(save), "--ckpt-step", "2", "--exit-interval", "3")
    assert run_ranks(train_until_stopped, 1, back) == [75]
    assert iterations(save) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert iterations(save / "abandoned_1") == ["iter_0000003", "iter_0000004"]
    assert metrics(save / "abandoned_1") == before

    run_ranks(train_rank, 1, back)  # as a batch system would: the same command goes on instead of going back again
    assert iterations(save)[-1] == "iter_0000004" and not (save / "abandoned_2").exists()
    found = checkpoint_tensors(save / "iter_0000004")
    assert all(torch.equal(found[key], straight[key]) for key in straight)

    (save / "latest_checkpointed_iteration.txt").write_text("1\n")  # by hand
    assert run_ranks(train_until_stopped, 1, world.flags(save, *every, "--exit-interval", "2")) == [75]
    assert iterations(save) == ["iter_0000001", "iter_0000002"]
    assert iterations(save / "abandoned_2") == ["iter_0000002", "iter_0000003", "iter_0000004"]

    run_ranks(train_rank, 1, world.flags(save, *every, "--load", str(save / "iter_0000001")))
    assert iterations(save / "abandoned_3") == ["iter_0000002"] and iterations(save)[-1] == "iter_0000004"


def test_finetune_started_again_goes_on(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    run_ranks(train_rank, 1, world.flags(save, "--save-interval", "1", "--train-iters", "2"))
    command = world.flags(save, "--load", str(save), "--finetune", "--train-iters", "4", "--exit-interval", "3")
    assert run_ranks(train_until_stopped, 1, command) == [75]
    assert iterations(save) == ["iter_0000002", "iter_0000003"]  # the weights it starts from stay where they are
    assert iterations(save / "abandoned_1") == ["iter_0000001"]
    run_ranks(train_rank, 1, command)
    assert [row["iteration"] for row in metrics(save)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_exits_75(number: signal.Signals, world: World, tmp_path: Path) -> None:
    job = launch(world, tmp_path, "--train-iters", "100000", *FSDP2)
    wait_for_iteration(job, tmp_path, 3)
    job.send_signal(number)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output.decode()[-3000:]
    assert "Traceback" not in output.decode()
    saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert saved == metrics(tmp_path)[-1]["iteration"]
    assert checkpoint_tensors(tmp_path / f"iter_{saved:07d}")
