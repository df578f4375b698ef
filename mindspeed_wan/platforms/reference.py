"""The reference norms and rotary embedding in plain torch; the signatures are those of ``ops.Kernels``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 inside; a weight of another dtype makes the whole computation fp32."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs as a real 2x2 rotation in fp32: complex numbers fall off the NPU and do not fuse when compiled."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """One after the other; the norm is over all heads, the rotation inside each."""
    return rotary(rms_norm(x, weight, eps).unflatten(-1, (-1, cos.shape[-1])), cos, sin)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """fp32 statistics; rounded once, to ``out_dtype``."""
    out_dtype = out_dtype or x.dtype
    if out_dtype == x.dtype and (weight is None or weight.dtype == x.dtype):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)  # fp32 statistics inside for every dtype
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps).to(out_dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    """fp32 from the input to the one rounding at the end."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps)
    return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(out_dtype or x.dtype)
