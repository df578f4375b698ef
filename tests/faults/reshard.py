"""T8: a checkpoint of every layout of up to four ranks, read in every other one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from mindspeed_wan.checkpoint import dcp
from tests.faults.harness import Tally
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.training import TinyRun, tiny_run

DEGREES = [(t, c, f) for t in (1, 2, 4) for c in (1, 2, 4) for f in (1, 2, 4) if t * c * f <= 4]
"""(tensor, context, FSDP2) degrees; their product is the world size."""
CARD = {"task": "t2v", "expert": "high", "boundary": 0.875, "shift": 5.0}
TOLERANCE = 1e-5


def _run(world_size: int, expert: str, degrees: tuple[int, int, int]) -> TinyRun:
    tensor, context, shard = degrees
    parallel: dict[str, Any] = {"tensor": tensor, "context": context, "sequence_parallel": tensor > 1}
    return tiny_run(world_size, expert, {"parallel": {**parallel, "use_torch_fsdp2": shard > 1}})


def _hashes(run: TinyRun) -> dict[str, str]:
    """Return the hash of every tensor of the checkpoint, whole. Collective."""
    return {key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, tensor in run.gathered().items()}


def _save(rank: int, world_size: int, root: str, expert: str, degrees: tuple[int, int, int]) -> Any:
    run = _run(world_size, expert, degrees)
    run.train(1, 2)
    dcp.save(root, run.state(), dcp.Record(dcp.Progress(iteration=2, optimizer_steps=run.optimizer.steps), CARD))
    hashes = _hashes(run)
    return hashes, run.train(3, 1)[0][0]


def _load_all(rank: int, world_size: int, roots: list[str], expert: str, degrees: tuple[int, int, int]) -> Any:
    """Read each checkpoint in this layout; returns (hashes, next loss) of each."""
    run, results = _run(world_size, expert, degrees), []
    for root in roots:
        found = dcp.newest(root)
        assert found is not None
        dcp.load(found, run.views(), run.optimizer, ema=run.ema.averages, expert="high")
        run.ema.updates = 2
        results.append((_hashes(run), run.train(3, 1)[0][0]))
    return results


def reshard(tally: Tally, count: int, folder: Path) -> None:
    """Every tensor is bit-equal in every pair of layouts, and the next loss differs by at most 1e-5."""
    expert = str(tiny_pipeline_folder() / "transformer")
    layouts = DEGREES if count >= len(DEGREES) ** 2 else [(1, 1, 1), (2, 1, 1)][: count + 1]
    roots = [folder / "-".join(map(str, degrees)) for degrees in layouts]
    saved = [run_ranks(_save, t * c * f, str(root), expert, (t, c, f))[0] for root, (t, c, f) in zip(roots, layouts)]
    for t, c, f in layouts:
        try:
            loaded = run_ranks(_load_all, t * c * f, [str(root) for root in roots], expert, (t, c, f))[0]
        except AssertionError as error:
            tally.add(0, len(roots), f"{t, c, f}: {str(error)[-600:]}")
            continue
        for (hashes, loss), (wanted, wanted_loss), source in zip(loaded, saved, layouts):
            with tally.case(f"{source} -> {t, c, f}"):
                assert hashes == wanted, "tensors differ"
                assert abs(loss - wanted_loss) <= TOLERANCE * abs(wanted_loss), f"loss {loss} against {wanted_loss}"
                assert source != (t, c, f) or loss == wanted_loss, "the same layout gives another loss"
