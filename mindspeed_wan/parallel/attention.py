"""Which self-attention a layout uses. All of them answer to ``ContextAttention``."""

from __future__ import annotations

from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.ring import RingAttention
from mindspeed_wan.parallel.ulysses import ContextAttention, LocalAttention, UlyssesAttention


def make_attention(groups: ParallelGroups) -> ContextAttention:
    """Return attention over this layout's context ranks: local, Ulysses, ring, or a ring of Ulysses groups."""
    inner: ContextAttention = LocalAttention() if groups.ring is None else RingAttention(groups.ring)
    return inner if groups.ulysses is None else UlyssesAttention(groups.ulysses, inner)
