"""Attention kernels by name, and the kernels that also give the log-sum-exp for the ring.

``platforms/ops.py`` is the door; nothing else calls this file. A kernel takes sequence-first ``q [Lq, B, N, D]``,
``k, v [Lk, B, N, D]`` and a scale. The libraries behind ``flash2``, ``flash3`` and ``sage`` are
imported when asked for. ``sdpa`` lets PyTorch choose among its own kernels, the ``torch_`` names choose for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mindspeed_wan.errors import ConfigError, did_you_mean

AttentionKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
AttentionResult = tuple[Tensor, Tensor]
"""``(out [Lq, B, N, D], lse [B, N, Lq] fp32)``."""
AttentionGradients = tuple[Tensor, Tensor, Tensor]
"""``(dq, dk, dv)`` with the shapes of q, k, v."""

QUERY_CHUNK = 1024
"""Queries per block of the plain-maths fallback: bounds its ``[B, N, chunk, Lk]`` score matrix."""


def heads_first(x: Tensor) -> Tensor:
    """View ``[L, B, N, D]`` as ``[B, N, L, D]``."""
    return x.permute(1, 2, 0, 3)


def sequence_first(x: Tensor) -> Tensor:
    """View ``[B, N, L, D]`` as ``[L, B, N, D]``."""
    return x.permute(2, 0, 1, 3)


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention: every device, every dtype, differentiable."""
    q, k, v = heads_first(q), heads_first(k), heads_first(v)
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # Each block of queries reads a head's keys and values again: 1.2 times as fast where its rows are adjacent.
        k, v = k.contiguous(), v.contiguous()
    return sequence_first(F.scaled_dot_product_attention(q, k, v, scale=scale))


def _chosen_sdpa(backend: SDPBackend) -> AttentionKernel:
    """Return PyTorch's attention with one of its kernels and no other."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, scale)

    return attention


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """cuDNN's attention inside PyTorch (Hopper and later, bf16/fp16); other dtypes go to ``sdpa``."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return sdpa(q, k, v, scale)
    needs_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        heads_first(q), heads_first(k), heads_first(v), None, needs_lse, scale=scale
    )[0]
    return sequence_first(out)


def flash2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FlashAttention 2 of the ``flash-attn`` package (CUDA, bf16/fp16)."""
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    return _batch_first(flash_attn_func(*map(_batch_first, (q, k, v)), softmax_scale=scale))


def flash3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FlashAttention 3 (``flash_attn_interface``; Hopper, bf16/fp16)."""
    flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func
    out = flash_attn_func(*map(_batch_first, (q, k, v)), softmax_scale=scale)
    return _batch_first(out[0] if isinstance(out, tuple) else out)  # early releases also return the lse


def sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SageAttention 2 (CUDA, quantised q and k): inference only, it has no backward."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise _no_backward("sage")
    sageattn = importlib.import_module("sageattention").sageattn
    out = sageattn(*map(_batch_first, (q, k, v)), tensor_layout="NHD", is_causal=False, sm_scale=scale)
    return _batch_first(out)


def npu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch_npu's fused attention."""
    from mindspeed_wan.platforms import npu_ops

    return npu_ops.attention(q, k, v, scale)


@dataclass(frozen=True)
class Backend:
    """An attention backend: its kernel, what must be importable, how to get it, whether it can train.

    Attributes:
        devices: torch device types it runs on; empty means all.
        half_only: takes bf16 and fp16 only (on CUDA).
    """

    kernel: AttentionKernel
    module: str | None = None
    install: str | None = None
    has_backward: bool = True
    devices: tuple[str, ...] = ()
    half_only: bool = False


_CUDA = ("cuda",)
BACKENDS = {
    "sdpa": Backend(sdpa),
    "torch_flash": Backend(_chosen_sdpa(SDPBackend.FLASH_ATTENTION), devices=("cuda", "cpu"), half_only=True),
    "torch_efficient": Backend(_chosen_sdpa(SDPBackend.EFFICIENT_ATTENTION), devices=_CUDA),
    "torch_math": Backend(_chosen_sdpa(SDPBackend.MATH)),
    "cudnn": Backend(cudnn, devices=_CUDA, half_only=True),
    "flash2": Backend(flash2, "flash_attn", "pip install flash-attn --no-build-isolation", devices=_CUDA,
                      half_only=True),
    "flash3": Backend(flash3, "flash_attn_interface", "build it from the hopper folder of flash-attention",
                      devices=_CUDA, half_only=True),
    "sage": Backend(sage, "sageattention", "build SageAttention 2 from source", has_backward=False, devices=_CUDA,
                    half_only=True),
    "npu": Backend(npu, "torch_npu", "pip install torch_npu (needs CANN)", devices=("npu",)),
}


def _no_backward(name: str) -> ConfigError:
    return ConfigError(
        f"attention backend '{name}' has no backward and cannot train",
        fix="use auto, sdpa, cudnn, flash2 or flash3 for training; keep it for inference",
    )


