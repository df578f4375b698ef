"""Sizes of a layout: what factors, what does not, and messages that list what would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.dims import ParallelDims


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_degrees_multiply_to_the_world(tensor: int, context: int, data: int) -> None:
    dims = ParallelDims(world_size=tensor * context * data, tensor=tensor, context=context)
    assert (dims.data, dims.ulysses_size, dims.ring) == (data, context, 1)
    assert (dims.shard_size, dims.replicas) == (data * context, 1)


def test_parts_of_context_and_data() -> None:
    dims = ParallelDims(world_size=32, tensor=2, context=8, ulysses=4, shard=8)
    assert (dims.data, dims.ulysses_size, dims.ring, dims.shard_size, dims.replicas) == (2, 4, 2, 8, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 6, "tensor": 4}, "6 ranks do not factor into tensor 4 x context 1 x pipeline 1 = 4"),
        ({"world_size": 6, "pipeline": 4}, "6 ranks do not factor into tensor 1 x context 1 x pipeline 4 = 4"),
        ({"world_size": 2, "virtual": 2}, "2 virtual pipeline chunks without pipeline stages"),
        ({"world_size": 6, "context": 6, "ulysses": 4}, r"ulysses degree 4 does not divide context 6(.|\n)*1, 2, 3, 6"),
        ({"world_size": 4, "shard": 3}, r"sharding size 3 does not divide data 4 x context 1 = 4(.|\n)*1, 2, 4"),
        ({"world_size": 2, "sequence_parallel": True}, "sequence parallel needs tensor parallel"),
        ({"world_size": 0}, "world_size is 0"),
        ({"tensor": -1}, "tensor is -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelDims(**sizes)


def test_heads_decide_the_legal_degrees_of_a14b() -> None:
    a14b = {"num_heads": 40, "ffn_dim": 13824}
    for legal in (1, 2, 4, 5, 8, 10, 20, 40):
        ParallelDims(world_size=legal, context=legal).validate(**a14b)
    with pytest.raises(ConfigError, match=r"tensor 2 x ulysses 8 = 16 does not divide 40(.|\n)*1, 2, 4, 5, 8, 10, 20"):
        ParallelDims(world_size=16, tensor=2, context=8).validate(**a14b)
    ParallelDims(world_size=16, tensor=2, context=8, ulysses=4).validate(**a14b)  # the other factor 2 is a ring


def test_the_feed_forward_size_limits_tensor() -> None:
    with pytest.raises(ConfigError, match=r"tensor 5 does not divide the feed-forward size 13824(.|\n)*\[1, 2, 4, 8\]"):
        ParallelDims(world_size=5, tensor=5).validate(num_heads=40, ffn_dim=13824)
