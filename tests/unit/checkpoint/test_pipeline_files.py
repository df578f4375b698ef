"""MindSpeed-MM's files of pipeline stages are read as one model, virtual chunks included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.checkpoint.weights import load_model_weights
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from tests.helpers.oracle import TINY

CONFIG = TINY.with_changes(num_layers=4)
ENDS = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.")


def random_weights(config: WanConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {p.mm: torch.randn(p.shape, generator=generator) for p in parameter_table(config)}


def piece(weights: dict[str, torch.Tensor], blocks: range, rank: int, tp: int) -> dict[str, torch.Tensor]:
    """Return what one file holds of some blocks, numbered from 0, with the ends of the model where they belong."""
    axes = {p.mm: p.tp_axis for p in parameter_table(CONFIG)}
    found = {}
    for name, weight in weights.items():
        part = weight if axes[name] is None else weight.chunk(tp, axes[name])[rank].contiguous()
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            if number in blocks:
                found[name.replace(f"blocks.{number}.", f"blocks.{number - blocks.start}.", 1)] = part
        elif (blocks.start == 0 and name.startswith(ENDS)) or (blocks.stop == 4 and name.startswith("head.")):
            found[name] = part
    return found


def write(root: Path, weights: dict[str, torch.Tensor], chunks: list[list[range]], tp: int) -> None:
    """Write ``mp_rank_TT_PPP`` folders; ``chunks[stage]`` are the blocks of its virtual chunks."""
    for stage, mine in enumerate(chunks):
        for rank in range(tp):
            models = [piece(weights, blocks, rank, tp) for blocks in mine]
            state = {"model": models[0]} if len(models) == 1 else {f"model{v}": m for v, m in enumerate(models)}
            target = root / "release" / f"mp_rank_{rank:02d}_{stage:03d}"
            target.mkdir(parents=True)
            torch.save({**state, "checkpoint_version": 3.0}, target / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")


@pytest.mark.parametrize(("chunks", "tp"), [
    ([[range(0, 1)], [range(1, 4)]], 1),
    ([[range(0, 2)], [range(2, 4)]], 2),
    ([[range(0, 1), range(2, 3)], [range(1, 2), range(3, 4)]], 1),
], ids=["uneven", "tp2", "virtual"])
def test_stages_are_joined(chunks: list[list[range]], tp: int, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    write(tmp_path, weights, chunks, tp)
    views = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    load_model_weights(tmp_path, views, CONFIG)
    assert all(torch.equal(views[name], weight) for name, weight in weights.items())


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    write(tmp_path, weights, [[range(0, 2)], [range(2, 4)]], 2)
    (tmp_path / "release" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    (tmp_path / "release" / "mp_rank_01_000").rmdir()
    with pytest.raises(CheckpointError, match="not 2 stages x 2 tensor ranks"):
        load_model_weights(tmp_path, weights, CONFIG)
