"""Which self-attention a layout uses. All of them answer to ``ContextAttention``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.ring import RingAttention
from mindspeed_wan.parallel.ulysses import ContextAttention, LocalAttention, UlyssesAttention


def make_attention(groups: ParallelGroups, chunks: int = 1) -> ContextAttention:
    """Return attention over this layout's context ranks: local, Ulysses, ring, or a ring of Ulysses groups.

    ``chunks`` groups of heads overlap exchange and attention (pure Ulysses).
    """
    if groups.ring is None:
        return LocalAttention() if groups.ulysses is None else UlyssesAttention(groups.ulysses, chunks=chunks)
    ring = RingAttention(groups.ring)
    # A ring's transfers would have to share the links with the exchange of the next heads: one at a time.
    return ring if groups.ulysses is None else UlyssesAttention(groups.ulysses, ring, chunks=1)


class Untraced:
    """An attention that compiled blocks call as it is, between two graphs.

    Left to itself, torch.compile would make graphs of the pieces between the transfers, one for each step of a ring.
    """

    traceable = False

    def __init__(self, attend: ContextAttention) -> None:
        self._attend, self._call = attend, _outside_graphs()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Attend as the wrapped attention does."""
        return self._call(self._attend, q, k, v, length)


@cache
def _outside_graphs() -> Callable[[ContextAttention, Tensor, Tensor, Tensor, int], Tensor]:
    """Return one function for all blocks and both experts: graphs are guarded by it. Made late: it imports Dynamo."""
    return torch.compiler.disable(_attend)


def _attend(attend: ContextAttention, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    return attend(q, k, v, length=length)
