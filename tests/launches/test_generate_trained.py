"""What was pretrained here generates straight from its DCP folder, and its export gives diffusers the same video."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_wan.inference.options import NEGATIVE_PROMPT
from tests.helpers.spawn import run_ranks
from tests.helpers.world import EXPERT_FOLDER, make_world, train_rank

CALL: dict[str, Any] = {"size": (48, 80), "num_frames": 9}
PROMPT = "a red circle moves left"


def _generate(rank: int, world_size: int, options: dict[str, Any]) -> torch.Tensor:
    from mindspeed_wan.inference.pipeline import WanGenerator
    from mindspeed_wan.parallel.inference_layout import InferenceLayout

    generator = WanGenerator.from_pretrained(
        options.pop("path"), dtype="fp32", device="cpu", grid="diffusers", noise="diffusers", shift=3.0, steps=5,
        guidance=(3.0, 4.0), layout=InferenceLayout(world_size=world_size, tensor=world_size), **options,
    )
    return generator(PROMPT, seed=1, decode=False, **CALL).latents


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Return (folder with high/ and low/ training checkpoints, the pipeline folder they started from)."""
    root = tmp_path_factory.mktemp("trained")
    world = make_world(root / "world")
    for expert, layout in (("high", ["--use-torch-fsdp2"]), ("low", ["--tensor-model-parallel-size", "2"])):
        flags = world.flags(root / "runs" / expert, *layout, expert=expert, iters=2)
        run_ranks(train_rank, 2, flags)
    return root / "runs", world.model


def test_straight_from_the_training_checkpoints(trained, tmp_path):
    runs, model = trained
    encoders = {name: model / name for name in ("vae", "text_encoder", "tokenizer")}
    (direct,) = run_ranks(_generate, 1, {"path": runs, **encoders}, init=False)
    experts = {"high_noise_ckpt": runs / "high", "low_noise_ckpt": runs / "low"}
    split = run_ranks(_generate, 2, {"path": model, **experts})
    assert ((split[1] - direct).norm() / direct.norm()).item() <= 1e-5
    (untrained,) = run_ranks(_generate, 1, {"path": model}, init=False)
    assert ((untrained - direct).norm() / direct.norm()).item() > 1e-3  # training changed both experts

    from diffusers import WanPipeline

    for expert, folder in EXPERT_FOLDER.items():
        command = [sys.executable, "-m", "mindspeed_wan_converters", "Wan2.2T2VConverter", "dcp_to_hf",
                   "--cfg.source_path", str(runs / expert), "--cfg.target_path", str(tmp_path / "export" / folder),
                   "--cfg.hf_dir", str(model)]
        subprocess.run(command, check=True)
    pipe = WanPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    oracle = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=48, width=80, num_frames=9, num_inference_steps=5,
        guidance_scale=4.0, guidance_scale_2=3.0, generator=torch.Generator().manual_seed(1), output_type="latent",
    ).frames[0]
    assert ((direct - oracle).norm() / oracle.norm()).item() <= 1e-5


def test_exchanged_experts_are_noticed(trained):
    from mindspeed_wan.errors import CheckpointError
    from mindspeed_wan.inference.pipeline import WanGenerator

    runs, model = trained
    with pytest.raises(CheckpointError, match="swapped"):
        WanGenerator.from_pretrained(model, high_noise_ckpt=runs / "low", low_noise_ckpt=runs / "high", device="cpu")
