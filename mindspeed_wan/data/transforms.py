"""Decoded frames to a training tensor: resize, crop, scale to [-1, 1]. torch only.

As in MindSpeed-MM's pipeline the first resize works on 8-bit frames (the result is rounded to 8 bits) and without
antialiasing: that is what ``ResizeVideo`` of its data.json does, and what its users' results were made with. Shrinking
by more than 2 aliases; ``antialias=True`` avoids that.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.data.plan import ClipSettings, SizePlan


def to_sample(frames: np.ndarray, plan: SizePlan, settings: ClipSettings, draws: tuple[float, float]) -> Tensor:
    """Turn frames into a sample.

    Args:
        frames: uint8 [F, H, W, 3] RGB.
        plan: sizes, from ``plan.size_plan``.
        settings: filter and crop.
        draws: two numbers in [0, 1) that place a random crop (down, across).

    Returns:
        fp32 [3, F, h, w] in [-1, 1].
    """
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [F, 3, H, W], a view; channels_last in memory
    clip = resize(clip, plan.resized, settings)
    clip = _cut(clip, plan.cropped, draws if settings.crop == "random" else None)
    values = clip.to(torch.float32).div_(255.0).sub_(0.5).div_(0.5)
    values = resize(values, plan.out, settings)
    return values.permute(1, 0, 2, 3).contiguous()


def resize(clip: Tensor, size: tuple[int, int], settings: ClipSettings) -> Tensor:
    """Resize [F, 3, H, W] (uint8 or fp32; the type is kept) to (height, width)."""
    if tuple(clip.shape[-2:]) == size:
        return clip
    return F.interpolate(clip, size=size, mode=settings.interpolation, align_corners=False,
                         antialias=settings.antialias)


def _cut(clip: Tensor, size: tuple[int, int], draws: tuple[float, float] | None) -> Tensor:
    """Cut (height, width) out of the centre, or at a random place."""
    spare = [have - want for have, want in zip(clip.shape[-2:], size)]
    if draws is None:
        top, left = (round(extra / 2.0) for extra in spare)
    else:
        top, left = (int(draw * (extra + 1)) for draw, extra in zip(draws, spare))
    return clip[..., top : top + size[0], left : left + size[1]]
