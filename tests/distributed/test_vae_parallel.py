"""The VAE over ranks is the VAE: decode and encode equal one device at sizes that do not divide evenly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.vae_parallel import ParallelVAE, choose_grid, partition
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder


def _worst_differences(
    rank: int, world_size: int, folder: Path, size: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[float, float]:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    parallel = ParallelVAE(vae, grid=grid)
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 16, 3, *size, generator=generator)
    video = torch.rand(1, 3, 9, 8 * size[0], 8 * size[1], generator=generator) * 2 - 1
    with torch.no_grad():
        for _ in range(2):  # nothing of the first call may leak into the second
            decoded, encoded = parallel.decode(latents), parallel.encode(video)
        expected = vae.decode(latents, return_dict=False)[0], vae.encode(video, return_dict=False)[0].parameters
    assert decoded.shape == expected[0].shape and encoded.shape == expected[1].shape
    return (decoded - expected[0]).abs().max().item(), (encoded - expected[1]).abs().max().item()


@pytest.mark.parametrize(
    ("world_size", "size", "grid"),
    [
        (2, (5, 6), (2, 1)),
        (2, (3, 7), (1, 2)),
        (4, (9, 6), (4, 1)),
        (4, (7, 5), (2, 2)),
        (4, (6, 10), None),
        (3, (2, 2), None),  # fewer rows and columns than ranks: every rank decodes the whole
    ],
)
def test_equal_to_one_device(world_size, size, grid):
    for worst in run_ranks(_worst_differences, world_size, tiny_pipeline_folder(), size, grid):
        assert max(worst) <= 1e-5


def _grid_errors(rank: int, world_size: int, folder: Path) -> str:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    with pytest.raises(ConfigError) as grid_error:
        ParallelVAE(vae, grid=(3, 1))
    vae.encoder.conv_in.kernel_size = (3, 5, 5)
    with pytest.raises(ConfigError) as layer_error:
        ParallelVAE(vae)
    return f"{grid_error.value} | {layer_error.value}"


def test_errors_name_the_grid_and_the_unknown_layer():
    for message in run_ranks(_grid_errors, 2, tiny_pipeline_folder()):
        assert "3x1 does not cover the 2 ranks" in message and "encoder.conv_in" in message


def test_partitions_cover_and_grids_prefer_short_halos():
    for length in range(1, 40):
        for parts in range(1, length + 1):
            pieces = partition(length, parts)
            assert [index for start, end in pieces for index in range(start, end)] == list(range(length))
            sizes = {end - start for start, end in pieces}
            assert max(sizes) - min(sizes) <= 1
    assert choose_grid(8, 90, 160) == (2, 4)  # 45 x 40 latent pixels each
    assert choose_grid(4, 60, 104) == (2, 2)
    assert choose_grid(5, 4, 4) is None
