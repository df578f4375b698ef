"""The norms and the rotary embedding for CPU and CUDA without a compiler: few passes over memory, same results.

Written for what PyTorch's own kernels do well: on one CPU core (``[2048, 1, 1536]``, fp32, forward and backward)
rotary takes 1.9 ms instead of 20 with the plain formulas of ``reference.py``, adaLN 3 instead of 12, RMS norm 6
instead of 21. Under ``torch.compile`` the plain formulas are used, which fuse.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.platforms import reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair as a complex number, its rotation as one complex product; in fp32."""
    if torch.compiler.is_compiling():
        return reference.rotary(x, cos, sin)
    turn = torch.complex(cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous())
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """PyTorch's fused layer norm; the CPU's takes fp32 weights with a bf16 input, which saves two copies."""
    if weight is not None and _takes_fp32_weights(x, out_dtype) and not torch.compiler.is_compiling():
        return F.layer_norm(x, (x.shape[-1],), weight.float(), None if bias is None else bias.float(), eps)
    return reference.layer_norm(x, weight, bias, eps, out_dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    """Where all tokens share scale and shift (one clip per pass), adaLN is a layer norm with weight ``1 + scale``."""
    width = x.shape[-1]
    if torch.compiler.is_compiling() or scale.numel() != width or shift.numel() != width:
        return reference.modulated_layer_norm(x, scale, shift, eps, out_dtype)
    weight, bias = (1 + scale.float()).view(width), shift.float().view(width)
    if _takes_fp32_weights(x, out_dtype):
        return F.layer_norm(x, (width,), weight, bias, eps)
    return F.layer_norm(x.float(), (width,), weight, bias, eps).to(out_dtype or x.dtype)


def _takes_fp32_weights(x: Tensor, out_dtype: torch.dtype | None) -> bool:
    if out_dtype not in (None, x.dtype):
        return False
    return x.dtype == torch.float32 or (x.device.type == "cpu" and x.dtype == torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CUDA has a fused kernel; on the CPU PyTorch's is a chain of operations whose backward takes ten passes."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """One after the other."""
    return rotary(rms_norm(x, weight, eps).unflatten(-1, (-1, cos.shape[-1])), cos, sin)


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps); dx = r (g w) - x r^3 mean(g w x); dw = sum(g x r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (length.square_().div_(width).add_(eps)).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x.float(), inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        grad, scale = grads[0].float(), weight.float()
        normed = torch.mul(x.float(), inverse)
        product = (grad * normed).reshape(-1, width)
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        mean = torch.mv(product, scale).div_(width).view(inverse.shape)
        grad_x = torch.mul(grad, scale).addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None
