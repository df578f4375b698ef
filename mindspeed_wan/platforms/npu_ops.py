"""The fused kernels of torch_npu behind the functions of ``platforms/ops.py``.

Written against the operators' registered schemas (``torch.ops.npu``), which tests define on the CPU with reference
kernels behind them. Sequence-first ``[L, B, N, D]`` is the kernels' ``SBH`` layout without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.platforms import reference


def _npu() -> Any:
    return torch.ops.npu


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused attention, differentiable, no mask, no dropout."""
    out = _npu().npu_fusion_attention(q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2], "SBH", scale=scale)[0]
    return out.view(q.shape)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fused attention; the kernel's softmax max and sum ``[B, N, L, 8]`` (8 equal values) give the log-sum-exp."""
    out, softmax_max, softmax_sum = _npu().npu_fusion_attention(
        q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2], "SBH", scale=scale
    )[:3]
    return out.view(q.shape), softmax_max[..., 0] + softmax_sum[..., 0].log()


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the merged ``out`` and ``lse``.

    The kernel recomputes P = exp(S - max) / sum; with max = lse and sum = 1 that is exp(S - lse), P over all keys.
    """
    softmax_max = lse.float()[..., None].expand(*lse.shape, 8).contiguous()
    grads = _npu().npu_fusion_attention_grad(
        q.flatten(2),
        k.flatten(2),
        v.flatten(2),
        grad_out.flatten(2),
        q.shape[2],
        "SBH",
        softmax_max=softmax_max,
        softmax_sum=torch.ones_like(softmax_max),
        attention_in=out.flatten(2),
        scale_value=scale,
    )
    dq, dk, dv = grads[:3]
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Fused RMS norm; a weight of another dtype makes the computation fp32, as in the reference."""
    if weight.dtype == x.dtype:
        return _npu().npu_rms_norm(x, weight, epsilon=eps)[0]
    return _npu().npu_rms_norm(x.float(), weight.float(), epsilon=eps)[0].to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Fused interleaved rotation in fp32: the kernel wants one dtype, and bf16 tables would turn by a wrong angle."""
    return _npu().npu_rotary_mul(x.float().contiguous(), cos, sin, rotary_mode="interleave").to(x.dtype)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """One after the other."""
    return rotary(rms_norm(x, weight, eps).unflatten(-1, (-1, cos.shape[-1])), cos, sin)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """Fused layer norm where no gradient is needed, else torch's own (which the NPU differentiates)."""
    if _needs_grad(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps, out_dtype)
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    out = _npu().npu_layer_norm_eval(x.float(), [x.shape[-1]], weight=weight, bias=bias, eps=eps)
    return out.to(out_dtype or x.dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    """LN(x) * (1 + scale) + shift is a layer norm with weight 1 + scale and bias shift, if all tokens share them."""
    width = x.shape[-1]
    if scale.numel() != width or shift.numel() != width or _needs_grad(x, scale, shift):
        return reference.modulated_layer_norm(x, scale, shift, eps, out_dtype)
    weight, bias = 1 + scale.float().view(width), shift.float().view(width)
    out = _npu().npu_layer_norm_eval(x.float(), [width], weight=weight, bias=bias, eps=eps)
    return out.to(out_dtype or x.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
