"""Every layout makes the video that one rank makes: same noise, same latents, same frames."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mindspeed_wan.errors import DataError
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder

CALL: dict[str, Any] = {"size": (80, 96), "num_frames": 9, "steps": 6, "seed": 3}
PROMPTS = ("A red circle moves left", "two blue squares", "three")


def _generate(rank: int, world_size: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from mindspeed_wan.inference.pipeline import WanGenerator

    options = {"dtype": "fp32", "device": "cpu", **options}
    options["layout"] = InferenceLayout(world_size=world_size, **options.pop("layout", {}))
    prompts, image = options.pop("use_prompts", PROMPTS[:1]), options.pop("image", None)
    generator = WanGenerator.from_pretrained(folder, **options)
    mine = prompts[generator.runtime.replica :: generator.runtime.layout.replicas]
    results = {prompt: generator(prompt, **CALL, image=image) for prompt in mine}
    return {prompt: (result.latents, result.video) for prompt, result in results.items()}


@functools.cache
def reference() -> dict[str, Any]:
    """One rank's latents and frames, made once."""
    return run_ranks(_generate, 1, tiny_pipeline_folder(), {"use_prompts": PROMPTS})[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"layout": {"ulysses": 2}}),
    (2, {"layout": {"tensor": 2}}),
    (2, {"layout": {"cfg": 2, "t5_fsdp": True}}),
    (2, {"layout": {"ulysses": 2, "dit_fsdp": True, "vae_parallel": True}}),
    (2, {"layout": {"ulysses": 2, "dit_fsdp": True}, "memory": "sequential"}),
    (2, {"layout": {"tensor": 2}, "memory": "block"}),
    (2, {"layout": {"ring": 2}}),
    (4, {"layout": {"ulysses": 4, "vae_parallel": True}}),
    (4, {"layout": {"ulysses": 2, "ring": 2}}),
    (4, {"layout": {"cfg": 2, "ulysses": 2, "dit_fsdp": True, "t5_fsdp": True, "vae_parallel": True}}),
    (4, {"layout": {"cfg": 2, "tensor": 2}}),
    (4, {"layout": {"ulysses": 2, "tensor": 2, "t5_fsdp": True}}),
]


@pytest.mark.parametrize(("world_size", "options"), LAYOUTS, ids=str)
def test_same_video_on_every_layout(world_size, options):
    outcomes = run_ranks(_generate, world_size, tiny_pipeline_folder(), options)
    latents, video = reference()[PROMPTS[0]]
    for rank, outcome in enumerate(outcomes):
        assert relative(outcome[PROMPTS[0]][0], latents) <= 1e-5, f"rank {rank}"
    assert [outcome[PROMPTS[0]][1] is not None for outcome in outcomes] == [True] + [False] * (world_size - 1)
    assert (outcomes[0][PROMPTS[0]][1] - video).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, {}), (4, {"ulysses": 2, "dit_fsdp": True, "t5_fsdp": True, "vae_parallel": True})]
)
def test_replicas_share_a_list_of_prompts(world_size, layout):
    """Three prompts on two replicas: the second makes one video fewer and waits for nobody."""
    outcomes = run_ranks(_generate, world_size, tiny_pipeline_folder(), {"layout": layout, "use_prompts": PROMPTS})
    made = [prompt for outcome in outcomes for prompt, (_, video) in outcome.items() if video is not None]
    assert sorted(made) == sorted(PROMPTS)
    for outcome in outcomes:
        for prompt, (latents, _) in outcome.items():
            assert relative(latents, reference()[prompt][0]) <= 1e-5


def test_the_original_folder_gives_the_same_video_on_tensor_ranks():
    outcomes = run_ranks(_generate, 2, tiny_original_folder(), {"layout": {"tensor": 2}})
    assert relative(outcomes[0][PROMPTS[0]][0], reference()[PROMPTS[0]][0]) <= 1e-5


I2V_LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("i2v", 2, {"cfg": 2, "vae_parallel": True}),
    ("i2v", 2, {"tensor": 2}),
    ("i2v", 4, {"ulysses": 4, "dit_fsdp": True, "t5_fsdp": True, "vae_parallel": True}),
    ("wan2.1-i2v", 2, {"ulysses": 2}),
    ("wan2.1-i2v", 4, {"cfg": 2, "tensor": 2, "vae_parallel": True}),
]


@pytest.mark.parametrize(("kind", "world_size", "layout"), I2V_LAYOUTS, ids=str)
def test_image_to_video_on_every_layout(tmp_path, kind, world_size, layout):
    image = tmp_path / "first.png"
    pixels = torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.numpy()).save(image)
    folder = tiny_pipeline_folder(task=kind)
    ((latents, video),) = run_ranks(_generate, 1, folder, {"image": str(image)})[0].values()
    outcomes = run_ranks(_generate, world_size, folder, {"image": str(image), "layout": layout})
    for outcome in outcomes:
        assert relative(outcome[PROMPTS[0]][0], latents) <= 1e-5
    assert (outcomes[0][PROMPTS[0]][1] - video).abs().max() <= 1e-4


def _image_error(rank: int, world_size: int, folder: Path) -> str:
    with pytest.raises(DataError) as error:
        _generate(rank, world_size, folder, {"layout": {"ulysses": 2}, "image": __file__})
    return str(error.value)


def test_an_unreadable_image_is_one_error_on_every_rank():
    messages = run_ranks(_image_error, 2, tiny_pipeline_folder(task="i2v"))
    assert all("cannot be read as an image" in message for message in messages)
