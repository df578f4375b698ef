"""Attention over context ranks by exchanging heads for tokens (DeepSpeed-Ulysses).

Every rank holds some tokens of all heads; attention wants all tokens of some heads. One all-to-all moves q, k and v
together, one moves the output back. L tokens, B batch, N heads, D channels, U ranks. Inside, tensors of all heads are
``[L/U, B, U, N/U, D]``: dim 2 says which rank attends with the heads.

Where asked, the heads are worked off in groups ("chunks"), so that one group travels while another attends:

    exchange   in 1   in 2      out 1    out 2
    attention         group 1   group 2

Half of the exchange is hidden with two groups, each more hides less, and the backward pass mirrors the picture by
itself, because autograd runs the latest operation first. The bytes are the same, and so is every number: heads do not
mix.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.platforms import ops


class ContextAttention(Protocol):
    """Full self-attention for q, k, v whose tokens may be spread over ranks.

    Attributes:
        traceable: a compiled block can hold it in its graph; transfers beside the computation cannot be traced.
    """

    traceable: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return ``[L/C, B, N, D]`` from three tensors of that shape; tokens from ``length`` on are padding."""
        ...


class LocalAttention:
    """All tokens are here."""

    traceable = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return attention over the first ``length`` keys."""
        return ops.attention(q, k, v, kv_length=length)


class UlyssesAttention:
    """Tokens are spread over ``group``; ``inner`` attends over what the exchange assembles (a ring, or all tokens).

    Args:
        group: ranks that share the tokens.
        inner: default all tokens.
        chunks: groups of heads whose exchange overlaps the attention of others, at most the heads of a rank; 1 is one
            exchange, then attention.
    """

    def __init__(self, group: dist.ProcessGroup, inner: ContextAttention | None = None, *, chunks: int = 1) -> None:
        self.group = group
        self.inner = inner or LocalAttention()
        self.chunks = chunks
        self.traceable = chunks == 1 and self.inner.traceable

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """``[L/U, B, N, D] -> [L, B, N/U, D] -> attention -> [L/U, B, N, D]``."""
        q, k, v = (tensor.unflatten(2, (self.group.size(), -1)) for tensor in (q, k, v))
        chunks = min(self.chunks, q.shape[3])
        if chunks > 1:
            return self._overlapped(q, k, v, length, chunks).flatten(2, 3)
        q, k, v = _Exchange.apply(self.group, True, q, k, v)
        out = self.inner(q, k, v, length=length)
        return _Exchange.apply(self.group, False, out)[0].flatten(2, 3)

    def _overlapped(self, q: Tensor, k: Tensor, v: Tensor, length: int, chunks: int) -> Tensor:
        """Start the exchange of each group of heads before the attention of the one before it."""
        parts = zip(*(tensor.tensor_split(chunks, dim=3) for tensor in (q, k, v)))
        coming = _start(self.group, True, *next(parts))
        leaving = []
        for following in [*parts, None]:
            arrived = coming
            if following is not None:
                coming = _start(self.group, True, *following)
            out = self.inner(*_finish(arrived), length=length)
            leaving.append(_start(self.group, False, out))
        return torch.cat([_finish(transfer)[0] for transfer in leaving], dim=3)


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
    send = _packed(tensors, group.size(), to_heads)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return _unpacked(received, to_heads)


def _packed(tensors: tuple[Tensor, ...], ranks: int, to_heads: bool) -> Tensor:
    """Return ``[U (destination), L/U, B, n, N/U, D]`` from n x ``[L/U, B, U, N/U, D]``, or n x ``[L, B, N/U, D]``."""
    by_destination = [t.permute(2, 0, 1, 3, 4) if to_heads else t.unflatten(0, (ranks, -1)) for t in tensors]
    _, tokens, batch, heads, channels = by_destination[0].shape
    send = tensors[0].new_empty(ranks, tokens, batch, len(tensors), heads, channels)
    for i, tensor in enumerate(by_destination):
        send[:, :, :, i].copy_(tensor)
    return send


def _unpacked(received: Tensor, to_heads: bool) -> tuple[Tensor, ...]:
    """Return n x ``[L, B, N/U, D]``, or n x ``[L/U, B, U, N/U, D]``, from ``[U (source), L/U, B, n, N/U, D]``; views.

    Where heads are wanted the source is the chunk of tokens, and where tokens are wanted it is the group of heads.
    """
    if to_heads:
        return received.flatten(0, 1).unbind(2)
    return tuple(part.permute(1, 2, 0, 3, 4) for part in received.unbind(3))


# ---- the same exchange in two steps, with room for computation in between ------------------------------------------


class _Transfer:
    """One exchange under way; forward and backward each fill in theirs."""

    def __init__(self, group: dist.ProcessGroup, to_heads: bool) -> None:
        self.group, self.to_heads = group, to_heads
        self._sent: Tensor | None = None
        self._work: Any = None

    def start(self, tensors: tuple[Tensor, ...], to_heads: bool) -> Tensor:
        """Start sending; returns the buffer that fills."""
        self._sent = _packed(tensors, self.group.size(), to_heads)
        received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(received, self._sent, group=self.group, async_op=True)
        return received

    def wait(self) -> None:
        """Let what follows on the compute stream wait for the exchange."""
        self._work.wait()
        self._sent = self._work = None


def _start(group: dist.ProcessGroup, to_heads: bool, *tensors: Tensor) -> tuple[_Transfer, Tensor]:
    """Start one exchange of n tensors; ``_finish`` gives the result."""
    transfer = _Transfer(group, to_heads)
    return transfer, _Start.apply(transfer, *tensors)


def _finish(started: tuple[_Transfer, Tensor]) -> tuple[Tensor, ...]:
    transfer, received = started
    return _Finish.apply(transfer, received)


class _Start(torch.autograd.Function):
    """n tensors -> the buffer that fills; backward: the end of the gradient's way back."""

    @staticmethod
    def forward(ctx: Any, transfer: _Transfer, *tensors: Tensor) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(tensors, transfer.to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.transfer.wait()
        return (None, *_unpacked(grads[0], not ctx.transfer.to_heads))


class _Finish(torch.autograd.Function):
    """The buffer, once it is filled -> n tensors; backward: the start of the gradient's way back."""

    @staticmethod
    def forward(ctx: Any, transfer: _Transfer, received: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        transfer.wait()
        return _unpacked(received, transfer.to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.transfer.start(grads, not ctx.transfer.to_heads)
