"""The five tensor operations that hardware wants to do its own way, behind one set of functions.

The model calls ``attention``, ``rms_norm``, ``rotary``, ``layer_norm`` and ``modulated_layer_norm`` (the ring also
``attention_with_lse`` and its backward). Each call goes to the ``Kernels`` set in use: ``torch`` (PyTorch's own; CPU
and CUDA), ``inductor`` (kernels that torch.compile makes) or ``npu`` (fused kernels, ``platforms/npu.py``).
``Platform.activate`` chooses the set (``MINDSPEED_WAN_KERNELS`` overrides it on CPU and CUDA), ``use`` another one.

Layout everywhere: sequence first, ``[L, B, N, D]`` (tokens, batch, heads, channels of a head). Every result has the
dtype of ``x`` (or ``q``) unless ``out_dtype`` says otherwise; norms and rotations are computed in fp32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.platforms import attention as attention_kernels
from mindspeed_wan.platforms import eager
from mindspeed_wan.platforms.attention import AttentionGradients, AttentionResult


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation; the fields have the signatures of this module's functions."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm_rotary: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float, torch.dtype | None], Tensor]
    modulated_layer_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype | None], Tensor]
    attention_backend: str
    """The attention backend that ``auto`` means with this set."""


def _torch_kernels() -> Kernels:
    return Kernels(
        name="torch",
        rms_norm=eager.rms_norm,
        rotary=eager.rotary,
        rms_norm_rotary=eager.rms_norm_rotary,
        layer_norm=eager.layer_norm,
        modulated_layer_norm=eager.modulated_layer_norm,
        attention_backend="sdpa",
    )


def _npu_kernels() -> Kernels:
    from mindspeed_wan.platforms import npu_ops

    return Kernels(
        name="npu",
        rms_norm=npu_ops.rms_norm,
        rotary=npu_ops.rotary,
        rms_norm_rotary=npu_ops.rms_norm_rotary,
        layer_norm=npu_ops.layer_norm,
        modulated_layer_norm=npu_ops.modulated_layer_norm,
        attention_backend="npu",
    )


def _inductor_kernels() -> Kernels:
    from mindspeed_wan.platforms import inductor

    return Kernels(
        name="inductor",
        rms_norm=inductor.rms_norm,
        rotary=inductor.rotary,
        rms_norm_rotary=inductor.rms_norm_rotary,
        layer_norm=inductor.layer_norm,
        modulated_layer_norm=inductor.modulated_layer_norm,
        attention_backend="sdpa",
    )


KERNELS_VARIABLE = "MINDSPEED_WAN_KERNELS"

_KERNEL_SETS = {"torch": _torch_kernels, "inductor": _inductor_kernels, "npu": _npu_kernels}

_kernels = _torch_kernels()
_attention_backend = "auto"


class _Override:
    """What ``use`` and ``use_attention`` return: leaving it as a context restores what was in use before."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()


def use(name: str) -> _Override:
    """Use the kernel set ``torch``, ``inductor`` or ``npu`` from now on, or inside ``with use(name):`` only."""
    global _kernels
    if name not in _KERNEL_SETS:
        raise ConfigError(f"kernel set '{name}' does not exist", fix=f"choose one of {', '.join(_KERNEL_SETS)}")
    previous, _kernels = _kernels, _KERNEL_SETS[name]()
    return _Override(lambda: _restore(kernels=previous))


def use_attention(name: str, *, needs_grad: bool = False) -> _Override:
    """Use an attention backend (``auto`` or a name of ``platforms.attention.BACKENDS``) from now on.

    ``auto`` is what the kernel set in use prefers. Raises ``ConfigError`` for an unknown name, for a library that is
    not installed, and for a backend without a backward when ``needs_grad``. Also a context manager, as ``use`` is.
    """
    global _attention_backend
    if name != "auto":
        attention_kernels.check_backend(name, needs_grad=needs_grad)
    previous, _attention_backend = _attention_backend, name
    return _Override(lambda: _restore(attention_backend=previous))


