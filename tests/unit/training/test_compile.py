"""--compile in training: one graph for all blocks, steps and both experts, with and without FSDP2 and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import Fsdp2, fill
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch

MIXED = Fsdp2(param_dtype="bf16", num_to_forward_prefetch=1, num_to_backward_prefetch=1)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Graphs are captured, not turned into kernels: that takes a minute, and what is counted is graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    if dist.is_initialized():  # FSDP2 makes a group of one rank
        dist.destroy_process_group()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="torch 2.7 traces a second graph")
@pytest.mark.parametrize("options", [
    {}, {"recompute": RecomputePlan(offload=True)}, {"recompute": RecomputePlan(keep_attention=True)},
    {"fsdp2": MIXED, "recompute": RecomputePlan(every_k=2, offload=True)},
], ids=["plain", "recompute", "attention kept", "fsdp2"])
def test_a_run_compiles_once(options: dict[str, Any], counters: Any) -> None:
    """Three steps of each expert, then an evaluation: a graph for training, one for evaluating, no break in either."""
    for expert in (0, 1):
        model = build_wan(TINY, platform=get_platform("cpu"), compile_blocks=True, residual_dtype=torch.float32,
                          **options)
        fill(model, mm_state_dict(diffusers_model(TINY, expert), TINY), ParallelGroups())
        for step in range(3):
            batch = random_batch(TINY, (1, 4, 6), timesteps=(700.0 - step, 31.5), seed=step)
            with torch._dynamo.config.patch(error_on_recompile=True):
                model(batch.latents, batch.timestep, batch.text).square().mean().backward()
            model.zero_grad()
        if expert == 0:  # evaluations may come at any time
            assert counters["stats"]["unique_graphs"] == 1
            with torch.no_grad():
                model(batch.latents, batch.timestep, batch.text)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
