"""Both experts side by side: the bits of two separate runs, every clip encoded once, an end that both share."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mindspeed_wan.data.sampler import Key
from tests.helpers.joint import assert_same_run, both_flags, finished, joint_rank, run_joint
from tests.helpers.spawn import run_ranks
from tests.helpers.world import (
    World,
    losses,
    make_world,
    metrics,
    train_rank,
    train_until_stopped,
    with_cached_features,
)

FSDP2 = ["--use-torch-fsdp2"]
LORA = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "q,k,v,o"]
EVALUATED = ["--eval-interval", "2", "--eval-iters", "1"]
EVEN = ["--expert-ranks", "even"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each expert trained by one rank of its own, with evaluations."""
    folders = {expert: tmp_path_factory.mktemp("alone") / expert for expert in ("high", "low")}
    for expert, folder in folders.items():
        run_ranks(train_rank, 1, world.flags(folder, *EVALUATED, expert=expert, iters=5), init=False)
    return folders


def separately(world: World, folder: Path, ranks: int, *flags: str, iters: int = 3) -> dict[str, Path]:
    folders = {expert: folder / f"alone_{expert}" for expert in ("high", "low")}
    for expert, save in folders.items():
        run_ranks(train_rank, ranks, world.flags(save, *flags, expert=expert, iters=iters), init=ranks > 1)
    return folders


def test_one_rank_each_equals_two_runs(world: World, alone: dict[str, Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = world.flags(tmp_path / "joint", *both_flags(world), *EVEN, *EVALUATED, iters=5)
    assert finished(run_joint(2, argv, joint_rank, str(log)))
    for rank, (expert, folder) in enumerate(alone.items()):
        found = tmp_path / "joint" / expert
        assert_same_run(found, folder)
        assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()}
        lines = Path(f"{log}.{rank}").read_text(encoding="utf-8").splitlines()
        assert lines and all(line.startswith(f"[{expert}] ") for line in lines)
        assert any("iteration 5/5 |" in line for line in lines)


def test_two_ranks_each_equal_two_runs(world: World, tmp_path: Path) -> None:
    flags = [*FSDP2, "--save-interval", "2", "--async-save", "--ema-decay", "0.9"]
    alone = separately(world, tmp_path, 2, *flags)
    assert finished(run_joint(4, world.flags(tmp_path / "joint", *both_flags(world), *EVEN, *flags)))
    for expert, folder in alone.items():
        assert_same_run(tmp_path / "joint" / expert, folder)


@pytest.mark.slow
def test_each_expert_has_its_own_layout(world: World, alone: dict[str, Path], tmp_path: Path) -> None:
    own = ["--low:tensor-model-parallel-size", "2", "--low:sequence-parallel", "--low:lr", "2e-3"]
    argv = world.flags(tmp_path / "joint", *both_flags(world), "--expert-ranks", "1,2", *own, *EVALUATED, iters=5)
    assert finished(run_joint(3, argv))
    low = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--lr", "2e-3", *EVALUATED]
    run_ranks(train_rank, 2, world.flags(tmp_path / "low", *low, expert="low", iters=5))
    assert_same_run(tmp_path / "joint" / "high", alone["high"])
    assert_same_run(tmp_path / "joint" / "low", tmp_path / "low")


def test_adapters_side_by_side_from_a_cache(world: World, tmp_path: Path) -> None:
    cached = with_cached_features(world, tmp_path / "files")
    alone = separately(cached, tmp_path, 1, *LORA)
    argv = cached.flags(tmp_path / "joint", *both_flags(cached), *EVEN, *LORA)
    assert finished(run_joint(2, argv))
    for expert, folder in alone.items():
        assert_same_run(tmp_path / "joint" / expert, folder)
        adapter = (folder / "iter_0000003" / "adapter.safetensors").read_bytes()
        assert (tmp_path / "joint" / f"adapter_{expert}.safetensors").read_bytes() == adapter


# ---- once encoded, nobody waits in step -----------------------------------------------------------------------------


def counting_rank(rank: int, world_size: int, port: int, argv: list[str], slow: int) -> Any:
    """``joint_rank`` that counts what it encodes and notes when it begins each event; rank ``slow`` takes longer."""
    from mindspeed_wan.training import encoders, joint_feed, step

    made: list[str] = []
    encoded: list[Key] = []
    begun: list[tuple[float, int]] = []
    make, encode, tell = encoders.Encoders.__init__, encoders.Encoders.encode_samples, joint_feed.Board.tell
    accumulate = step.TrainStep.accumulate

    def counted(self: Any, batches: Any) -> Any:
        encoded.extend(key for batch in batches for key in batch.keys)
        return encode(self, batches)

    def noted(self: Any, **changes: Any) -> None:
        if "event" in changes:
            begun.append((time.monotonic(), changes["event"]))
        tell(self, **changes)

    def slowly(self: Any, *args: Any, **more: Any) -> Any:
        if rank == slow:
            time.sleep(0.15)
        return accumulate(self, *args, **more)

    encoders.Encoders.__init__ = lambda self, *args: (made.append("encoders"), make(self, *args))[1]
    encoders.Encoders.encode_samples = counted
    joint_feed.Board.tell = noted
    step.TrainStep.accumulate = slowly
    assert joint_rank(rank, world_size, port, argv)[0] == 0
    return made, encoded, begun


def test_every_clip_is_encoded_once_by_ranks_that_hold_encoders(world: World, tmp_path: Path) -> None:
    argv = world.flags(tmp_path / "joint", *both_flags(world), *EVEN, "--tensor-model-parallel-size", "2", batch=2,
                       iters=5)
    results = run_joint(4, argv, counting_rank, -1)
    # two clips a step on four ranks: ranks 1 and 3 have nothing to encode, and hold no encoder
    assert [made for made, _, _ in results] == [["encoders"], [], ["encoders"], []]
    assert [len(encoded) for _, encoded, _ in results] == [5, 0, 5, 0]
    everything = [key for _, encoded, _ in results for key in encoded]
    assert len(set(everything)) == len(everything) == 10


@pytest.mark.slow
def test_a_slow_expert_holds_the_other_back_only_by_its_queue(world: World, tmp_path: Path) -> None:
    from mindspeed_wan.training.joint_feed import QUEUE

    argv = world.flags(tmp_path / "joint", *both_flags(world), *EVEN, batch=2, iters=12)
    (_, _, slow), (_, _, fast) = run_joint(2, argv, counting_rank, 0)
    leads = [event - max((e for at, e in slow if at <= now), default=0) for now, event in fast]
    assert 2 <= max(leads) <= QUEUE + 2, leads


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(3, 1), pytest.param(1, 5, marks=pytest.mark.slow)])
def test_experts_that_stand_at_different_iterations_go_on(high: int, low: int, world: World, alone: dict[str, Path],
                                                          tmp_path: Path) -> None:
    save = tmp_path / "joint"
    for expert, iteration in (("high", high), ("low", low)):
        started = world.flags(save / expert, *EVALUATED, "--exit-interval", str(iteration), expert=expert, iters=5)
        assert run_ranks(train_until_stopped, 1, started, init=False) == [75 if iteration < 5 else 0]
    log = tmp_path / "log"
    argv = world.flags(save, *both_flags(world), *EVEN, *EVALUATED, iters=5)
    assert finished(run_joint(2, argv, joint_rank, str(log)))
    for expert, folder in alone.items():
        assert losses(save / expert) == losses(folder)
        assert (save / expert / "validation.jsonl").read_text() == (folder / "validation.jsonl").read_text()
    ahead = "batches ahead of the low-noise one"
    assert (ahead in Path(f"{log}.0").read_text(encoding="utf-8")) == (high > low)


