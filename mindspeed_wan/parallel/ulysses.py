"""Attention over context ranks by exchanging heads for tokens (DeepSpeed-Ulysses).

Every rank holds some tokens of all heads; attention wants all tokens of some heads. One all-to-all moves q, k and v
together, one moves the output back. L tokens, B batch, N heads, D channels, U ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.platforms import ops


class ContextAttention(Protocol):
    """Full self-attention for q, k, v whose tokens may be spread over ranks."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return ``[L/C, B, N, D]`` from three tensors of that shape; tokens from ``length`` on are padding."""
        ...


class LocalAttention:
    """All tokens are here."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return attention over the first ``length`` keys."""
        return ops.attention(q, k, v, kv_length=length)


class UlyssesAttention:
    """Tokens are spread over ``group``; ``inner`` attends over what the exchange assembles (a ring, or all tokens)."""

    def __init__(self, group: dist.ProcessGroup, inner: ContextAttention | None = None) -> None:
        self.group = group
        self.inner = inner or LocalAttention()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """``[L/U, B, N, D] -> [L, B, N/U, D] -> attention -> [L/U, B, N, D]``."""
        q, k, v = _Exchange.apply(self.group, True, q, k, v)
        out = self.inner(q, k, v, length=length)
        return _Exchange.apply(self.group, False, out)[0]


class _Exchange(torch.autograd.Function):
    """Trade tokens for heads (``to_heads``) or back; the gradient takes the other way. Bytes sent: (U-1)/U of x."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.to_heads = group, to_heads
        return _move(tensors, group, to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *_move(grads, ctx.group, not ctx.to_heads))


def _move(tensors: tuple[Tensor, ...], group: dist.ProcessGroup, to_heads: bool) -> tuple[Tensor, ...]:
    return _tokens_to_heads(tensors, group) if to_heads else _heads_to_tokens(tensors, group)


def _tokens_to_heads(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """n x ``[L/U, B, N, D]`` -> n x ``[L, B, N/U, D]`` by one all-to-all."""
    ranks, count = group.size(), len(tensors)
    tokens, batch, heads, channels = tensors[0].shape
    # [U (destination), L/U, B, n, N/U, D]: after the exchange dim 0 is the source, that is the token chunk, so the
    # received buffer reads as [L, B, n, N/U, D] without another copy.
    send = tensors[0].new_empty(ranks, tokens, batch, count, heads // ranks, channels)
    for i, tensor in enumerate(tensors):
        send[:, :, :, i].copy_(tensor.unflatten(2, (ranks, heads // ranks)).permute(2, 0, 1, 3, 4))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1).unbind(2)


def _heads_to_tokens(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """n x ``[L, B, N/U, D]`` -> n x ``[L/U, B, N, D]`` by one all-to-all."""
    ranks, count = group.size(), len(tensors)
    tokens, batch, heads, channels = tensors[0].shape
    send = tensors[0].new_empty(ranks, tokens // ranks, batch, count, heads, channels)
    for i, tensor in enumerate(tensors):
        send[:, :, :, i].copy_(tensor.unflatten(0, (ranks, tokens // ranks)))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    # [U (head group), L/U, B, n, N/U, D] -> n x [L/U, B, U * N/U, D]
    return tuple(received[:, :, :, i].permute(1, 2, 0, 3, 4).flatten(2, 3) for i in range(count))
