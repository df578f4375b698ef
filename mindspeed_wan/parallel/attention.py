"""Which self-attention a layout uses. All of them answer to ``ContextAttention``."""

from __future__ import annotations

from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.ring import RingAttention
from mindspeed_wan.parallel.ulysses import ContextAttention, LocalAttention, UlyssesAttention


def make_attention(groups: ParallelGroups, chunks: int | None = None) -> ContextAttention:
    """Return attention over this layout's context ranks: local, Ulysses, ring, or a ring of Ulysses groups.

    ``chunks`` groups of heads overlap exchange and attention (pure Ulysses); ``None`` decides by device.
    """
    if groups.ring is None:
        return LocalAttention() if groups.ulysses is None else UlyssesAttention(groups.ulysses, chunks=chunks)
    ring = RingAttention(groups.ring)
    # A ring's transfers would have to share the links with the exchange of the next heads: one at a time.
    return ring if groups.ulysses is None else UlyssesAttention(groups.ulysses, ring, chunks=1)
