"""From the gradients autograd left to the gradients the optimizer steps on: reduce what is left, measure, clip.

After the backward pass a gradient (``gradient(parameter)``) is
- a DTensor, already averaged over data x context by FSDP2, or a plain tensor that nobody averaged yet;
- for parameters marked ``tp_partial`` (see ``ParamLayout``), only this tensor rank's part of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_wan.errors import ParallelError
from mindspeed_wan.parallel.dtensor import local
from mindspeed_wan.parallel.groups import ParallelGroups, group_size
from mindspeed_wan.parallel.layout import ParamLayout

BUCKET_ELEMENTS = 64 * 1024 * 1024
"""Gradients are reduced in flat buffers of at most this many elements."""


def accumulate_in_fp32(model: nn.Module) -> None:
    """Add up the gradients of trained parameters that are not fp32 in fp32 tensors of their own.

    torch keeps a gradient in its parameter's dtype; the sum over many micro-batches would lose digits in bf16. Call
    it on a model that has memory.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.register_post_accumulate_grad_hook(_move_to_fp32)


def _move_to_fp32(parameter: Tensor) -> None:
    assert parameter.grad is not None
    kept: Tensor | None = getattr(parameter, "fp32_grad", None)
    parameter.fp32_grad = parameter.grad.float() if kept is None else kept.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def gradient(parameter: Tensor) -> Tensor | None:
    """Return what the backward passes left for ``parameter``: its fp32 sum, or ``parameter.grad``."""
    kept: Tensor | None = getattr(parameter, "fp32_grad", None)
    return parameter.grad if kept is None else kept


def drop_gradient(parameter: Tensor) -> None:
    """Free the gradient of ``parameter``."""
    parameter.grad = None
    if hasattr(parameter, "fp32_grad"):
        parameter.fp32_grad = None


@torch.no_grad()
def finish_grads(model: nn.Module, groups: ParallelGroups, max_norm: float) -> float:
    """Finish every gradient of ``model``, clip them to ``max_norm`` and return the total norm before clipping.

    The norm counts each element of the global model once: replicas of tensor parallelism and of hybrid sharding are
    not added up. ``max_norm`` 0 or below does not clip. NaN and infinity are returned, not raised.
    """
    found = ((name, gradient(p)) for name, p in model.named_parameters())
    grads = {name: grad for name, grad in found if grad is not None}
    layouts = _layouts(model, grads, groups)
    _undo_gloo_sum(model, grads)
    plain = [g for g in grads.values() if not isinstance(g, DTensor)]
    _all_reduce(plain, groups.dp_cp, divide_by=group_size(groups.dp_cp))
    _all_reduce([local(g) for name, g in grads.items() if layouts[name].tp_partial], groups.tp)
    total = _total_norm(grads, layouts, groups)
    if max_norm > 0:
        _scale([local(g) for g in grads.values()], min(1.0, max_norm / (total + 1e-6)))
    return total


def _layouts(model: nn.Module, grads: dict[str, Tensor], groups: ParallelGroups) -> dict[str, ParamLayout]:
    known: dict[str, ParamLayout] = getattr(model, "param_layout", {})
    unknown = [name for name in grads if name not in known]
    if unknown and groups.tp is not None:
        raise ParallelError(
            f"no tensor-parallel layout for {len(unknown)} trained parameters, first {unknown[:3]}",
            fix="add them to model.param_layout where they are created",
        )
    return {name: known.get(name, ParamLayout()) for name in grads}


def _undo_gloo_sum(model: nn.Module, grads: dict[str, Tensor]) -> None:
    scale = getattr(model, "grad_scale", 1.0)
    if scale != 1.0:
        _scale([local(g) for g in grads.values() if isinstance(g, DTensor)], scale)


def _scale(tensors: list[Tensor], factor: float) -> None:
    if tensors and factor != 1.0:
        torch._foreach_mul_(tensors, factor)


def _all_reduce(tensors: list[Tensor], group: dist.ProcessGroup | None, *, divide_by: int = 1) -> None:
    """Sum ``tensors`` over ``group`` in place, a few flat buffers at a time.

    A copy into a flat buffer also makes every tensor contiguous, and the division is ours: gloo has no average.
    """
    if group is None:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        if divide_by > 1:
            flat /= divide_by
        for tensor, reduced in zip(bucket, flat.split([t.numel() for t in bucket])):
            tensor.copy_(reduced.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    buckets = []
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        for tensor in same:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
                buckets.append(bucket)
                bucket = []
            bucket.append(tensor)
        buckets.append(bucket)
    return buckets


def _total_norm(grads: dict[str, Tensor], layouts: dict[str, ParamLayout], groups: ParallelGroups) -> float:
    """Sum squares by who holds distinct elements: (FSDP shard or not) x (tensor shard or not), then reduce each.

    Pipeline stages hold different parameters: their sums are added up last.
    """
    if not grads and groups.mesh is None:
        return 0.0
    device = local(next(iter(grads.values()))).device if grads else groups.mesh.device_type  # type: ignore[union-attr]
    sums = torch.zeros(2, 2, device=device)  # [sharded by FSDP, sharded by tensor parallel]
    for by_fsdp in (0, 1):
        for by_tensor in (0, 1):
            chosen = [
                local(g)
                for name, g in grads.items()
                if _is_fsdp_shard(g) == bool(by_fsdp) and (layouts[name].tp_axis is not None) == bool(by_tensor)
            ]
            if chosen:
                norms = torch._foreach_norm(chosen, 2, dtype=torch.float32)
                sums[by_fsdp, by_tensor] = torch.stack(norms).square().sum()
    if groups.shard is not None:
        dist.all_reduce(sums[1], group=groups.shard)  # over one copy of the parameters, not over its replicas
    if groups.tp is not None:
        split = sums[:, 1].contiguous()
        dist.all_reduce(split, group=groups.tp)
        sums[:, 1] = split
    if groups.pp is not None:
        dist.all_reduce(sums, group=groups.pp)
    return math.sqrt(sums.sum().item())


def _is_fsdp_shard(grad: Tensor) -> bool:
    return isinstance(grad, DTensor) and any(placement.is_shard() for placement in grad.placements)
