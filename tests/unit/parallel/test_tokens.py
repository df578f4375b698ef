"""Cutting the token axis: every length for every number of ranks comes back whole, padding apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_wan.parallel.tokens import TokenSharding


@dataclass
class _Group:
    """A stand-in with the two questions that splitting asks of a process group."""

    members: int
    number: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return self.number


@given(length=st.integers(1, 40), context=st.integers(1, 5), tensor=st.integers(1, 4))
def test_shards_concatenate_to_the_padded_sequence(length: int, context: int, tensor: int) -> None:
    x = torch.arange(1.0, length + 1).view(length, 1)
    shards = []
    for c in range(context):
        halves = []
        for t in range(tensor):
            tokens = TokenSharding(_Group(context, c), _Group(tensor, t))
            assert tokens.padded(length) % tokens.parts == 0
            assert 0 <= tokens.padded(length) - length < tokens.parts
            halves.append(tokens.split(x))
        assert torch.equal(torch.cat(halves), tokens.split_context(x))
        shards += halves
    whole = torch.cat(shards)
    assert len({len(shard) for shard in shards}) == 1
    assert torch.equal(whole[:length], x)
    assert not whole[length:].any()


def test_one_rank_changes_nothing() -> None:
    x = torch.randn(7, 2, 3)
    tokens = TokenSharding()
    assert tokens.parts == 1
    assert tokens.split(x) is x
    assert torch.equal(tokens.gather(x, 7), x)
