"""Adapter-only checkpoints: bit-exact resume in the same layout, the same adapter in any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.sources import open_dcp
from mindspeed_wan.lora import apply
from mindspeed_wan.lora.formats import LoraFile
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.training.optimizer import AdamW
from tests.distributed.layouts import Fsdp2, Layout, local_loss
from tests.distributed.test_lora import Case, built
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks
from tests.unit.lora.cases import random_lora, same

SAVED_IN = Layout({"tensor": 2, "sequence_parallel": True}, fsdp2=Fsdp2())
STEPS, SAVED_AFTER = 4, 2


@pytest.fixture(scope="module")
def case() -> Case:
    batch = random_batch(TINY, timesteps=(700.0, 31.5, 900.0, 450.0))
    return mm_state_dict(diffusers_model(TINY), TINY), random_lora(TINY, targets=("all-linear",), alpha=8.0), batch


def train(groups: ParallelGroups, layout: Layout, case: Case, folder: Path, *, resume: bool) -> list[LoraFile]:
    """Run to STEPS, saving (or starting) after SAVED_AFTER; returns the adapters there and at the end."""
    weights, _, batch = case
    model = built(layout, groups, weights, train=True)
    apply.init_adapter(model, seed=1, groups=groups)
    optimizer = AdamW(model.named_parameters())
    views = apply.adapter_views(model, groups)
    progress, seen = dcp.Progress(), []
    if resume:
        found = dcp.newest(folder)
        assert found is not None
        progress = dcp.load(found, views, optimizer)
        seen.append(apply.export_adapter(model, groups))
    while progress.iteration < STEPS:
        _, loss = local_loss(model, groups, batch)
        loss.backward()
        finish_grads(model, groups, 1.0)
        optimizer.step(1e-2, 0.0)
        optimizer.zero_grad()
        progress = replace(progress, iteration=progress.iteration + 1, optimizer_steps=optimizer.steps)
        if progress.iteration == SAVED_AFTER and not resume:
            dcp.save(folder, dcp.state_views(views, optimizer), dcp.Record(progress, {"task": "t2v"}))
            seen.append(apply.export_adapter(model, groups))
    return [*seen, apply.export_adapter(model, groups)]


def on_ranks(rank: int, world_size: int, layout: Layout, case: Case, folder: Path, resume: bool) -> list[LoraFile]:
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    files = train(groups, layout, case, folder, resume=resume)
    destroy()
    return files


def test_adapter_only_checkpoints(case: Case, tmp_path: Path) -> None:
    straight = run_ranks(on_ranks, 4, SAVED_IN, case, tmp_path, False)[0]
    stored = open_dcp(tmp_path / f"iter_{SAVED_AFTER:07d}").tensors
    assert len(stored) == 3 * 2 * len(straight[0].adapters)  # A and B, two moments each, nothing of the base
    assert all(".lora_" in name for name in stored)
    resumed = run_ranks(on_ranks, 4, SAVED_IN, case, tmp_path, True)[0]
    assert same(resumed[0], straight[0])
    assert same(resumed[1], straight[1])
    assert not same(straight[0], straight[1])
    for world_size, layout in ((2, Layout({"context": 2})), (2, Layout({"tensor": 2}))):
        elsewhere = run_ranks(on_ranks, world_size, layout, case, tmp_path, True)[0]
        assert same(elsewhere[0], straight[0])
        for mm, adapter in straight[1].adapters.items():
            torch.testing.assert_close(elsewhere[1].adapters[mm].up, adapter.up, rtol=2e-3, atol=2e-4)
