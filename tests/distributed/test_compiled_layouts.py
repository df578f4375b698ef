"""--compile over ranks: one graph where attention can be traced, a block around it where it cannot; same gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from packaging.version import Version

from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.groups import build_groups, destroy
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import fill
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch, relative_error
from tests.helpers.spawn import run_ranks

Weights = dict[str, torch.Tensor]


def _gradients(model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    model(batch.latents, batch.timestep, batch.text).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _compiled(
    rank: int, world_size: int, dims: dict[str, Any], chunks: int, case: tuple[Weights, Weights, Batch]
) -> tuple[float, int, int]:
    """Return the largest error of a gradient, the graphs and the graph breaks of two steps of each expert."""
    high, low, batch = case
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **dims), platform)
    counters = torch._dynamo.utils.counters
    # Graphs are captured, not turned into kernels, which takes a minute.
    torch.compile = partial(torch.compile, backend="eager")  # this process ends with the test
    worst, first = 0.0, 0
    for weights in (high, low):
        results = []
        for compiled in (False, True):
            model = build_wan(TINY, groups=groups, platform=platform, compile_blocks=compiled, ulysses_chunks=chunks)
            fill(model, weights, groups)
            results.append([_gradients(model, batch) for _ in range(2)][-1])
        worst = max(worst, *(relative_error(b, a) for a, b in zip(*results, strict=True) if a.norm() > 1e-6))
        first = first or counters["stats"]["unique_graphs"]
    destroy()
    assert counters["stats"]["unique_graphs"] == first  # the second expert uses the first one's
    return worst, first, len(counters["graph_break"])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="torch 2.7 traces a second graph")
@pytest.mark.parametrize(("dims", "chunks", "traced"), [
    ({"context": 2}, 1, True), ({"context": 2}, 2, False), ({"context": 2, "ulysses": 1}, 1, False),
], ids=["ulysses", "ulysses overlapped", "ring"])
def test_compiled_blocks_over_ranks(dims: dict[str, Any], chunks: int, traced: bool) -> None:
    weights = [mm_state_dict(diffusers_model(TINY, seed), TINY) for seed in (0, 1)]
    for error, graphs, breaks in run_ranks(_compiled, 2, dims, chunks, (*weights, random_batch(TINY))):
        assert error < 1e-5
        assert (graphs == 1 and not breaks) if traced else graphs <= 6
