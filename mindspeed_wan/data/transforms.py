"""Decoded frames to a training sample: resize and crop. torch only.

As in MindSpeed-MM's pipeline the resize works on 8-bit frames (the result is rounded to 8 bits) and without
antialiasing: that is what ``ResizeVideo`` of its data.json does, and what its users' results were made with. Shrinking
by more than 2 aliases; ``antialias=True`` avoids that.

Samples stay 8-bit: a quarter of the bytes of fp32 travels between processes and to the device, where
``models.vae.unit_range`` scales them to [-1, 1] (ToTensorVideo and norm_fun of the pipeline).
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
        uint8 [3, F, h, w].
    """
    clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))  # no copy of planar memory
    if tuple(clip.shape[-2:]) != plan.resized:
        clip = F.interpolate(clip, size=plan.resized, mode=settings.interpolation, align_corners=False,
                             antialias=settings.antialias)
    spare = [have - want for have, want in zip(plan.resized, plan.out)]
    if settings.crop == "random":
        top, left = (int(draw * (extra + 1)) for draw, extra in zip(draws, spare))
    else:
        top, left = (round(extra / 2.0) for extra in spare)
    return clip[..., top : top + plan.out[0], left : left + plan.out[1]].contiguous()
