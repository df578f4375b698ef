"""LoRA on a base held in 8 bits: the run of a base that was dequantised beforehand, exact resume, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.fsdp2 import shards_integers
from tests.helpers.spawn import run_ranks
from tests.helpers.world import (
    EXPERT_FOLDER,
    World,
    checkpoint_tensors,
    losses,
    make_world,
    train_rank,
    train_until_stopped,
    with_cached_features,
)
from tests.launches.test_lora_training import LORA, RECOMPUTE, failure

FP8 = ["--base-dtype", "fp8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def fp8_file(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The high expert as one published e4m3 file without scales."""
    folder = world.model / EXPERT_FOLDER["high"]
    config = WanConfig.from_diffusers(json.loads((folder / "config.json").read_text("utf-8")))
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    tensors = {param.original: stored[param.hf].to(torch.float8_e4m3fn)
               if param.block is not None and len(param.shape) == 2 else stored[param.hf]
               for param in parameter_table(config)}
    path = tmp_path_factory.mktemp("published") / "expert_e4m3fn.safetensors"
    save_file(tensors, path)
    return path


def test_training_equals_that_of_a_dequantised_base(world: World, fp8_file: Path, tmp_path: Path) -> None:
    """Read into fp32 weights or held in fp8, a published file trains to the same bits; with recomputation too."""
    base = ["--load", str(fp8_file)]
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    run_ranks(train_rank, 1, world.flags(wide, *LORA, *base, iters=3), init=False)
    run_ranks(train_rank, 1, world.flags(narrow, *LORA, *FP8, *base, *RECOMPUTE, iters=3), init=False)
    assert [loss.hex() for loss in losses(narrow)] == [loss.hex() for loss in losses(wide)]
    found, wanted = (checkpoint_tensors(folder / "iter_0000003") for folder in (narrow, wide))
    assert found.keys() == wanted.keys() and all(".lora_" in name for name in found)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


RESUMED = [
    pytest.param(1, FP8, id="fp8"),
    pytest.param(2, ["--base-dtype", "int8", "--base-keep", "blocks.0", "--use-torch-fsdp2", "--bf16"],
                 id="int8-bf16-fsdp2", marks=[pytest.mark.slow, pytest.mark.skipif(
                     not shards_integers(), reason="FSDP2 of this torch shards no integers")]),
]


@pytest.mark.parametrize(("ranks", "flags"), RESUMED)
def test_resume_is_bit_exact(ranks: int, flags: list[str], world: World, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_ranks(train_rank, ranks, world.flags(straight, *LORA, *flags, iters=4), init=ranks > 1)
    command = world.flags(stopped, *LORA, *flags, iters=4)
    assert run_ranks(train_until_stopped, ranks, [*command, "--exit-interval", "2"], init=ranks > 1) == [75] * ranks
    run_ranks(train_rank, ranks, command, init=ranks > 1)
    assert [loss.hex() for loss in losses(stopped)] == [loss.hex() for loss in losses(straight)]
    wanted, found = (checkpoint_tensors(folder / "iter_0000004") for folder in (straight, stopped))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    code, text = failure(world.flags(stopped, *LORA, iters=6))
    held = flags[1]
    assert code == 4 and f"base held in {held}" in text and "its compute type" in text


def test_mistakes_are_explained(world: World, tmp_path: Path) -> None:
    for flags, words in (
        (["--base-dtype", "bf16"], "computes in fp32"),
        (["--base-keep", "blocks.0"], "--base-keep names layers"),
        ([*FP8, "--base-keep", "blocks.77"], "no linear layer of a block"),
    ):
        code, text = failure(world.flags(tmp_path, *LORA, *flags))
        assert code == 2 and words in text, text
