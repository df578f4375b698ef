"""The bias of B (PEFT's ``lora_bias=True``): adds ``scale * bias`` to the layer's output, as a change of its bias does.

Both directions keep the bits: the value is rounded to the first dtype from which the other direction gets it back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_difference(bias: Tensor, scale: float) -> Tensor:
    """Return ``scale * bias``, the difference of the layer's own bias."""
    exact = bias.double() * scale
    for dtype in (bias.dtype, torch.float32):
        if bias.is_meta or torch.equal((exact.to(dtype).double() / scale).to(bias.dtype), bias):
            return exact.to(dtype)
    return exact


def from_difference(difference: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the bias of B that changes the layer's bias by ``difference``; in ``dtype``, B's own, if that is exact."""
    exact = difference.double() / scale
    for candidate in (dtype, torch.float32):
        if difference.is_meta or torch.equal((exact.to(candidate).double() * scale).to(difference.dtype), difference):
            return exact.to(candidate)
    return exact
