"""Which self-attention a layout uses. All of them answer to ``ContextAttention``."""

from __future__ import annotations

from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.ulysses import ContextAttention, LocalAttention, UlyssesAttention


def make_attention(groups: ParallelGroups) -> ContextAttention:
    """Return attention over this layout's context ranks."""
    inner: ContextAttention = LocalAttention()
    return inner if groups.ulysses is None else UlyssesAttention(groups.ulysses, inner)