@pytest.mark.slow
def test_both_stop_at_the_exit_interval_and_go_on(world: World, alone: dict[str, Path], tmp_path: Path) -> None:
    argv = world.flags(tmp_path / "joint", *both_flags(world), *EVEN, *EVALUATED, iters=5)
    for wanted in (75, 75, 0):
        assert [code for code, _ in run_joint(2, [*argv, "--exit-interval", "2"])] == [wanted] * 2
    assert finished(run_joint(2, argv)), "a job that is done says so again"
    for expert, folder in alone.items():
        assert losses(tmp_path / "joint" / expert) == losses(folder)


# ---- the end --------------------------------------------------------------------------------------------------------


def test_nan_in_one_expert_saves_and_stops_the_other(world: World, tmp_path: Path) -> None:
    argv = world.flags(tmp_path, *both_flags(world), *EVEN, "--high:lr", "1e30", "--high:min-lr", "1e30", iters=500)
    (high, told_high), (low, told_low) = run_joint(2, argv)
    assert high == low == 5
    assert told_high.startswith("the high-noise expert: the loss of iteration 2 is nan")
    assert "the high-noise expert failed: the loss of iteration 2 is nan" in told_low
    assert "the low-noise expert: stopped by the end of the high-noise expert after" in told_low and "saved" in told_low
    saved = int((tmp_path / "low" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == metrics(tmp_path / "low")[-1]["iteration"] < 100
    assert not list((tmp_path / "high").glob("iter_*"))


def signalled_rank(rank: int, world_size: int, port: int, argv: list[str], folder: str) -> tuple[int, str]:
    """``joint_rank``; the last rank gets a SIGTERM once it has made a step."""
    def send() -> None:
        history = Path(folder) / "metrics.jsonl"
        while not history.exists() or history.stat().st_size == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == world_size - 1:
        threading.Thread(target=send, daemon=True).start()
    return joint_rank(rank, world_size, port, argv)


def test_a_signal_for_one_rank_stops_both_experts(world: World, tmp_path: Path) -> None:
    argv = world.flags(tmp_path, *both_flags(world), *EVEN, iters=500)
    results = run_joint(2, argv, signalled_rank, str(tmp_path / "low"))
    assert [code for code, _ in results] == [75, 75]
    told = results[0][1]
    assert "stopped by the end of the low-noise expert (stopped by SIGTERM)" in told and "saved" in told
    for expert in ("high", "low"):
        saved = int((tmp_path / expert / "latest_checkpointed_iteration.txt").read_text())
        assert saved == metrics(tmp_path / expert)[-1]["iteration"]
