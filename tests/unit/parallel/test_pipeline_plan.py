"""Which blocks a stage holds: every block once, in Megatron's order."""

from __future__ import annotations

import pytest

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.pipeline import Chunk, PipelinePlan


@pytest.mark.parametrize(("layers", "stages", "virtual"), [(40, 4, 1), (40, 3, 1), (40, 4, 2), (5, 2, 2), (7, 7, 1)])
def test_an_even_split_holds_every_block_once(layers: int, stages: int, virtual: int) -> None:
    plan = PipelinePlan.even(layers, stages, virtual)
    chunks = [plan.chunks(stage) for stage in range(stages)]
    assert sorted(block for stage in chunks for chunk in stage for block in chunk.blocks) == list(range(layers))
    sizes = [len(chunk.blocks) for stage in chunks for chunk in stage]
    assert max(sizes) - min(sizes) <= 1
    assert [chunk.first for chunk in chunks[0]] == [True] + [False] * (virtual - 1)
    assert [chunk.last for chunk in chunks[-1]] == [False] * (virtual - 1) + [True]
    assert sum(chunk.first + chunk.last for stage in chunks for chunk in stage) == 2


def test_virtual_chunks_take_turns() -> None:
    plan = PipelinePlan(((1, 2), (3, 4)))
    assert plan.chunks(0) == (Chunk(blocks=range(1), last=False), Chunk(blocks=range(3, 6), first=False, last=False))
    assert plan.chunks(1) == (Chunk(blocks=range(1, 3), first=False, last=False),
                              Chunk(blocks=range(6, 10), first=False))
    assert (plan.num_layers, plan.describe()) == (10, "[[1, 2], [3, 4]]")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PipelinePlan.even(3, 4), "3 blocks cannot be split"),
    (lambda: PipelinePlan(((1, 2), (3,))), "one number per stage"),
    (lambda: PipelinePlan(((4, 0),)), "at least one block"),
    (lambda: PipelinePlan.of(8, 2, 2, ((4, 4),)), "2 stages x 1 chunks, the run has 2 x 2"),
    (lambda: PipelinePlan.of(8, 2, 1, ((4, 5),)), "adds up to 9 blocks"),
])
def test_plans_that_do_not_fit(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
