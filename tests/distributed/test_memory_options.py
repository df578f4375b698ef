"""Offloaded block inputs, offloaded or 8-bit optimizer state, prefetch: what they may not change on several ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel import recompute
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import build_groups, destroy
from mindspeed_wan.parallel.offload import InputOffload
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.training.byte_states import ByteStates
from mindspeed_wan.training.host_states import HostStates
from mindspeed_wan.training.optimizer import AdamW, ResidentStates
from tests.distributed.layouts import Fsdp2, fill, gathered_grads, local_loss
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.training import FSDP, TinyRun, tiny_run

CARD = {"task": "t2v", "expert": "high", "boundary": 0.875, "shift": 5.0}
CONFIG = TINY.with_changes(num_layers=4)
STATES: dict[str, Any] = {
    "resident": ResidentStates,
    "host": partial(HostStates, batch_bytes=1 << 14),
    "half": partial(HostStates, fraction=0.5),
    "8 bits": partial(ByteStates, smallest=256),
}


def _steps(
    rank: int, world_size: int, dims: dict[str, Any], plans: list[tuple[Fsdp2, RecomputePlan]],
    weights: dict[str, Tensor],
) -> list[tuple[dict[str, Tensor], int]]:  # fmt: skip
    """Return per plan: all gradients, and how many inputs were parked on this rank."""
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **dims), platform)
    batch, results = random_batch(CONFIG, (1, 6, 10)), []
    made: list[InputOffload] = []
    original = recompute.InputOffload
    recompute.InputOffload = lambda: made.append(original()) or made[-1]  # type: ignore[misc, assignment]
    for fsdp2, plan in plans:
        made.clear()
        model = build_wan(CONFIG, groups=groups, platform=platform, fsdp2=fsdp2, recompute=plan)
        fill(model, weights, groups)
        local_loss(model, groups, batch)[1].backward()
        finish_grads(model, groups, 0.0)
        results.append((gathered_grads(model, groups), sum(offload.parked for offload in made)))
    destroy()
    return results


@pytest.mark.parametrize(("world_size", "dims"), [
    (2, {}), (4, {"tensor": 2, "sequence_parallel": True, "context": 2}),
], ids=["fsdp2", "tp2-sp-cp2-fsdp2"])
def test_prefetch_and_offloaded_inputs_change_no_bit(world_size: int, dims: dict[str, Any]) -> None:
    weights = mm_state_dict(diffusers_model(CONFIG), CONFIG)
    plans = [
        (Fsdp2(num_to_forward_prefetch=0, num_to_backward_prefetch=0), RecomputePlan()),
        (Fsdp2(num_to_forward_prefetch=1, num_to_backward_prefetch=1), RecomputePlan()),
        (Fsdp2(num_to_forward_prefetch=2, num_to_backward_prefetch=2), RecomputePlan()),
        (Fsdp2(num_to_forward_prefetch=1, num_to_backward_prefetch=1), RecomputePlan(offload=True)),
        (Fsdp2(), RecomputePlan(offload=True, every_k=2, keep_attention=True)),
    ]
    for results in run_ranks(_steps, world_size, dims, plans, weights):
        assert [parked for _, parked in results] == [0, 0, 0, 4, 2]
        for grads, _ in results[1:]:
            assert all(torch.equal(grads[name], grad) for name, grad in results[0][0].items())


def _run(world_size: int, expert: str, layout: dict[str, Any], states: str) -> TinyRun:
    run = tiny_run(world_size, expert, layout)
    run.optimizer = AdamW(run.model.named_parameters(), states=STATES[states])
    run.optimizer.parameters_to_masters()
    return run


def _save(rank: int, world_size: int, root: str, expert: str, layout: dict[str, Any], states: str) -> Any:
    run = _run(world_size, expert, layout, states)
    run.train(1, 3)
    progress = dcp.Progress(iteration=3, consumed_samples=12, optimizer_steps=run.optimizer.steps)
    dcp.save(Path(root) / states, run.state(), dcp.Record(progress, CARD))
    return run.gathered(), run.train(4, 2)


def _load(
    rank: int, world_size: int, root: str, expert: str, layout: dict[str, Any], pairs: list[tuple[str, str]]
) -> list[Any]:  # fmt: skip
    """Resume what the first of each pair saved with the second's states."""
    results = []
    for written, read in pairs:
        run = _run(world_size, expert, layout, read)
        found = dcp.newest(Path(root) / written)
        assert found is not None
        dcp.load(found, run.views(), run.optimizer, ema=run.ema.averages, expert="high")
        run.ema.updates = 3
        results.append((run.gathered(), run.train(4, 2)))
    return results


def test_any_state_resumes_from_any_other(tmp_path: Path) -> None:
    """fp32, offloaded and 8-bit state write the same files; where both ends are exact, so is the rest of the run."""
    expert, layout = str(tiny_pipeline_folder() / "transformer"), {"parallel": FSDP}
    saved = {name: run_ranks(_save, 2, str(tmp_path), expert, layout, name)[0] for name in STATES}
    for name in ("host", "half"):
        assert saved[name][1] == saved["resident"][1]
        assert all(torch.equal(saved[name][0][key], value) for key, value in saved["resident"][0].items())
    pairs = [("host", "resident"), ("resident", "half"), ("8 bits", "8 bits"), ("8 bits", "resident"),
             ("resident", "8 bits")]
    resumed = run_ranks(_load, 2, str(tmp_path), expert, layout, pairs)[0]
    for (written, read), (state, after) in zip(pairs, resumed):
        exact = (written, read) != ("resident", "8 bits")
        if exact:
            different = [key for key, value in saved[written][0].items() if not torch.equal(state[key], value)]
            assert not different, (written, read, different[:3])
        if written == read or "8 bits" not in (written, read):
            assert after == saved[written][1]
        assert after == [pytest.approx(values, rel=0.02) for values in saved[written][1]]
    alone = run_ranks(_load, 1, str(tmp_path), expert, {"parallel": FSDP}, [("8 bits", "8 bits")])[0][0]
    assert all(torch.equal(alone[0][key], value) for key, value in saved["8 bits"][0].items())
    assert alone[1] == [pytest.approx(values, rel=0.02) for values in saved["8 bits"][1]]
