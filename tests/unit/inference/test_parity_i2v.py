"""I2V against diffusers' WanImageToVideoPipeline: first frame, first and last frame, and Wan2.1 with CLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference import video_io
from mindspeed_wan.inference.options import NEGATIVE_PROMPT
from mindspeed_wan.inference.pipeline import WanGenerator
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder

HEIGHT, WIDTH, FRAMES, STEPS, SHIFT, SEED = 64, 96, 9, 6, 3.0, 5
PROMPT = "the circle grows"


@pytest.fixture
def images(tmp_path):
    paths = []
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (9, 16, 3), dtype=np.uint8)
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).resize((160, 90), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


def oracle(task: str, images: list[str]) -> torch.Tensor:
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline.from_pretrained(tiny_pipeline_folder(task=task), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    opened = [Image.open(path) for path in images]
    extra: dict[str, Any] = {"last_image": opened[1]} if len(opened) > 1 else {}
    if task == "i2v":
        extra["guidance_scale_2"] = 3.0
    return pipe(
        image=opened[0], prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=4.0, generator=torch.Generator().manual_seed(SEED),
        output_type="latent", **extra,
    ).frames[0]


def ours(kind: str, images: list[str], folder=None, **options: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {
        "dtype": "fp32", "device": "cpu", "grid": "diffusers", "noise": "diffusers", "shift": SHIFT, "steps": STEPS,
        "guidance": (3.0, 4.0), "num_frames": FRAMES, "size": (HEIGHT, WIDTH), "conditioning": "diffusers",
    }
    generator = WanGenerator.from_pretrained(folder or tiny_pipeline_folder(task=kind), **{**defaults, **options})
    return generator(PROMPT, seed=SEED, image=images[0], last_image=images[1] if len(images) > 1 else None,
                     decode=False).latents


@pytest.mark.parametrize(("task", "count"), [("i2v", 1), ("i2v", 2), ("wan2.1-i2v", 1)])
def test_latents(images, task, count):
    expected = oracle(task, images[:count])
    latents = ours(task, images[:count])
    assert ((latents - expected).norm() / expected.norm()).item() <= 1e-5


def test_the_original_layout_gives_the_same(images):
    expected = ours("i2v", images[:1])
    latents = ours("i2v", images[:1], tiny_original_folder(task="i2v"))
    assert torch.allclose(latents, expected, atol=1e-5)


def test_official_sizing_follows_the_image(images):
    latents = ours("i2v", images[:1], conditioning="official", size=(64, 64))
    # 90 x 160 pixels within 64 x 64 = 4096: 48 x 80
    assert latents.shape == (16, 3, 6, 10)


def test_several_start_frames_from_a_clip(images, tmp_path):
    rng = np.random.default_rng(3)
    video_io.write_mp4(tmp_path / "clip.mp4", rng.integers(0, 255, (9, 64, 96, 3), dtype=np.uint8), fps=16, crf=10)
    clip = [str(tmp_path / "clip.mp4")]
    one, five = ours("i2v", clip), ours("i2v", clip, start_frames=5)
    assert not torch.allclose(one, five, atol=1e-3)
    with pytest.raises(ConfigError, match="needs a clip"):
        ours("i2v", images[:1], start_frames=5)


def test_inp_without_an_image_is_text_to_video(images):
    folder = tiny_original_folder(task="i2v")
    with_image = ours("i2v", images[:1], folder, task="inp-A14B")
    generator = WanGenerator.from_pretrained(folder, task="inp-A14B", dtype="fp32", device="cpu", steps=2)
    latents = generator(PROMPT, size=(32, 32), num_frames=5, decode=False).latents
    assert latents.shape == (16, 2, 4, 4) and with_image.shape == (16, 3, 8, 12)


def test_an_i2v_model_needs_its_image():
    generator = WanGenerator.from_pretrained(tiny_pipeline_folder(task="i2v"), dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="needs a first frame"):
        generator(PROMPT, size=(32, 32))
