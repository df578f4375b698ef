"""Rotary tables and patches against the official formulae."""

from __future__ import annotations

import torch

from mindspeed_wan.models.wan.embeddings import PatchEmbedding, patchify, timestep_sinusoid, unpatchify
from mindspeed_wan.models.wan.rope import rotary_tables
from mindspeed_wan.platforms import ops
from tests.helpers.oracle import TINY

CPU = torch.device("cpu")


def _official_rope(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Wan2.2's ``rope_apply``: complex128 tables, 22 + 21 + 21 of 64 pairs for frame, height, width. x: [L, N, 128]."""
    def table(dim: int) -> torch.Tensor:
        frequencies = torch.outer(torch.arange(1024), 1.0 / 10000 ** (torch.arange(0, dim, 2).double() / dim))
        return torch.polar(torch.ones_like(frequencies), frequencies)

    frames, height, width = (table(d)[:n] for d, n in zip((44, 42, 42), grid))
    f, h, w = grid
    rotation = torch.cat((
        frames.view(f, 1, 1, -1).expand(f, h, w, -1),
        height.view(1, h, 1, -1).expand(f, h, w, -1),
        width.view(1, 1, w, -1).expand(f, h, w, -1),
    ), -1).reshape(f * h * w, 1, -1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).float()


def test_tables_rotate_as_the_official_complex_numbers() -> None:
    grid = (5, 30, 52)
    x = torch.randn(5 * 30 * 52, 2, 128, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(128, grid, CPU)
    assert cos.shape == (7800, 1, 1, 128) and cos.dtype == torch.float32
    assert torch.equal(cos[..., 0::2], cos[..., 1::2]) and torch.equal(sin[..., 0::2], sin[..., 1::2])
    rotated = ops.rotary(x.unsqueeze(1), cos, sin).squeeze(1)
    torch.testing.assert_close(rotated, _official_rope(x, grid), rtol=0, atol=1e-6)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
    cos, sin = rotary_tables(24, (6, 1, 1), CPU)
    q, k = (ops.rotary(t.expand(6, 1, 1, 24), cos, sin).flatten(1) for t in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_patch_embedding_is_the_convolution() -> None:
    latents = torch.randn(2, 4, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    embedding = PatchEmbedding(TINY)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    convolved = torch.nn.functional.conv3d(latents, embedding.weight, embedding.bias, stride=(1, 2, 2))
    tokens = embedding(patchify(latents, (1, 2, 2)))
    torch.testing.assert_close(tokens, convolved.flatten(2).permute(2, 0, 1), rtol=1e-4, atol=1e-5)


def test_unpatchify_puts_the_channel_fastest() -> None:
    grid, patch, channels = (2, 3, 4), (1, 2, 2), 5
    video = torch.arange(2 * 5 * 2 * 6 * 8.0).view(2, channels, 2, 6, 8)
    tokens = torch.empty(2 * 3 * 4, 2, 4 * channels)
    for f in range(2):
        for h in range(3):
            for w in range(4):
                for y in range(2):
                    for x in range(2):
                        voxel = video[:, :, f, 2 * h + y, 2 * w + x]
                        start = (2 * y + x) * channels
                        tokens[(f * 3 + h) * 4 + w, :, start : start + channels] = voxel
    assert torch.equal(unpatchify(tokens, grid, patch), video)


def test_the_sinusoid_is_fp64_inside() -> None:
    t = torch.tensor([999.5, 0.0])
    exact = torch.outer(t.double(), 10000.0 ** (-torch.arange(128).double() / 128))
    result = timestep_sinusoid(t, 256)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), torch.cat((exact.cos(), exact.sin()), -1), rtol=0, atol=6e-8)