def check_backend(name: str, *, needs_grad: bool) -> None:
    """Raise ``ConfigError`` if the backend is unknown, not installed, or cannot train although it has to."""
    backend = BACKENDS.get(name)
    if backend is None:
        known = ("auto", *BACKENDS)
        raise ConfigError(
            f"attention backend '{name}' does not exist",
            fix=f"{did_you_mean(name, known)} choose one of {', '.join(known)}".strip(),
        )
    if needs_grad and not backend.has_backward:
        raise _no_backward(name)
    if name == "npu" and hasattr(torch.ops.npu, "npu_fusion_attention"):
        return  # the operators are what counts; tests register them without the package
    if backend.module and importlib.util.find_spec(backend.module) is None:
        raise ConfigError(
            f"attention backend '{name}' needs the module '{backend.module}', which is not installed",
            fix=f"{backend.install}; or use auto",
        )


def check_device(name: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise ``ConfigError`` if the backend (a known one) does not run on a device or not with a dtype there."""
    backend = BACKENDS[name]
    if backend.devices and device_type not in backend.devices:
        legal = [known for known, other in BACKENDS.items() if not other.devices or device_type in other.devices]
        raise ConfigError(f"attention backend '{name}' runs on {' and '.join(backend.devices)}, not on {device_type}",
                          fix=f"use auto, {', '.join(legal)}")
    if backend.half_only and device_type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"attention backend '{name}' takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}",
                          fix="use auto, sdpa or torch_efficient, or another dtype")


def kernel(name: str) -> AttentionKernel:
    """Return the kernel of a checked backend name."""
    return BACKENDS[name].kernel


# --- attention with log-sum-exp: a partial result that a ring can merge ---------------------------------------------


def _flash_dtype(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> AttentionResult:
    """Attention and its log-sum-exp by the device's fused kernel, or by plain maths where there is none."""
    if k.shape[0] == 0:
        length, batch, heads = q.shape[:3]
        return torch.zeros_like(q), q.new_full((batch, heads, length), -math.inf, dtype=torch.float32)
    if backend == "npu":
        from mindspeed_wan.platforms import npu_ops

        return npu_ops.attention_with_lse(q, k, v, scale)
    qh, kh, vh = heads_first(q), heads_first(k), heads_first(v)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qh, kh, vh, scale=scale)
    elif q.device.type == "cuda" and _flash_dtype(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(qh, kh, vh, scale=scale)[:2]
    elif q.device.type == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(qh, kh, vh, None, True, scale=scale)[:2]
    else:
        out, lse = _maths_with_lse(qh, kh, vh, scale)
    return sequence_first(out), lse[..., : q.shape[0]].float()  # some kernels pad the rows of the lse


@torch.no_grad()
def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, scale: float, backend: str
) -> AttentionGradients:
    """Gradients of one partial attention from the merged ``out`` and ``lse``."""
    if k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if backend == "npu":
        from mindspeed_wan.platforms import npu_ops

        return npu_ops.attention_backward(grad_out, q, k, v, out=out, lse=lse, scale=scale)
    gh, qh, kh, vh, oh = map(heads_first, (grad_out, q, k, v, out))
    aten: Any = torch.ops.aten
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gh, qh, kh, vh, oh, lse.to(_cpu_lse_dtype(q)), 0.0, False, scale=scale
        )
    elif q.device.type == "cuda" and _flash_dtype(q):
        unused = torch.empty(0, dtype=torch.int64, device="cpu")  # philox state: read only with dropout
        grads = aten._scaled_dot_product_flash_attention_backward(
            gh, qh, kh, vh, oh, lse.contiguous(), None, None, q.shape[0], k.shape[0], 0.0, False, unused, unused,
            scale=scale,
        )  # fmt: skip
    else:
        grads = _maths_backward(gh, qh, kh, vh, out=oh, lse=lse, scale=scale)
    dq, dk, dv = map(sequence_first, grads[:3])
    return dq, dk, dv


def _cpu_lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _maths_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionResult:
    """Heads-first attention in fp32 by blocks of queries, for devices without a fused kernel."""
    outs, lses = [], []
    for block in q.float().split(QUERY_CHUNK, dim=2):
        scores = block @ k.float().transpose(-1, -2) * scale
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ v.float()).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _maths_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, scale: float
) -> AttentionGradients:
    """Heads-first gradients in fp32: P = exp(S - lse), dS = P * (dO V^T - rowsum(dO * O))."""
    k32, v32 = k.float(), v.float()
    dq, dk, dv = [], torch.zeros_like(k32), torch.zeros_like(v32)
    blocks = (x.split(QUERY_CHUNK, dim=2) for x in (grad_out.float(), q.float(), out.float(), lse.float()))
    for grad_block, q_block, out_block, lse_block in zip(*blocks, strict=True):
        probabilities = (q_block @ k32.transpose(-1, -2) * scale - lse_block[..., None]).exp()
        dv += probabilities.transpose(-1, -2) @ grad_block
        correction = (grad_block * out_block).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_block @ v32.transpose(-1, -2) - correction) * scale
        dk += grad_scores.transpose(-1, -2) @ q_block
        dq.append((grad_scores @ k32).to(q.dtype))
    return torch.cat(dq, 2), dk.to(k.dtype), dv.to(v.dtype)
