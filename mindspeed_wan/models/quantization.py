"""Linear layers whose weights are held in 8 bits: rounding, the layer, and the numbers as a checkpoint sees them.

One storage for every mode, device, layout and memory mode: ``weight`` ``[out, in]`` int8 and ``weight_scale``
``[out, 1]``, so that w = code x scale of its row. Both are plain integer parameters on purpose:

- tensor parallelism cuts them as it cuts the weight (a row's scale is taken over the *whole* row, so every layout holds
  the same numbers), memory modes copy them, adapters and compiled blocks see an ordinary module;
- FSDP2 casts floating-point parameters to its compute type before gathering them, which would double the traffic and
  round the scales; integers it leaves alone. fp8 codes are therefore kept as their bits in int8, scales as theirs in
  int32.

fp8 scales are powers of two: products with them are exact, so what was fp8 before stays bit for bit what it was, and a
bf16 weight that is dequantised has no second rounding. int8 scales are max|row| / 127.

torchao is not the storage: its tensor subclasses stand for whole ``nn.Linear`` weights and have no rule for Megatron's
shards, streamed blocks or an NPU. ``benchmarks/quantization.py`` measures it beside this code, and the tests hold the
errors of both equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models.quantization_spec import SCALE_SUFFIX, Format, QuantizationSpec
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.views import global_views, local_slices
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.layout import ParamLayout
from mindspeed_wan.parallel.mappings import sum_parts

FP8 = torch.float8_e4m3fn
FP8_MAX, INT8_MAX = 448.0, 127.0
MIN_CAPABILITY = (8, 9)
"""CUDA compute capability from which matrix units multiply fp8."""

Change = Callable[[str, slice, slice, tuple[int, ...], torch.device], "Tensor | None"]
"""(MM name, rows, columns, whole shape, device) -> fp32 change of that part of a weight: adapters to merge."""


# ---- numbers ---------------------------------------------------------------------------------------------------------


def row_scales(rows: Tensor, format: Format) -> Tensor:
    """Return the scale of each row ``[out, in] -> [out, 1]`` fp32; a row of zeros gets 1.

    Raises:
        CheckpointError: a value that is not finite.
    """
    largest = rows.abs().amax(dim=1, keepdim=True).float()
    if not bool(largest.isfinite().all()):
        raise CheckpointError("a weight holds NaN or infinity, which 8 bits cannot", fix="use other weights")
    if format == "int8":
        scale = largest / INT8_MAX
    else:  # the smallest power of two that brings the row into +-448
        mantissa, exponent = torch.frexp(largest / FP8_MAX)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
        scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def encode(rows: Tensor, scales: Tensor, format: Format) -> Tensor:
    """Round ``rows / scales`` to 8 bits: ``[out, in]`` int8 (for fp8 the bits of e4m3)."""
    scaled = rows.float() / scales
    if format == "int8":
        return scaled.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.int8)


def decode(codes: Tensor, scales: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """Return ``code x scale`` in ``dtype``: codes are exact in bf16 and fp16, so it is rounded once."""
    if format == "int8":
        values = codes.to(dtype)
    elif codes.device.type == "cuda":
        values = codes.view(FP8).to(dtype)
    else:
        # A table of the 256 values: the CPU's cast of fp8 is three times slower, the NPU has no such dtype.
        table = torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype).to(codes.device)
        values = table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)
    return values.mul_(scales)


def scale_bits(scales: Tensor) -> Tensor:
    """Return fp32 scales as ``weight_scale`` holds them."""
    return scales.contiguous().view(torch.int32)


# ---- the layer -------------------------------------------------------------------------------------------------------


class _FrozenProduct(torch.autograd.Function):
    """``x W^T + b`` whose backward pass dequantises again: autograd would keep a bf16 copy of every weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: Format) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.format = format
        return F.linear(x, decode(codes, scales.view(torch.float32), format, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        weight = decode(codes, scales.view(torch.float32), ctx.format, grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1]) @ weight
        return rows.view(*grad.shape[:-1], weight.shape[1]), None, None, None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer in 8 bits, or this tensor rank's part of one.

    Args:
        like: the layer it replaces; its bias is taken over.
        format: of the weight.
        dynamic: round the activations to fp8 too (no gradient).
        group: tensor ranks over which the results are added up (row-parallel layers).
        scatter: give each of them its tokens of the sum (sequence parallelism).
    """

    bias: nn.Parameter | None

    def __init__(self, like: nn.Module, format: Format, *, dynamic: bool = False,
                 group: dist.ProcessGroup | None = None, scatter: bool = False) -> None:
        super().__init__()
        weight: Tensor = like.weight  # type: ignore[assignment]
        self.out_features, self.in_features = weight.shape
        self.format, self.dynamic, self.group, self.scatter = format, dynamic, group, scatter
        self.compute_dtype = weight.dtype
        self.weight = _frozen(torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
        self.weight_scale = _frozen(torch.empty((self.out_features, 1), dtype=torch.int32, device=weight.device))
        bias: Tensor | None = like.bias  # type: ignore[assignment]
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def scales(self) -> Tensor:
        """``[out, 1]`` fp32."""
        return self.weight_scale.view(torch.float32)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight ``[out, in]`` as the layer uses it."""
        return decode(self.weight, self.scales, self.format, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` in ``x``'s dtype."""
        if self.group is None:
            return self._product(x, self.bias)
        total = sum_parts(self._product(x, None), self.group, scatter=self.scatter)
        return total if self.bias is None else total + self.bias

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if self.dynamic:
            return fp8_product(x, self.weight, self.scales, bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self.weight, self.weight_scale, bias, self.format)
        return F.linear(x, self.dequantized(x.dtype), bias)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.format}{', dynamic' if self.dynamic else ''}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def fp8_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` with both factors in fp8: each token of ``x`` is scaled by its largest value.

    Row-wise scales go into the product where the kernel takes them (sm_90 and bf16); elsewhere they are applied to its
    result.
    """
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12)
    token = largest / FP8_MAX
    rounded = (rows.float() / token).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    weight = codes.view(FP8).t()  # column-major, as the kernel wants it
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0):
        out = torch._scaled_mm(rounded, weight, token, scales.t().contiguous(), bias=bias, out_dtype=x.dtype)
    else:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        plain = torch._scaled_mm(rounded, weight, one, one, out_dtype=torch.float32)
        out = (plain * token * scales.t()).to(x.dtype)
        out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], codes.shape[0])


# ---- a model ---------------------------------------------------------------------------------------------------------


def check_device(mode: str, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ConfigError: fp8 products without fp8 matrix units.
    """
    if mode != "fp8_dynamic":
        return
    weight_only = "use fp8_weight_only, which needs the same memory"
    if device.type != "cuda":
        raise ConfigError(f"fp8_dynamic needs fp8 matrix units (CUDA sm_89 or later); {device.type} has none",
                          fix=weight_only)
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ConfigError(f"fp8_dynamic needs compute capability 8.9 or later, this GPU has {capability[0]}."
                          f"{capability[1]}", fix=weight_only)


def quantize_layers(model: WanDiT, spec: QuantizationSpec) -> list[str]:
    """Replace the layers that ``spec`` names; their weights are undefined until they are loaded. Returns their names.

    Call it on the meta device (``build_wan(modify=...)``), before adapters are put on and FSDP2 shards the model.
    """
    group: dist.ProcessGroup | None = getattr(model.layers, "group", None)
    chosen = {name: param for name, param in spec.layers(model.config).items() if param.mm in model.param_layout}
    for name, param in chosen.items():  # of a pipeline stage: those it holds
        owner, _, leaf = name.rpartition(".")
        parent, is_row = model.get_submodule(owner), param.tp_axis == 1
        layer = QuantizedLinear(
            getattr(parent, leaf), spec.format, dynamic=spec.dynamic, group=group if is_row else None,
            scatter=is_row and model.layers.sequence_parallel,
        )
        setattr(parent, leaf, layer)
        # A row's scale belongs to the whole row: column-parallel ranks hold their rows', row-parallel ones all.
        model.param_layout[f"{name}.weight{SCALE_SUFFIX}"] = ParamLayout(tp_axis=0 if param.tp_axis == 0 else None)
    return list(chosen)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the layers in 8 bits by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


@torch.no_grad()
def quantize_linears(model: nn.Module, spec: QuantizationSpec) -> int:
    """Quantise the ``nn.Linear`` layers of a loaded model in place, one at a time (UMT5); returns how many."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in found:
        layer = QuantizedLinear(module, spec.format, dynamic=spec.dynamic)
        weight = module.weight.detach()
        scales = row_scales(weight, spec.format)
        layer.weight.copy_(encode(weight, scales, spec.format))
        layer.weight_scale.copy_(scale_bits(scales))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)
    return len(found)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters of ``model`` (this rank's, of any device)."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedView:
    """One weight in 8 bits as a loader sees it: the global shape, and where this rank's part of the numbers goes.

    Attributes:
        name: MM name of the weight.
        codes, scales: global views (``models.wan.views``) of the layer's two parameters.
        format: how they are stored.
        change: added to the values in fp32 before they are rounded (adapters that are merged).
    """

    name: str
    codes: Tensor
    scales: Tensor
    format: Format
    change: Change | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where to round: where the layer is, but on the CPU for devices that may lack fp8."""
        device = local_slices(self.codes)[0].device
        return device if device.type == "cuda" else torch.device("cpu")

    @property
    def rows(self) -> slice:
        """This rank's rows; all their columns are needed to scale them, whichever of them it keeps."""
        return local_slices(self.codes)[1][0]

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Quantise ``rows`` (this rank's, every column, any floating dtype) into the layer."""
        self.store(*self.encoded(rows.to(self.device)))

    @torch.no_grad()
    def encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's codes, and the scales, of ``rows`` without storing them."""
        (own, columns), device = local_slices(self.codes)[1], rows.device
        if self.change is not None:
            change = self.change(self.name, own, slice(0, self.shape[1]), tuple(self.shape), device)
            rows = rows if change is None else rows.float() + change
        scales = row_scales(rows, self.format)
        return encode(rows[:, columns], scales, self.format), scales

    @torch.no_grad()
    def store(self, codes: Tensor, scales: Tensor) -> None:
        """Put this rank's codes (int8, or e4m3 as a file holds them) and the fp32 scales of its rows in place."""
        local_slices(self.codes)[0].copy_(codes.view(torch.int8))
        local_slices(self.scales)[0].copy_(scale_bits(scales))


def weight_views(
    model: WanDiT, groups: ParallelGroups | None = None, *, change: Change | None = None
) -> dict[str, Tensor | QuantizedView]:
    """Return ``global_views`` for a loader: a layer in 8 bits is one ``QuantizedView`` under its weight's name."""
    views: dict[str, Tensor | QuantizedView] = dict(global_views(model, groups))
    for name, layer in quantized_layers(model):
        key = f"{name}.weight"
        codes, scales = views[key], views.pop(key + SCALE_SUFFIX)
        assert isinstance(codes, Tensor) and isinstance(scales, Tensor)
        views[key] = QuantizedView(key, codes, scales, layer.format, change)
    return views


def dequantized_state(model: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return the state dict of the unquantised model that computes the same (one rank; for comparisons)."""
    state = {name: p.detach() for name, p in model.named_parameters() if not name.endswith(f".weight{SCALE_SUFFIX}")}
    return {**state, **{f"{name}.weight": layer.dequantized(dtype) for name, layer in quantized_layers(model)}}
