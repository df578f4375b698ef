"""Both experts side by side on harder data: images and clips of several sizes, first frames, damaged clips."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.joint import assert_same_run, both_flags, finished, run_joint
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, edit_json, make_world, train_rank
from tests.launches.test_pretrain_buckets import world as mixed

__all__ = ["mixed"]  # a fixture: balanced buckets
pytestmark = pytest.mark.slow


def compare(world: World, folder: Path, ranks: tuple[int, int], *flags: str, batch: int = 4, iters: int = 4) -> None:
    """Train both experts in one job and each in its own, and compare."""
    argv = world.flags(folder / "joint", *both_flags(world), "--expert-ranks", f"{ranks[0]},{ranks[1]}", *flags,
                       batch=batch, iters=iters)
    assert finished(run_joint(sum(ranks), argv))
    for expert, count in zip(("high", "low"), ranks):
        run_ranks(train_rank, count, world.flags(folder / expert, *flags, expert=expert, batch=batch, iters=iters),
                  init=count > 1)
        assert_same_run(folder / "joint" / expert, folder / expert)


def test_balanced_buckets_and_several_batches_encoded_at_once(mixed: World, tmp_path: Path) -> None:
    for expert in ("high", "low"):
        edit_json(mixed.files / f"model_{expert}.json", tmp_path / f"model_{expert}.json", encoder_offload_interval=3)
    shutil.copy(mixed.files / "data.json", tmp_path / "data.json")
    compare(replace(mixed, files=tmp_path), tmp_path, (1, 2), "--micro-batch-size", "2", iters=6)


def test_first_frames(tmp_path: Path) -> None:
    world = make_world(tmp_path / "files", task="i2v", num_frames=5, size=(32, 48))
    compare(world, tmp_path, (1, 1), batch=2, iters=3)


def test_clips_that_do_not_decode_are_replaced_and_listed_for_both(tmp_path: Path) -> None:
    world = make_world(tmp_path / "files", num_frames=5, size=(32, 48))
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    for file in (*data.glob("*.txt"), *data.glob("*.json"), world.files / "data.json"):
        file.write_text(file.read_text().replace(str(world.data), str(data)))
    clip = sorted(data.rglob("*.mp4"))[2]
    content = clip.read_bytes()
    clip.write_bytes(content[:600] + bytes(len(content) - 600))
    compare(world, tmp_path, (1, 1), "--max-bad-fraction", "0.5", batch=2, iters=6)
    for expert in ("high", "low"):
        files = [folder / expert / "bad_samples.jsonl" for folder in (tmp_path, tmp_path / "joint")]
        listed = [{json.loads(line)["index"] for line in file.read_text().splitlines()} for file in files]
        assert listed[0] == listed[1] and len(listed[0]) == 1
