"""A checkpoint of one layout gives the same bits in every other, and training goes on as if nothing happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_wan.checkpoint import dcp
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.training import FSDP, tiny_run

CARD = {"task": "t2v", "expert": "high", "boundary": 0.875, "shift": 5.0}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one_fsdp_bf16": (1, {"parallel": FSDP, "training": {"precision": "bf16"}}),
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "fsdp2": (2, {"parallel": FSDP}),
    "dp2": (2, {}),
    "tp2_sp_fsdp2": (4, {"parallel": {**FSDP, "tensor": 2, "sequence_parallel": True}}),
    "tp2_cp2": (4, {"parallel": {**FSDP, "tensor": 2, "context": 2}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2_tp2_bf16": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "training": {"precision": "bf16"}}),
    "hsdp": (4, {"parallel": FSDP, "fsdp2": {"sharding_size": 2}}),
}


def save_run(rank: int, world_size: int, root: str, expert: str, layout: dict[str, Any]) -> Any:
    run = tiny_run(world_size, expert, layout)
    run.train(1, 3)
    progress = dcp.Progress(iteration=3, consumed_samples=12, optimizer_steps=run.optimizer.steps)
    dcp.save(root, run.state(), dcp.Record(progress, CARD))
    gathered, continued = run.gathered(), run.train(4, 2)
    return (gathered, continued) if rank == 0 else None


def load_run(rank: int, world_size: int, root: str, expert: str, layout: dict[str, Any]) -> Any:
    run = tiny_run(world_size, expert, layout)
    found = dcp.newest(root)
    assert found is not None
    progress = dcp.load(found, run.views(), run.optimizer, ema=run.ema.averages, expert="high")
    run.ema.updates = 3
    assert (progress.iteration, progress.consumed_samples, run.optimizer.steps) == (3, 12, 3)
    gathered, continued = run.gathered(), run.train(4, 2)
    return (gathered, continued) if rank == 0 else None


@pytest.mark.parametrize(("written", "read"), [
    ("tp2_sp_fsdp2", list(LAYOUTS)),
    ("one", ["tp2", "fsdp2"]),
    ("pp2", ["one", "pp2", "tp2_cp2"]),
])
def test_any_layout_reads_the_same_bits(written: str, read: list[str], tmp_path: Path) -> None:
    expert = str(tiny_pipeline_folder() / "transformer")
    world, layout = LAYOUTS[written]
    saved, after = run_ranks(save_run, world, str(tmp_path), expert, layout)[0]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    for name in read:
        size, other = LAYOUTS[name]
        results = run_ranks(load_run, size, str(tmp_path), expert, other)
        loaded, continued = results[0]
        assert loaded.keys() == saved.keys()
        different = [key for key in saved if not torch.equal(loaded[key], saved[key])]
        assert not different, f"{written} -> {name}: {different[:5]}"
        tolerance = 2e-2 if "bf16" in name else 1e-5
        for (loss, norm), (wanted_loss, wanted_norm) in zip(continued, after):
            assert loss == pytest.approx(wanted_loss, rel=tolerance), name
            assert norm == pytest.approx(wanted_norm, rel=tolerance), name
        if name == written:
            assert continued == after