def _restore(*, kernels: Kernels | None = None, attention_backend: str | None = None) -> None:
    global _kernels, _attention_backend
    _kernels = kernels or _kernels
    _attention_backend = attention_backend or _attention_backend


def kernels_in_use() -> str:
    """Return the name of the kernel set in use (for logs and ``doctor``)."""
    return _kernels.name


def attention_in_use() -> str:
    """Return the attention backend in use, ``auto`` resolved."""
    return _kernels.attention_backend if _attention_backend == "auto" else _attention_backend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v, without a mask and without dropout.

    Args:
        q: ``[Lq, B, N, D]``; k, v: ``[Lk, B, N, D]``.
        scale: default ``1 / sqrt(D)``.
        kv_length: keys at this index and above are padding and are not attended to.
        backend: overrides ``use_attention`` for this call.

    Returns:
        ``[Lq, B, N, D]`` in ``q.dtype``.
    """
    if kv_length is not None and kv_length < k.shape[0]:
        k, v = k[:kv_length], v[:kv_length]
    kernel = attention_kernels.kernel(backend if backend not in (None, "auto") else attention_in_use())
    return kernel(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_length: int | None = None
) -> AttentionResult:
    """Return ``(out [Lq, B, N, D], lse [B, N, Lq] fp32)``: attention and the log of its softmax denominator.

    For the ring, which merges partial results by their ``lse`` and calls ``attention_backward`` itself: not
    differentiable. With no key to attend to, ``out`` is zero and ``lse`` is ``-inf``, the neutral element of a merge.
    """
    if kv_length is not None and kv_length < k.shape[0]:
        k, v = k[:kv_length], v[:kv_length]
    return attention_kernels.with_lse(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, attention_in_use())


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
    kv_length: int | None = None,
) -> AttentionGradients:
    """Return ``(dq, dk, dv)`` of one partial attention, given the *merged* ``out`` and ``lse`` over all keys.

    Shapes as in ``attention_with_lse``; ``dk`` and ``dv`` have the full length of ``k``, zero at padding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length = k.shape[0]
    if kv_length is not None and kv_length < length:
        k, v = k[:kv_length], v[:kv_length]
    dq, dk, dv = attention_kernels.backward(
        grad_out, q, k, v, out=out, lse=lse, scale=scale, backend=attention_in_use()
    )
    if dk.shape[0] < length:
        padding = (0, 0, 0, 0, 0, 0, 0, length - dk.shape[0])
        dk, dv = F.pad(dk, padding), F.pad(dv, padding)
    return dq, dk, dv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / rms(x) * weight`` over the last dim; ``weight`` is ``[x.shape[-1]]``."""
    return _kernels.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs ``(x[2i], x[2i+1])`` by the angle in ``cos``, ``sin``.

    Args:
        x: ``[L, B, N, D]``.
        cos, sin: ``[L, 1, 1, D]`` fp32, each value twice (``cos[..., 0::2] == cos[..., 1::2]``), as the NPU wants it.
    """
    return _kernels.rotary(x, cos, sin)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``rotary(rms_norm(x))``: q or k on its way into self-attention.

    Args:
        x: ``[L, B, N * D]``; the norm is over all of the last dim.
        weight: ``[N * D]``.
        cos, sin: as in ``rotary``.

    Returns:
        ``[L, B, N, D]`` in ``x.dtype``.
    """
    return _kernels.rms_norm_rotary(x, weight, eps, cos, sin)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return the layer norm over the last dim with an optional affine part."""
    return _kernels.layer_norm(x, weight, bias, eps, out_dtype)


def modulated_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``LN(x) * (1 + scale) + shift`` (adaLN); ``scale`` and ``shift`` broadcast against ``x [L, B, D]``.

    ``out_dtype`` lets an fp32 residual stream feed bf16 layers without a pass of its own.
    """
    return _kernels.modulated_layer_norm(x, scale, shift, eps, out_dtype)
