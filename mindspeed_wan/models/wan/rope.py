"""Rotary position tables of a video: computed in fp64, stored as real fp32 cos and sin.

Channels of a head are split over frame, height and width (44, 42, 42 of 128), angles are position / theta^(2i/d) per
axis. Complex tables, as the original code keeps them, have no kernels on the NPU. Source: Wan2.2 ``rope_params``.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rotary_tables(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each ``[L, 1, 1, head_dim]`` fp32 with every value twice, for a token grid (f, h, w).

    L = f * h * w, width fastest.
    """
    spatial = 2 * (head_dim // 6)
    axis_dims = (head_dim - 2 * spatial, spatial, spatial)
    frames, height, width = grid
    angles = [_axis_angles(dim, length) for dim, length in zip(axis_dims, grid)]
    angle = torch.cat(
        (
            angles[0].view(frames, 1, 1, -1).expand(frames, height, width, -1),
            angles[1].view(1, height, 1, -1).expand(frames, height, width, -1),
            angles[2].view(1, 1, width, -1).expand(frames, height, width, -1),
        ),
        dim=-1,
    ).reshape(frames * height * width, 1, 1, head_dim // 2)
    cos, sin = (f(angle).float().repeat_interleave(2, dim=-1).to(device) for f in (torch.cos, torch.sin))
    return cos, sin


def _axis_angles(dim: int, length: int) -> Tensor:
    """Return ``[length, dim / 2]`` fp64 angles on the host (the NPU has no fp64)."""
    frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
