"""Pipeline stages compute the losses, each gradient and the gradient norm of one rank, on every legal layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.parallel.pipeline import PipelinePlan
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.objective import Noised
from mindspeed_wan.training.pipeline import Schedule, Work
from tests.distributed.layouts import fill, gathered_grads
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks

CONFIG = TINY.with_changes(num_layers=4)
WAN21 = TINY.with_changes(in_channels=8, image_dim=48, num_layers=2)
MICRO_BATCHES = 4
PP2, PP4, TP2, CP2 = {"pipeline": 2}, {"pipeline": 4}, {"tensor": 2}, {"context": 2}
SP = {"sequence_parallel": True}
VPP2 = {**PP2, "virtual": 2}


@dataclass(frozen=True)
class Case:
    """A layout, what each stage holds, and how the residual stream travels."""

    world_size: int
    dims: dict[str, Any]
    plan: PipelinePlan | None = None
    recompute: RecomputePlan | None = None
    micro_batches: int = MICRO_BATCHES
    build: dict[str, Any] = field(default_factory=dict)


CASES = {
    "pp2": Case(2, PP2),
    "pp2-uneven": Case(2, PP2, PipelinePlan(((1, 3),))),
    "pp2-one-micro-batch": Case(2, PP2, micro_batches=1),
    "pp2-vpp2": Case(2, VPP2),
    "pp2-recompute": Case(2, PP2, recompute=RecomputePlan()),
    "pp4": Case(4, PP4),
    "pp2-dp2": Case(4, PP2, micro_batches=2),
    "pp2-tp2": Case(4, {**PP2, **TP2}),
    "pp2-tp2-sp": Case(4, {**PP2, **TP2, **SP}),
    "pp2-cp2": Case(4, {**PP2, **CP2}),
    "pp2-vpp2-cp2": Case(4, {**VPP2, **CP2}),
    "pp2-vpp2-tp2-sp": Case(4, {**VPP2, **TP2, **SP}),
}
SLOW = ("pp2-uneven", "pp2-one-micro-batch", "pp2-recompute", "pp4", "pp2-tp2", "pp2-vpp2-cp2")


@dataclass
class Step:
    """What one rank saw of a global batch: losses on the last stage, the norm, its own gradients in global shape."""

    losses: list[Tensor]
    norm: float
    grads: dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return mm_state_dict(diffusers_model(CONFIG), CONFIG)


def micro_batches(config: WanConfig) -> list[Batch]:
    """One sample each."""
    return [random_batch(config, timesteps=(time,), seed=number)
            for number, time in enumerate((700.0, 31.5, 999.0, 480.25))]


def work_of(batch: Batch) -> Work:
    features = Features(batch.latents, batch.text, [(0, 0)], image_embeds=batch.image_embeds)
    ones = torch.ones(len(batch.timestep))
    return Work(features, Noised(batch.latents, batch.timestep, batch.cotangent, batch.timestep / 1000, ones))


def one_rank(config: WanConfig, weights: dict[str, Tensor], batches: list[Batch]) -> Step:
    model = WanDiT(config)
    model.load_state_dict(weights)
    losses = []
    for batch in batches:
        output = model(batch.latents, batch.timestep, batch.text, batch.image_embeds)
        loss = work_of(batch).noised.losses(output)
        (loss.mean() / len(batches)).backward()
        losses.append(loss.detach())
    norm = finish_grads(model, ParallelGroups(), 0.0)
    return Step(losses, norm, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def pipeline_step(rank: int, world_size: int, case: Case, config: WanConfig, weights: dict[str, Tensor],
                  batches: list[Batch]) -> Step:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **case.dims), platform)
    model = build_wan(config, groups=groups, platform=platform, pipeline=case.plan, recompute=case.recompute,
                      **case.build)
    fill(model, {name: weights[name] for name, _ in model.named_parameters()}, groups)
    mine = batches[groups.dp_rank * case.micro_batches : (groups.dp_rank + 1) * case.micro_batches]
    schedule = Schedule(model, groups, platform)
    with torch.no_grad():
        before = schedule.run([work_of(batch) for batch in mine], forward_only=True)
    outcome = schedule.run([work_of(batch) for batch in mine], scale=1 / len(mine))
    for (loss, _), (same, _) in zip(outcome, before):
        torch.testing.assert_close(loss, same, rtol=0, atol=0)
    norm = finish_grads(model, groups, 0.0)
    losses = [loss for loss, _ in outcome]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (groups.dp_rank, losses))
    by_rank = {dp: part for dp, part in everyone if part}
    step = Step([loss for dp in sorted(by_rank) for loss in by_rank[dp]], norm, gathered_grads(model, groups))
    destroy()
    return step


@pytest.mark.core
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_pipeline_equals_one_rank(name: str, weights: dict[str, Tensor]) -> None:
    case = CASES[name]
    data = ParallelDims(world_size=case.world_size, **case.dims).data
    batches = micro_batches(CONFIG)[: case.micro_batches * data]
    expected = one_rank(CONFIG, weights, batches)
    check(run_ranks(pipeline_step, case.world_size, case, CONFIG, weights, batches), expected)


def test_the_image_tokens_of_wan21_travel_too() -> None:
    weights = mm_state_dict(diffusers_model(WAN21), WAN21)
    batches = [random_batch(WAN21, (1, 6, 10), timesteps=(500.0,), seed=number) for number in range(2)]
    expected = one_rank(WAN21, weights, batches)
    check(run_ranks(pipeline_step, 2, Case(2, PP2, micro_batches=2), WAN21, weights, batches), expected)


def check(steps: list[Step], expected: Step) -> None:
    grads: dict[str, Tensor] = {}
    for step in steps:
        assert step.norm == pytest.approx(expected.norm, rel=1e-5)
        torch.testing.assert_close(step.losses, expected.losses, rtol=1e-5, atol=0)
        grads.update(step.grads)
    assert grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name))
