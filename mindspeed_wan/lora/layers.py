"""Adapters at run time: each linear layer keeps its weight and its name, a forward hook adds the low-rank updates.

A hook instead of a wrapper: base parameters are not renamed, so checkpoints, converters and FSDP2 see the model they
know, and unloading leaves nothing behind. The factors are ``<module>.lora_A.<adapter>.weight`` ``[rank, in]`` and
``<module>.lora_B.<adapter>.weight`` ``[out, rank]``, the names that PEFT and MindSpeed-MM use.

Tensor parallelism follows the base layer (R ranks, x the layer's input, y its output):

============= ==================== ===================== =========================================================
base          A                    B                     communication and gradients
============= ==================== ===================== =========================================================
column        whole                out split             none; each rank's dA is a part of the sum (its columns)
row           in split             whole                 A x is a part: summed over ranks, ``[L, B, rank]`` only;
                                                         with sequence parallelism the sum is scattered along L and
                                                         each rank's dB is a part (its tokens)
whole         whole                whole                 none; with sequence parallelism the head's and the patch
                                                         embedding's are parts
============= ==================== ===================== =========================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mindspeed_wan.lora.spec import LinearModule
from mindspeed_wan.models.wan.layers import Layers
from mindspeed_wan.parallel.layout import ParamLayout
from mindspeed_wan.parallel.mappings import sum_parts

LORA_A, LORA_B = "lora_A", "lora_B"


class Factor(nn.Module):
    """One matrix of an adapter."""

    def __init__(self, weight: Tensor, *, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)


@dataclass
class Setting:
    """How strongly one adapter acts: ``weight * scale * B A``, with dropout on the input while training.

    ``seed`` names the dropout mask of the micro-batch: recomputation then meets the mask of the first forward pass,
    tensor ranks agree, and a resumed run drops what the straight one would. ``None`` draws from torch's generator.
    """

    scale: float
    weight: float = 1.0
    dropout: float = 0.0
    seed: int | None = None


def _dropped(x: Tensor, setting: Setting) -> Tensor:
    if setting.seed is None:
        return F.dropout(x, setting.dropout)
    generator = torch.Generator(device=x.device).manual_seed(setting.seed)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= setting.dropout
    return x * kept / (1.0 - setting.dropout)


class LoraHook:
    """The adapters of one linear layer. Created by :func:`adapt`, found again by :func:`hook_of`."""

    def __init__(self, module: nn.Module, info: LinearModule, layers: Layers) -> None:
        self.info = info
        self.settings: dict[str, Setting] = {}
        self.group: dist.ProcessGroup | None = getattr(layers, "group", None)
        self.tensor_size, self.sequence_parallel = layers.tensor_size, layers.sequence_parallel
        module.add_module(LORA_A, nn.ModuleDict())
        module.add_module(LORA_B, nn.ModuleDict())
        self._handle: RemovableHandle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the updates of every adapter with a weight to the layer's output."""
        for name, setting in self.settings.items():
            if setting.weight != 0.0:
                output = output + self._update(module, name, setting, args[0].to(output.dtype))
        return output

    def _update(self, module: nn.Module, name: str, setting: Setting, x: Tensor) -> Tensor:
        down = getattr(module, LORA_A)[name].weight.to(x.dtype)
        up = getattr(module, LORA_B)[name].weight.to(x.dtype)
        if setting.dropout and module.training:
            x = _dropped(x, setting)
        hidden = F.linear(x, down)
        if self.info.tp_axis == 1 and self.group is not None:
            hidden = sum_parts(hidden, self.group, scatter=self.sequence_parallel)
        return F.linear(hidden * (setting.weight * setting.scale), up)

    def local_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B on this tensor rank."""
        in_features, out_features = self.info.in_features, self.info.out_features
        if self.info.tp_axis == 1:
            in_features //= self.tensor_size
        if self.info.tp_axis == 0:
            out_features //= self.tensor_size
        return (rank, in_features), (out_features, rank)

    def layouts(self) -> tuple[ParamLayout, ParamLayout]:
        """Return how tensor parallelism treats A and B (table in the module docstring)."""
        if self.info.tp_axis == 0:
            return ParamLayout(tp_partial=True), ParamLayout(tp_axis=0)
        if self.info.tp_axis == 1:
            return ParamLayout(tp_axis=1), ParamLayout(tp_partial=self.sequence_parallel)
        # Of the replicated layers these are applied to tokens; time and text branches are whole on every rank.
        partial = self.sequence_parallel and self.info.mm in ("patch_embedding", "head.head")
        return ParamLayout(tp_partial=partial), ParamLayout(tp_partial=partial)

    def add(self, module: nn.Module, name: str, down: Tensor, up: Tensor, setting: Setting, *, trainable: bool) -> None:
        """Put an adapter on the layer."""
        getattr(module, LORA_A)[name] = Factor(down, trainable=trainable)
        getattr(module, LORA_B)[name] = Factor(up, trainable=trainable)
        self.settings[name] = setting

    def remove(self, module: nn.Module, name: str) -> None:
        """Take an adapter off; with the last one the layer is as it was made."""
        del getattr(module, LORA_A)[name], getattr(module, LORA_B)[name], self.settings[name]
        if not self.settings:
            self._handle.remove()
            delattr(module, LORA_A)
            delattr(module, LORA_B)
            del module.__dict__["_lora_hook"]


def hook_of(module: nn.Module) -> LoraHook | None:
    """Return the adapters of a layer, ``None`` when it has none."""
    return module.__dict__.get("_lora_hook")


def adapt(module: nn.Module, info: LinearModule, layers: Layers) -> LoraHook:
    """Make a linear layer ready for adapters (once; further adapters share the hook)."""
    hook = hook_of(module)
    if hook is None:
        hook = LoraHook(module, info, layers)
        module.__dict__["_lora_hook"] = hook  # not an attribute: nn.Module would not know what to do with it
    return hook
