"""Differentiable collectives on dim 0, each with its maths written out.

R is the group size, x_r rank r's tensor, g_r the gradient that arrives at rank r. ``group=None`` is a group of one:
every function is then the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Megatron's own mapping reduces `grad.contiguous()` and returns `grad`: a transposed gradient stays local.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def copy_to_group(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Hand a replicated tensor to ranks that each use it in their own way.

    Forward: x. Backward: sum over r of g_r, on every rank.
    """
    return x if group is None else _CopyToGroup.apply(x, group)


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_group(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a value that every rank goes on to use differently (the norm over all heads).

    Forward: sum over r of x_r, on every rank. Backward: sum over r of g_r, on every rank.
    """
    return x if group is None else _SumOverGroup.apply(x, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scale: float) -> Tensor:
        ctx.group, ctx.scale = group, scale
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mine = grad.chunk(ctx.group.size())[ctx.group.rank()]
        return (mine * ctx.scale if ctx.scale != 1 else mine.contiguous()), None, None


def gather_tokens(x: Tensor, group: dist.ProcessGroup | None, *, grad_scale: float = 1.0) -> Tensor:
    """Assemble shards for a result that every rank computes in the same way (the loss).

    ``[L/R, ...] -> [L, ...]``. Forward: concatenation in rank order. Backward: this rank's slice of g, times
    ``grad_scale``; no communication, because the g_r are equal.
    """
    return x if group is None else _GatherTokens.apply(x, group, grad_scale)


class _EnterTensorRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


def gather_for_tensor_region(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Assemble sequence shards for layers that hold different columns of a weight on each rank.

    ``[L/R, ...] -> [L, ...]``. Forward: concatenation. Backward: this rank's slice of the sum over r of g_r
    (a reduce-scatter).
    """
    return x if group is None else _EnterTensorRegion.apply(x, group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate ``[L/R, ...]`` shards along dim 0 in rank order, without autograd."""
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        mine = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
        dist.reduce_scatter_tensor(mine, x.contiguous(), group=group)
        return mine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group), None


def sum_parts(x: Tensor, group: dist.ProcessGroup | None, *, scatter: bool = False) -> Tensor:
    """Add up what layers that hold different input columns of a weight computed: the end of a tensor region.

    Forward: sum over r of x_r on every rank, backward: identity, because what follows is the same on every rank. With
    ``scatter`` (sequence parallelism) ``[L, ...] -> [L/R, ...]``, this rank's tokens of the sum; backward: all-gather.
    """
    if group is None:
        return x
    return _ScatterParts.apply(x, group) if scatter else _SumParts.apply(x, group)
