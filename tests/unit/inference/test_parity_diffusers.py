"""The same weights, seed and settings give diffusers' latents and frames, through the expert switch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_wan.inference import video_io
from mindspeed_wan.inference.denoise import draw_noise
from mindspeed_wan.inference.options import NEGATIVE_PROMPT
from mindspeed_wan.inference.pipeline import WanGenerator
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder

HEIGHT, WIDTH, FRAMES, STEPS, SHIFT, SEED = 64, 96, 9, 8, 3.0, 5
PROMPT = "A cat &amp; a dog  play “chess”"


@functools.cache
def oracle(solver: str, task: str = "t2v") -> tuple[torch.Tensor, np.ndarray]:
    """Return diffusers' latents [16, f, h, w] and frames [F, H, W, 3] in [0, 1]."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_pipeline_folder(task=task), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if solver == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    settings: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES,
        "num_inference_steps": STEPS, "guidance_scale": 4.0,
    }
    if task == "t2v":
        settings["guidance_scale_2"] = 3.0
    latents = pipe(**settings, generator=torch.Generator().manual_seed(SEED), output_type="latent").frames
    frames = pipe(**settings, generator=torch.Generator().manual_seed(SEED), output_type="np").frames
    return latents[0], frames[0]


def ours(folder, solver: str, **options: Any):
    generator = WanGenerator.from_pretrained(
        folder, dtype="fp32", device="cpu", solver=solver, grid="diffusers", noise="diffusers", shift=SHIFT,
        steps=STEPS, **options,
    )
    return generator(PROMPT, seed=SEED, size=(HEIGHT, WIDTH), num_frames=FRAMES, guidance=(3.0, 4.0))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1.0 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("make_folder", [tiny_pipeline_folder, tiny_original_folder])
def test_latents_and_frames(make_folder, solver):
    latents, frames = oracle(solver)
    result = ours(make_folder(), solver, boundary=0.875)
    assert set(result.steps) == {"high", "low"} and min(map(len, result.steps.values())) >= 2
    assert ((result.latents - latents).norm() / latents.norm()).item() <= 1e-5
    assert result.video is not None
    mine = (result.video.permute(1, 2, 3, 0).numpy() + 1) / 2
    assert psnr(mine, frames) >= 60
    assert np.abs(video_io.to_frames(result.video).astype(int) - np.round(frames * 255)).max() <= 1


def test_wan21_with_one_expert():
    latents, _ = oracle("unipc", "wan2.1-t2v")
    result = ours(tiny_pipeline_folder(task="wan2.1-t2v"), "unipc")
    assert list(result.steps) == ["high"]
    assert ((result.latents - latents).norm() / latents.norm()).item() <= 1e-5


@pytest.mark.parametrize("memory", ["sequential", "block"])
def test_memory_modes_change_nothing(memory):
    expected = ours(tiny_pipeline_folder(), "unipc").latents
    generator = WanGenerator.from_pretrained(
        tiny_pipeline_folder(), dtype="fp32", device="cpu", grid="diffusers", noise="diffusers", shift=SHIFT,
        steps=STEPS, memory=memory, guidance=(3.0, 4.0), size=(HEIGHT, WIDTH), num_frames=FRAMES,
    )
    for _ in range(2):  # the second video starts with the low expert in place
        assert torch.equal(generator(PROMPT, seed=SEED, decode=False).latents, expected)


def test_guidance_of_one_runs_one_branch():
    generator = WanGenerator.from_pretrained(
        tiny_pipeline_folder(), dtype="fp32", device="cpu", steps=3, guidance=(1.0, 1.0), size=(32, 32), num_frames=5
    )
    first = generator("x", decode=False, negative_prompt="a").latents
    assert torch.equal(first, generator("x", decode=False, negative_prompt="b").latents)
    other = generator("x", decode=False, negative_prompt="b", guidance=(1.5, 1.0)).latents
    assert not torch.allclose(first, other)


def test_noise_by_name():
    shape, device = (3, 8, 12), torch.device("cpu")
    kinds = {kind: draw_noise(kind, shape, 7, device) for kind in ("ours", "diffusers", "official")}
    expected = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(kinds["diffusers"], expected) and torch.equal(kinds["official"], expected)
    assert kinds["ours"].shape == expected.shape and not torch.equal(kinds["ours"], expected)
    assert torch.equal(kinds["ours"], draw_noise("ours", shape, 7, device))
    assert not torch.equal(kinds["ours"], draw_noise("ours", shape, 8, device))
    assert abs(kinds["ours"].std().item() - 1) < 0.05


def test_a_video_does_not_depend_on_the_list_it_is_in():
    options: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "steps": 2, "size": (32, 32), "num_frames": 5}
    alone = WanGenerator.from_pretrained(tiny_pipeline_folder(), **options)("b", decode=False).latents
    listed = WanGenerator.from_pretrained(tiny_pipeline_folder(), **options, memory="sequential")
    listed("a", decode=False)
    assert torch.equal(alone, listed("b", decode=False).latents)
