"""Adapters on every layout: the loss, each gradient of A and B, loading, export and initialisation of one rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindspeed_wan.lora import apply
from mindspeed_wan.lora.formats import LoraFile
from mindspeed_wan.lora.spec import LoraSpec
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.models.wan.views import global_views, local_slices
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import Fsdp2, Layout, gathered_grads, local_loss
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks
from tests.unit.lora.cases import random_lora

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("all-linear",))
LAYOUTS = {
    "tp2": (2, Layout({"tensor": 2})),
    "tp2-sp": (2, Layout({"tensor": 2, "sequence_parallel": True})),
    "cp2": (2, Layout({"context": 2})),
    "dp2": (2, Layout({})),
    "fsdp2": (2, Layout({}, fsdp2=Fsdp2())),
    "tp2-sp-recompute": (2, Layout({"tensor": 2, "sequence_parallel": True}, recompute=RecomputePlan())),
    "tp2-sp-fsdp2": (4, Layout({"tensor": 2, "sequence_parallel": True}, fsdp2=Fsdp2())),
    "tp2-cp2": (4, Layout({"tensor": 2, "context": 2})),
    "cp2-fsdp2-recompute": (4, Layout({"context": 2}, fsdp2=Fsdp2(), recompute=RecomputePlan(offload=True))),
}
Case = tuple[dict[str, Tensor], LoraFile, Batch]


@pytest.fixture(scope="module")
def case() -> Case:
    weights = mm_state_dict(diffusers_model(TINY), TINY)
    batch = random_batch(TINY, timesteps=(700.0, 31.5, 900.0, 450.0))
    return weights, random_lora(TINY, targets=SPEC.targets, rank=4, alpha=8.0), batch


def step(model: WanDiT, groups: ParallelGroups, batch: Batch) -> tuple[Tensor, float, dict[str, Tensor]]:
    _, loss = local_loss(model, groups, batch)
    loss.backward()
    norm = finish_grads(model, groups, 0.0)
    return loss.detach().clone(), norm, gathered_grads(model, groups)


def fill_base(model: WanDiT, weights: dict[str, Tensor], groups: ParallelGroups) -> None:
    base, _ = apply.split_views(global_views(model, groups))
    assert base.keys() == weights.keys()
    for name, view in base.items():
        local, index = local_slices(view)
        if local.numel():
            local.copy_(weights[name][index])


def built(layout: Layout, groups: ParallelGroups, weights: dict[str, Tensor], *, train: bool) -> WanDiT:
    modify = partial(apply.add_adapter, spec=SPEC) if train else None
    model = build_wan(TINY, groups=groups, platform=get_platform("cpu"), fsdp2=layout.fsdp2,
                      recompute=layout.recompute, modify=modify)
    fill_base(model, weights, groups)
    return model


def train_on_ranks(rank: int, world_size: int, layout: Layout, case: Case):
    weights, lora, batch = case
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    model = built(layout, groups, weights, train=True)
    apply.fill_adapter(model, lora, groups)
    loss, norm, grads = step(model, groups, batch)
    dist.all_reduce(loss)
    exported = apply.export_adapter(model, groups)
    apply.init_adapter(model, seed=3, groups=groups)
    first = apply.export_adapter(model, groups)
    destroy()
    return float(loss) / world_size, norm, grads, exported, first


def one_rank(case: Case):
    weights, lora, batch = case
    model = WanDiT(TINY)
    model.load_state_dict(weights)
    apply.add_adapter(model, SPEC)
    apply.fill_adapter(model, lora)
    loss, norm, grads = step(model, ParallelGroups(), batch)
    apply.init_adapter(model, seed=3)
    return float(loss), norm, grads, apply.export_adapter(model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_rank(name: str, case: Case) -> None:
    world_size, layout = LAYOUTS[name]
    loss, norm, grads, first = one_rank(case)
    assert len(grads) == 2 * len(case[1].adapters)
    for seen_loss, seen_norm, seen_grads, exported, seen_first in run_ranks(train_on_ranks, world_size, layout, case):
        assert seen_loss == pytest.approx(loss, rel=1e-5)
        assert seen_norm == pytest.approx(norm, rel=1e-5)
        assert seen_grads.keys() == grads.keys()
        for parameter, grad in grads.items():
            torch.testing.assert_close(seen_grads[parameter], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max() + 1))
        for mm, adapter in case[1].adapters.items():
            assert torch.equal(exported.adapters[mm].up, adapter.up)
            assert torch.equal(exported.adapters[mm].down, adapter.down)
            assert torch.equal(seen_first.adapters[mm].down, first.adapters[mm].down)
            assert not seen_first.adapters[mm].up.any()


def infer_on_ranks(rank: int, world_size: int, layout: Layout, case: Case):
    weights, lora, batch = case
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    model = built(layout, groups, weights, train=False)

    @torch.no_grad()
    def run() -> Tensor:
        return model(batch.latents, batch.timestep, batch.text)

    before = run()
    apply.load_adapter(model, lora, "style", weight=0.6, groups=groups)
    adapted = run()
    apply.unload(model, "style")
    after = run()
    leftover = [name for name, p in model.named_parameters() if isinstance(p, DTensor) != (layout.fsdp2 is not None)]
    destroy()
    return adapted, torch.equal(before, after), leftover


@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "cp2", "fsdp2", "tp2-sp-fsdp2"])
def test_hot_loading_on_every_layout(name: str, case: Case) -> None:
    world_size, layout = LAYOUTS[name]
    weights, lora, batch = case
    lora = random_lora(TINY, targets=SPEC.targets, rank=4, alpha=8.0, diffs=True)
    model = WanDiT(TINY)
    model.load_state_dict(weights)
    apply.load_adapter(model, lora, "style", weight=0.6)
    with torch.no_grad():
        expected = model(batch.latents, batch.timestep, batch.text)
    for adapted, restored, leftover in run_ranks(infer_on_ranks, world_size, layout, (weights, lora, batch)):
        assert float((adapted - expected).norm() / expected.norm()) < 1e-5
        assert restored
        assert not leftover


def fp32_adapters_on_a_bf16_base(rank: int, world_size: int, case: Case):
    weights, lora, batch = case
    groups = build_groups(ParallelDims(world_size=world_size), get_platform("cpu"))
    modify = partial(apply.add_adapter, spec=SPEC, dtype=torch.float32)
    model = build_wan(TINY, groups=groups, platform=get_platform("cpu"), param_dtype=torch.bfloat16,
                      fsdp2=Fsdp2(param_dtype="bf16"), modify=modify)
    fill_base(model, weights, groups)
    apply.fill_adapter(model, lora, groups)
    _, norm, grads = step(model, groups, batch)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    destroy()
    return norm, grads, dtypes


def test_frozen_bf16_base_with_fp32_adapters_under_fsdp2(case: Case) -> None:
    """The base costs half the memory, masters and gradients of the adapters stay fp32."""
    _, norm, grads, _ = one_rank(case)
    for seen_norm, seen_grads, dtypes in run_ranks(fp32_adapters_on_a_bf16_base, 2, case):
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
        assert seen_norm == pytest.approx(norm, rel=0.05)
        assert {grad.dtype for grad in seen_grads.values()} == {torch.float32}
        for parameter, grad in grads.items():
            assert float((seen_grads[parameter] - grad).norm() / grad.norm()) < 0.15, parameter
