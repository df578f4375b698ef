"""Local shards seen as pieces of the global tensors: what checkpoints read and write (design D7).

Parameters are Megatron's plain tensor-parallel shards, possibly sharded again by FSDP2. For a checkpoint each is
re-viewed, without a copy, as a DTensor on the mesh ordered (tensor, [replicate,] shard) with placements
``[Shard(d) | Replicate, ...FSDP's own]``. torch's DCP then writes global tensors that any layout can load. Saving the
local shards as they are would let tensor ranks overwrite each other's halves, without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mindspeed_wan.parallel.dtensor import piece_of
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.layout import ParamLayout


def global_views(model: nn.Module, groups: ParallelGroups | None = None) -> dict[str, Tensor]:
    """Return every parameter as its piece of the global tensor, by name. Storage is shared: loading fills the model.

    On one rank without FSDP2 these are the parameters themselves (detached).
    """
    layouts: dict[str, ParamLayout] = model.param_layout  # type: ignore[assignment]
    return {name: global_view(p.detach(), layouts[name], groups) for name, p in model.named_parameters()}


def global_view(tensor: Tensor, layout: ParamLayout, groups: ParallelGroups | None) -> Tensor:
    """Return one parameter, or an optimizer state of its shape, as a piece of the global tensor.

    Scalars (an optimizer's step count) are returned as they are.
    """
    if groups is None or groups.mesh is None or tensor.dim() == 0:
        return tensor
    inner: tuple[Placement, ...]
    if isinstance(tensor, DTensor):
        inner, local = tensor.placements, tensor.to_local()
    else:
        inner, local = (Replicate(),) * (groups.mesh.ndim - 1), tensor
    outer: Placement = Replicate() if layout.tp_axis is None else Shard(layout.tp_axis)
    shape = list(tensor.shape)
    if layout.tp_axis is not None:
        shape[layout.tp_axis] *= groups.dims.tensor
    stride = torch.empty(shape, device="meta").stride()
    return piece_of(local, groups.mesh, (outer, *inner), shape=shape, stride=stride)


def local_slices(view: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the local storage of a global view and where it lies in the global tensor (may be empty)."""
    if not isinstance(view, DTensor):
        return view, tuple(slice(0, size) for size in view.shape)
    sizes, offsets = compute_local_shape_and_global_offset(view.shape, view.device_mesh, view.placements)
    return view.to_local(), tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))
