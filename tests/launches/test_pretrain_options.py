"""Options that change how a run works but not what it learns, and the guard against numbers that are not finite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_wan.errors import NumericsError
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.training import FSDP, tiny_run
from tests.helpers.world import REPOSITORY, World, edit_json, losses, make_world, metrics, train_rank


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_frames=5, size=(32, 48))


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    save = tmp_path_factory.mktemp("plain")
    run_ranks(train_rank, 1, world.flags(save, iters=5), init=False)
    return losses(save)


def evaluations(save: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (save / "validation.jsonl").read_text().splitlines()]


def test_evaluations_do_not_disturb_training_and_repeat_themselves(world: World, plain: list[float],
                                                                   tmp_path: Path) -> None:
    evaluate, frozen = ["--eval-interval", "1", "--eval-iters", "2"], ["--lr", "0", "--min-lr", "0"]
    run_ranks(train_rank, 1, world.flags(tmp_path / "frozen", *evaluate, *frozen, iters=2), init=False)
    first, second = evaluations(tmp_path / "frozen")
    assert first == second
    run_ranks(train_rank, 2, world.flags(tmp_path / "two", *evaluate, *frozen, "--use-torch-fsdp2", iters=1))
    assert evaluations(tmp_path / "two") == pytest.approx([first], rel=1e-5)
    run_ranks(train_rank, 1, world.flags(tmp_path / "moving", *evaluate, iters=5), init=False)
    assert losses(tmp_path / "moving") == plain
    assert len(set(evaluations(tmp_path / "moving"))) == 5


def test_worker_processes_change_nothing(world: World, plain: list[float], tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "pretrain_sora.py"),
               *world.flags(tmp_path, "--num-workers", "2", iters=5)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == plain


def test_shared_encoding_changes_nothing(world: World, plain: list[float], tmp_path: Path) -> None:
    edit_json(world.files / "model_high.json", world.files / "shared.json",
              encoder_offload_interval=3, enable_encoder_dp=True)
    flags = ["--mm-model", str(world.files / "shared.json"), "--tensor-model-parallel-size", "2"]
    run_ranks(train_rank, 2, world.flags(tmp_path, *flags, iters=5))
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-5)


def test_from_scratch_is_the_same_in_every_layout(world: World, tmp_path: Path) -> None:
    def flags(save: Path, *more: str) -> list[str]:
        argv = world.flags(save, "--from-scratch", *more, iters=3)
        at = argv.index("--load")
        return argv[:at] + argv[at + 2 :]

    run_ranks(train_rank, 1, flags(tmp_path / "one"), init=False)
    run_ranks(train_rank, 2, flags(tmp_path / "two", "--use-torch-fsdp2"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_memory_flags(world: World, plain: list[float], tmp_path: Path) -> None:
    """Offloading changes no bit (and does nothing on a CPU); 8-bit moments change little, and both resume."""
    offload = ["--recompute-granularity", "full", "--recompute-offload", "--optimizer-cpu-offload"]
    run_ranks(train_rank, 1, world.flags(tmp_path / "offload", *offload, iters=5), init=False)
    assert losses(tmp_path / "offload") == plain
    for iters in (3, 5):
        run_ranks(train_rank, 1, world.flags(tmp_path / "bytes", "--optimizer", "adam8bit", iters=iters), init=False)
    assert losses(tmp_path / "bytes") == pytest.approx(plain, rel=1e-2)


def test_each_expert_sees_only_its_own_noise(world: World, tmp_path: Path) -> None:
    for expert, low, high in (("high", 0.875, 1.0), ("low", 0.0, 0.875)):
        run_ranks(train_rank, 1, world.flags(tmp_path / expert, expert=expert, iters=4, batch=1), init=False)
        sigmas = [row["sigma"] for row in metrics(tmp_path / expert)]
        assert all(low <= sigma <= high for sigma in sigmas)
        assert len(set(sigmas)) == 4


def poisoned(rank: int, world_size: int, expert: str, where: str) -> list[bool]:
    """Spoil one rank's loss or gradient and return which parameters changed."""
    run = tiny_run(world_size, expert, {"parallel": FSDP})
    before = {name: p.detach().to_local().clone() for name, p in run.model.named_parameters()}
    features = run.features(1)
    if where == "loss" and rank == world_size - 1:
        features[0].latents[0, 0, 0, 0, 0] = float("nan")
    accumulated = run.step.accumulate(iter(features), stop=False)
    if where == "gradient" and rank == world_size - 1:
        next(p for p in run.model.parameters() if p.grad is not None).grad.to_local().fill_(float("inf"))
    with pytest.raises(NumericsError, match="iteration 1 is"):
        run.step.update(run.optimizer, accumulated, iteration=1, learning_rate=1.0, weight_decay=0.1)
    return [torch.equal(before[name], p.detach().to_local()) for name, p in run.model.named_parameters()]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_on_one_rank_stops_all_before_any_weight_moves(where: str) -> None:
    expert = str(tiny_pipeline_folder() / "transformer")
    for unchanged in run_ranks(poisoned, 2, expert, where):
        assert all(unchanged)
