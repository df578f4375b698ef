"""torch.compile of the blocks: one graph for all of them and for both experts, no break, gradients kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from packaging.version import Version

from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.parallelize import parallelize
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch, relative_error


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Count compiled graphs; capture only, because building C++ kernels takes a minute."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    yield seen
    torch._dynamo.reset()


def _model(seed: int, **options: object) -> WanDiT:
    model = WanDiT(TINY)
    model.load_state_dict(mm_state_dict(diffusers_model(TINY, seed), TINY))
    return parallelize(model, groups=ParallelGroups(), platform=get_platform("cpu"), **options)  # type: ignore[arg-type]


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="torch 2.7 traces a second graph")
def test_blocks_and_experts_share_one_graph(graphs: list[object]) -> None:
    batch = random_batch(TINY)
    with torch.no_grad():
        for seed in (0, 1):
            expected = _model(seed)(batch.latents, batch.timestep, batch.text)
            model = _model(seed, compile_blocks=True)
            for timestep in (batch.timestep, batch.timestep / 2):
                compiled = model(batch.latents, timestep, batch.text)
            assert len(graphs) == 1
            again = model(batch.latents, batch.timestep, batch.text)
            assert relative_error(again, expected) < 1e-6
            assert relative_error(compiled, expected) > 1e-3  # another timestep, same graph
        context = model.encode_text(batch.text)
        assert relative_error(model(batch.latents, batch.timestep, text_context=context), expected) < 1e-6
        assert len(graphs) == 2  # cached text is another signature


def test_compiled_and_recomputed_gradients(graphs: list[object]) -> None:
    batch = random_batch(TINY)
    grads = []
    for options in ({}, {"compile_blocks": True}, {"compile_blocks": True, "recompute": RecomputePlan()}):
        model = _model(0, **options)
        model(batch.latents, batch.timestep, batch.text).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert graphs
    for compiled in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-6)
