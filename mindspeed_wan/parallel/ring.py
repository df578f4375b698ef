"""Attention over context ranks by passing keys and values around a ring.

Every rank keeps its queries; keys and values visit all ranks. Partial results are merged by their log-sum-exp, so the
outcome is exact attention. No head count limits the ring's size, which is why it is the outer part of the hybrid
(Ulysses inside a node, ring between nodes).

R ranks, this rank is r; chunk c holds the tokens of rank c. In step i rank r works on chunk r - i. Bytes sent per
rank, with x the bytes of one ``[Lc, B, N, D]`` tensor: 2 (R - 1) x forward (k, v), 4 (R - 1) x backward (k, v again,
and the growing dk, dv). That is the least: every rank needs every other chunk, every chunk's gradient has R - 1
contributions from elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.platforms import ops


class RingAttention:
    """Tokens are spread over ``group`` in rank order, the same number on each rank."""

    traceable = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return ``[Lc, B, N, D]``; of all R * Lc tokens, those from ``length`` on are padding."""
        return _RingAttention.apply(self.group, length, q, k, v)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ring = _Ring(group, length, q.shape[0])
        own = kv = torch.stack((k, v))
        out: Tensor | None = None
        lse = q.new_empty(0)
        for step in range(ring.size):
            coming = ring.pass_on(kv) if step + 1 < ring.size else None
            if ring.keys(step):
                part, part_lse = ops.attention_with_lse(q, kv[0], kv[1], kv_length=ring.keys(step))
                out, lse = (part.float(), part_lse) if out is None else _merge(out, lse, part, part_lse)
            kv = coming.wait() if coming is not None else kv
        assert out is not None  # chunk 0 is never empty
        result = out.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, own, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, own, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad, kv = grad.contiguous(), own
        dq = torch.zeros_like(q, dtype=torch.float32)
        own_part = kv  # this rank's part of its own chunk's dk, dv: never sent (set in step 0)
        arriving: _Passing | None = None  # dk, dv of the chunk of the next step, summed over the ranks before this one
        for step in range(ring.size):
            coming = ring.pass_on(kv) if step + 1 < ring.size else None
            if ring.keys(step):
                part_q, part_k, part_v = ops.attention_backward(
                    grad, q, kv[0], kv[1], out=out, lse=lse, kv_length=ring.keys(step)
                )
                dq += part_q
                part = torch.stack((part_k, part_v))
            else:
                part = torch.zeros_like(kv)
            if step == 0:
                own_part = part
            else:
                arriving = ring.pass_on(part if arriving is None else arriving.wait() + part)
            kv = coming.wait() if coming is not None else kv
        dkv = own_part if arriving is None else arriving.wait() + own_part
        return None, None, dq.to(q.dtype), dkv[0], dkv[1]


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two softmax-weighted means ``[L, B, N, D]`` by the logs of their denominators ``[B, N, L]``."""
    total = torch.logaddexp(lse, part_lse)
    return out * _per_token((lse - total).exp()) + part * _per_token((part_lse - total).exp()), total


def _per_token(weight: Tensor) -> Tensor:
    return weight.permute(2, 0, 1).unsqueeze(-1)


class _Ring:
    """Neighbours, and how many keys of each chunk are not padding."""

    def __init__(self, group: dist.ProcessGroup, length: int, chunk: int) -> None:
        self.group, self.length, self.chunk = group, length, chunk
        self.rank, self.size = group.rank(), group.size()
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def keys(self, step: int) -> int:
        """Return the valid keys of the chunk this rank works on in ``step``."""
        start = (self.rank - step) % self.size * self.chunk
        return min(max(self.length - start, 0), self.chunk)

    def pass_on(self, tensor: Tensor) -> _Passing:
        """Start sending ``tensor`` to the next rank and receiving its like from the previous one.

        All ranks start their passes in the same order, so messages between two ranks cannot be mixed up.
        """
        return _Passing(tensor.contiguous(), self)


class _Passing:
    """A transfer under way; holds what is sent until it has left."""

    def __init__(self, tensor: Tensor, ring: _Ring) -> None:
        self._sent, self._received = tensor, torch.empty_like(tensor)
        self._requests = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, self._sent, ring.next, ring.group),
            dist.P2POp(dist.irecv, self._received, ring.previous, ring.group),
        ])

    def wait(self) -> Tensor:
        """Return what the previous rank sent."""
        for request in self._requests:
            request.wait()
        return self._received
