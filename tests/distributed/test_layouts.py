"""Every legal layout computes the loss, the outputs, each gradient and the gradient norm of one rank.

105 tokens (3 x 5 x 7) divide by no number of ranks used here, so padding is part of every context-parallel case.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mindspeed_wan.parallel.recompute import RecomputePlan
from tests.distributed.layouts import (
    Fsdp2,
    Layout,
    Step,
    distributed_step,
    single_rank_step,
    skip_without_hybrid_sharding,
)
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks

TP2, TP4, CP2, CP4 = {"tensor": 2}, {"tensor": 4}, {"context": 2}, {"context": 4}
SP = {"sequence_parallel": True}
FSDP = Fsdp2()

CASES = {
    "dp2": (2, Layout()),
    "tp2": (2, Layout(TP2)),
    "tp2-sp": (2, Layout({**TP2, **SP})),
    "cp2": (2, Layout(CP2)),
    "fsdp2": (2, Layout(fsdp2=FSDP)),
    "tp2-sp-fsdp1": (2, Layout({**TP2, **SP}, FSDP)),
    "tp4-sp": (4, Layout({**TP4, **SP})),
    "cp4": (4, Layout(CP4)),
    "tp2-cp2": (4, Layout({**TP2, **CP2})),
    "tp2-sp-cp2": (4, Layout({**TP2, **SP, **CP2})),
    "fsdp4-prefetch": (4, Layout(fsdp2=Fsdp2(num_to_forward_prefetch=1, num_to_backward_prefetch=1))),
    "hsdp-2x2": (4, Layout({"shard": 2}, FSDP)),
    "tp2-fsdp2": (4, Layout(TP2, FSDP)),
    "tp2-sp-fsdp2": (4, Layout({**TP2, **SP}, FSDP)),
    "cp2-fsdp2": (4, Layout(CP2, FSDP)),
    "cp4-hsdp-2x2": (4, Layout({**CP4, "shard": 2}, FSDP)),
    "tp2-sp-cp2-fsdp2-recompute": (4, Layout({**TP2, **SP, **CP2}, FSDP, RecomputePlan())),
    "fsdp2-whole-model-one-unit": (2, Layout(fsdp2=Fsdp2(sub_modules_to_wrap=("predictor",)))),
    "fsdp2-class-path-dialect": (2, Layout(fsdp2=Fsdp2(sub_modules_to_wrap=("mindspeed_mm.wan_dit.WanDiTBlock",)))),
    **{f"recompute-{k}": (2, Layout(recompute=RecomputePlan(every_k=k))) for k in (1, 2, 3)},
    **{f"fsdp2-recompute-{k}": (2, Layout(fsdp2=FSDP, recompute=RecomputePlan(every_k=k))) for k in (1, 2, 3)},
}
CONFIG = TINY.with_changes(num_layers=3)
WAN21 = TINY.with_changes(in_channels=8, image_dim=48)


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, torch.Tensor], Batch, Step]:
    weights = mm_state_dict(diffusers_model(CONFIG), CONFIG)
    batch = random_batch(CONFIG, timesteps=(700.0, 31.5, 999.0, 480.25))
    return weights, batch, single_rank_step(CONFIG, weights, batch)


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_rank(name: str, case: tuple[dict[str, torch.Tensor], Batch, Step]) -> None:
    weights, batch, expected = case
    world_size, layout = CASES[name]
    skip_without_hybrid_sharding(layout.dims)
    for step in run_ranks(distributed_step, world_size, layout, CONFIG, (weights, batch, 0.0)):
        assert_same_step(step, expected, batch)


def assert_same_step(step: Step, expected: Step, batch: Batch) -> None:
    assert step.loss == pytest.approx(expected.loss, rel=1e-5)
    assert step.norm == pytest.approx(expected.norm, rel=1e-5)
    assert step.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        torch.testing.assert_close(step.grads[name], grad, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name))
    size = step.output.shape[0]
    slices = [expected.output[i : i + size] for i in range(0, len(batch.timestep), size)]
    assert any(torch.allclose(step.output, s, rtol=1e-4, atol=1e-5) for s in slices)


@pytest.mark.parametrize("layout", [Layout({**TP2, **SP}), Layout(CP2, FSDP)], ids=["tp2-sp", "cp2-fsdp2"])
def test_the_image_branch_of_wan21_is_parallel_too(layout: Layout) -> None:
    weights = mm_state_dict(diffusers_model(WAN21), WAN21)
    batch = random_batch(WAN21, (1, 6, 10))
    expected = single_rank_step(WAN21, weights, batch)
    for step in run_ranks(distributed_step, 2, layout, WAN21, (weights, batch, 0.0)):
        assert_same_step(step, expected, batch)


def test_clipping_scales_every_gradient_alike(case: tuple[dict[str, torch.Tensor], Batch, Step]) -> None:
    weights, batch, unclipped = case
    max_norm = unclipped.norm / 3
    layout = Layout({**TP2, **SP}, FSDP)
    step = run_ranks(distributed_step, 4, layout, CONFIG, (weights, batch, max_norm))[0]
    assert step.norm == pytest.approx(unclipped.norm, rel=1e-5)
    for name, grad in unclipped.grads.items():
        torch.testing.assert_close(step.grads[name], grad / 3, rtol=1e-4, atol=1e-6)
