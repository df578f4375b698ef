"""LoRA runs from the command line: layouts, resume, what is saved, where base and adapter come from, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mindspeed_wan.checkpoint.weights import load_model_weights
from mindspeed_wan.errors import WanError
from mindspeed_wan.lora.apply import load_adapter
from mindspeed_wan.lora.formats import read_lora, write_lora
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.models.wan.views import global_views
from mindspeed_wan.platforms import get_platform
from tests.helpers.spawn import run_ranks
from tests.helpers.world import (
    EXPERT_FOLDER,
    World,
    checkpoint_tensors,
    losses,
    make_world,
    metrics,
    train_rank,
    train_until_stopped,
    with_cached_features,
)

ITERATIONS = 5
LORA = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2"]
DIFFSYNTH_NAMES = [*LORA[:4], "--lora-target-modules", "q,k,v,o,ffn.0,ffn.2"]
FSDP2 = ["--use-torch-fsdp2"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "tp2_sp_recompute": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", *RECOMPUTE]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "fsdp2_recompute": (2, [*FSDP2, *RECOMPUTE]),
    "tp2_fsdp2": (4, [*FSDP2, "--tensor-model-parallel-size", "2"]),
    "mbs2": (1, ["--micro-batch-size", "2"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("one")
    run_ranks(train_rank, 1, world.flags(save, *LORA, iters=ITERATIONS), init=False)
    return save


def architecture(world: World) -> WanConfig:
    return WanConfig.from_diffusers(json.loads((world.model / "transformer" / "config.json").read_text("utf-8")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_the_same_adapter(layout: str, world: World, reference: Path, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    run_ranks(train_rank, ranks, world.flags(tmp_path, *DIFFSYNTH_NAMES, *flags, iters=ITERATIONS), init=ranks > 1)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-4)
    assert losses(tmp_path)[0] == pytest.approx(losses(reference)[0], rel=1e-5)
    norms = [[row["grad_norm"] for row in metrics(folder)] for folder in (tmp_path, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_only_the_adapter_is_saved_and_its_file_says_alpha(world: World, reference: Path) -> None:
    folder = reference / f"iter_{ITERATIONS:07d}"
    stored = checkpoint_tensors(folder)
    assert stored and all(".lora_" in name for name in stored)
    lora = read_lora(folder, architecture(world))
    assert len(lora.adapters) * 6 == len(stored)
    assert {a.alpha for a in lora.adapters.values()} == {8.0} and lora.ranks == [4]
    assert lora.format == "diffusers" and lora.alpha_source == "metadata"
    told = json.loads(lora.metadata["mindspeed_wan.training"])
    assert told["expert"] == "high" and told["iteration"] == ITERATIONS
    for mm, adapter in lora.adapters.items():
        assert torch.equal(adapter.up, stored[f"model.{mm}.lora_B.default.weight"]) and adapter.up.any()
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["files"]["adapter.safetensors"]


def test_the_trained_file_in_diffusers_and_peft(world: World, reference: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel

    config = architecture(world)
    folder, lora = reference / f"iter_{ITERATIONS:07d}", read_lora(reference / f"iter_{ITERATIONS:07d}", config)
    model = build_wan(config, platform=get_platform("cpu"))
    load_model_weights(world.model / "transformer", global_views(model), config)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, 2, 8, 8, generator=generator)
    text, timestep = torch.randn(1, 512, config.text_dim, generator=generator), torch.tensor([900.0])
    plain = model(latents, timestep, text).detach()
    load_adapter(model, lora, "trained")
    ours = model(latents, timestep, text).detach()
    base = world.model / "transformer"
    in_diffusers = WanTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32)
    in_diffusers.load_lora_adapter(str(folder), weight_name="adapter.safetensors", prefix="transformer")
    write_lora(lora, tmp_path / "peft", config, "peft")
    in_peft = PeftModel.from_pretrained(
        WanTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32), tmp_path / "peft")
    assert float((ours - plain).norm() / plain.norm()) > 1e-3
    for theirs in (in_diffusers, in_peft):
        found = theirs(latents, timestep, text, return_dict=False)[0].detach()
        assert float((ours - found).norm() / found.norm()) <= 1e-5


RESUMED: dict[str, tuple[int, list[str]]] = {
    "one_rank_dropout": (1, ["--lora-dropout", "0.2"]),
    "bf16_fsdp2_async_ema": (2, [*FSDP2, "--bf16", "--async-save", "--ema-decay", "0.9"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_bit_exact(case: str, world: World, tmp_path: Path) -> None:
    ranks, flags = RESUMED[case]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_ranks(train_rank, ranks, world.flags(straight, *LORA, *flags, iters=6), init=ranks > 1)
    command = world.flags(stopped, *LORA, *flags, iters=6)
    assert run_ranks(train_until_stopped, ranks, [*command, "--exit-interval", "3"], init=ranks > 1) == [75] * ranks
    run_ranks(train_rank, ranks, command, init=ranks > 1)
    assert [loss.hex() for loss in losses(stopped)] == [loss.hex() for loss in losses(straight)]
    wanted, found = (checkpoint_tensors(folder / "iter_0000006") for folder in (straight, stopped))
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
    if "--ema-decay" in flags:
        averaged = read_lora(stopped / "iter_0000006" / "adapter_ema.safetensors", architecture(world))
        name = next(iter(averaged.adapters))
        assert torch.equal(averaged.adapters[name].up, found[f"ema.{name}.lora_B.default.weight"])


def test_dropout_masks_survive_recomputation_and_tensor_parallelism(world: World, tmp_path: Path) -> None:
    kept, again, split = tmp_path / "kept", tmp_path / "again", tmp_path / "split"
    dropout = [*LORA[:4], "--lora-target-modules", "q,k,v,ffn.0", "--lora-dropout", "0.3"]
    run_ranks(train_rank, 1, world.flags(kept, *dropout, iters=3), init=False)
    run_ranks(train_rank, 1, world.flags(again, *dropout, *RECOMPUTE, iters=3), init=False)
    run_ranks(train_rank, 2, world.flags(split, *dropout, "--tensor-model-parallel-size", "2", iters=3))
    assert losses(again) == pytest.approx(losses(kept), rel=1e-6)
    assert losses(split) == pytest.approx(losses(kept), rel=1e-4)
    norms = [[row["grad_norm"] for row in metrics(folder)] for folder in (kept, again)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_load_base_model_with_an_adapter_of_another_format(world: World, reference: Path, tmp_path: Path) -> None:
    """``--load`` beside ``--load-base-model``: a checkpoint goes on with its moments, a file starts a new run."""
    base = str(world.model / EXPERT_FOLDER["high"])
    going_on, started = tmp_path / "going_on", tmp_path / "started"
    run_ranks(train_rank, 1, world.flags(going_on, *LORA, "--load", str(reference), "--load-base-model", base,
                                         iters=ITERATIONS + 1), init=False)
    assert [row["iteration"] for row in metrics(going_on)] == [ITERATIONS + 1]
    lora = read_lora(reference / f"iter_{ITERATIONS:07d}", architecture(world))
    file = write_lora(lora, tmp_path / "kohya.safetensors", architecture(world), "kohya2")
    flags = [*LORA, "--load", str(file), "--load-base-model", base, "--lr", "0", "--min-lr", "0",
             "--lora-format", "comfy"]
    run_ranks(train_rank, 1, world.flags(started, *flags, iters=1), init=False)
    saved = read_lora(started / "iter_0000001", architecture(world))
    assert saved.format == "comfy"
    for mm, adapter in lora.adapters.items():
        assert torch.equal(saved.adapters[mm].up, adapter.up) and torch.equal(saved.adapters[mm].down, adapter.down)


def test_both_experts_in_one_command(world: World, reference: Path, tmp_path: Path) -> None:
    """Each adapter is what a run of its own gives; stopped in the second expert, the command goes on there."""
    low = tmp_path / "low"
    run_ranks(train_rank, 1, world.flags(low, *LORA, expert="low", iters=ITERATIONS), init=False)
    save = tmp_path / "both"
    flags = ["--expert", "both", "--mm-model", str(world.files / "model_{expert}.json"), "--load", str(world.model)]
    command = world.flags(save, *LORA, *flags, iters=ITERATIONS)
    run_ranks(train_rank, 1, command, init=False)
    for expert, alone in (("high", reference), ("low", low)):
        assert losses(save / expert) == losses(alone)
        found = read_lora(save / f"adapter_{expert}.safetensors", architecture(world))
        wanted = read_lora(alone / f"iter_{ITERATIONS:07d}", architecture(world))
        assert all(torch.equal(a.up, wanted.adapters[mm].up) for mm, a in found.adapters.items())
        assert json.loads(found.metadata["mindspeed_wan.training"])["expert"] == expert
    before = (save / "high" / "metrics.jsonl").stat().st_mtime_ns
    longer = world.flags(save, *LORA, *flags, iters=ITERATIONS)
    (save / "adapter_low.safetensors").unlink()
    run_ranks(train_rank, 1, longer, init=False)
    assert (save / "adapter_low.safetensors").is_file()
    assert (save / "high" / "metrics.jsonl").stat().st_mtime_ns == before


def refused(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    try:
        return train_rank(rank, world_size, argv), "nothing was refused"
    except WanError as error:
        return error.exit_code, str(error)


def failure(argv: list[str]) -> tuple[int, str]:
    return run_ranks(refused, 1, argv, init=False)[0]


def test_mistakes_are_explained(world: World, reference: Path, tmp_path: Path) -> None:
    wrong = [*LORA[:4], "--lora-target-modules", "kk"]
    code, text = failure(world.flags(tmp_path / "a", *wrong))
    assert code == 2 and "kk" in text and "proj_k" in text
    code, text = failure(world.flags(tmp_path / "b", *LORA, "--load", str(reference)))
    assert code == 4 and "adapters" in text and "--load-base-model" in text
    code, text = failure(world.flags(reference))
    assert code == 4 and "holds adapters, but this run trains all weights" in text
    code, text = failure(world.flags(reference, "--lora-r", "8", *LORA[2:]))
    assert code == 4 and "rank 4 instead of 8" in text
