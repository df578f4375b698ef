"""Published fp8 weights: which extra tensors their files hold and how they belong to the weights.

============================== ======================================== =============================================
published by                   beside an e4m3 ``x.weight``              also in the file
============================== ======================================== =============================================
ComfyUI (``fp8_scaled``)       ``x.scale_weight``, one fp32 number      marker ``scaled_fp8``, ``x.scale_input``
ComfyUI (newer)                ``x.weight_scale``, one fp32 number      ``x.comfy_quant``, ``x.input_scale``
lightx2v                       ``x.weight_scale``, one per output row   \
Kijai (``e4m3fn``, ``e5m2``)   nothing: the values themselves           \
============================== ======================================== =============================================

A value is code x scale. Scales of activations (``scale_input``) are not used: they are rounded token by token here, or
not at all. Names may carry ComfyUI's prefix ``model.diffusion_model.``. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from mindspeed_wan.errors import CheckpointError

MARKER = "scaled_fp8"
"""An (empty) tensor that says that every fp8 weight has a scale."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")


class _Tensor(Protocol):
    @property
    def code(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=_Tensor)


def common_prefix(names: Iterable[str]) -> str:
    """Return the prefix of ``PREFIXES`` that all names carry, or an empty string."""
    seen = [name for name in names if name != MARKER]
    return next((p for p in PREFIXES if seen and all(name.startswith(p) for name in seen)), "")


def split_scales(tensors: Mapping[str, T], where: Path) -> tuple[dict[str, T], dict[str, T]]:
    """Split a file's tensors (prefix removed) into the weights and, by the weight's name, the scales of fp8 weights.

    Files without fp8 come back unchanged, whatever their names.

    Raises:
        CheckpointError: a scale of another kind (per block of a weight), or a scaled file that lacks some.
    """
    fp8 = {name for name, tensor in tensors.items() if tensor.code.startswith("F8_") and name != MARKER}
    if not fp8:
        return dict(tensors), {}
    kept: dict[str, T] = {}
    scales: dict[str, T] = {}
    for name, tensor in tensors.items():
        module, dot, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        if name == MARKER or (weight in fp8 and dot + leaf in _UNUSED):
            continue
        if weight in fp8 and dot + leaf in _SCALES:
            scales[weight] = _checked(weight, tensors[weight], tensor, where)
        else:
            kept[name] = tensor
    missing = sorted(fp8 - scales.keys())
    if missing and (MARKER in tensors or scales):
        raise CheckpointError(f"{len(missing)} fp8 weights have no scale, others do: {', '.join(missing[:5])}",
                              where=str(where), fix="the file is incomplete; download it again")
    return kept, scales


def _checked(name: str, weight: _Tensor, scale: T, where: Path) -> T:
    count = math.prod(scale.shape)
    if scale.code not in ("F32", "BF16", "F16") or count not in (1, weight.shape[0] if weight.shape else 1):
        raise CheckpointError(
            f"the scale of {name} is {scale.code} {list(scale.shape)}; one number, or one per row of "
            f"{list(weight.shape)}, is read", where=str(where), fix="use an fp8 release with such scales, or bf16",
        )
    return scale
