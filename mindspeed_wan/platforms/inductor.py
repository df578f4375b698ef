"""The norms and the rotary embedding as kernels that torch.compile makes from the reference formulas.

On CUDA each of adaLN, layer norm, RMS norm and "RMS norm, then rotation" of q or k becomes one or two Triton kernels,
where PyTorch's own operators read and write the activations once per step of the formula; on a CPU it is a C++ loop.
For blocks that are not compiled as a whole: inside ``--compile`` the reference formulas fuse with more. Used where
``MINDSPEED_WAN_KERNELS=inductor`` asks for it: as long as no GPU has run these kernels, none gets them unasked.

A function is compiled at its first use, and once more when the number of tokens changes for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.platforms import reference


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _run(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args) if torch.compiler.is_compiling() else _compiled(function)(*args)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``ops.rms_norm``."""
    return _run(reference.rms_norm, x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``ops.rotary``."""
    return _run(reference.rotary, x, cos, sin)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``ops.rms_norm_rotary``."""
    return _run(reference.rms_norm_rotary, x, weight, eps, cos, sin)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """See ``ops.layer_norm``."""
    return _run(reference.layer_norm, x, weight, bias, eps, out_dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    """See ``ops.modulated_layer_norm``."""
    return _run(reference.modulated_layer_norm, x, scale, shift, eps, out_dtype)
