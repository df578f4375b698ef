"""Where a run's batches come from: bad clips are replaced and counted while it trains and while it evaluates."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest

from mindspeed_wan.config.flags import parse
from mindspeed_wan.errors import DataError
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.training.source import BatchSource
from tests.helpers.tiny import tiny_clips
from tests.helpers.world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A job whose third clip turns out to be bad when it is read: its annotation tells its size, nothing probes it."""
    made = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    clips = tmp_path / "clips"
    shutil.copytree(made.data, clips)
    for name in ("data.txt", "data.json"):
        (clips / name).write_text((clips / name).read_text().replace(str(made.data), str(clips)))
    sorted((clips / "videos").glob("*.mp4"))[2].write_bytes(b"junk")
    return World(made.model, clips, made.files)


def source(world: World, save: Path, *flags: str) -> BatchSource:
    config = parse(world.flags(save, "--eval-interval", "1", "--eval-iters", "1", *flags), {})
    return BatchSource(config, ParallelGroups(), get_platform("cpu"), 0)


@pytest.mark.parametrize("set_aside", [False, True])
def test_a_bad_clip_does_not_end_an_evaluation(world: World, tmp_path: Path, set_aside: bool) -> None:
    bad, good = world.data / "data.json", tiny_clips(num_clips=6, num_frames=5, size=(32, 48), fps=16, seed=3)
    flags = ["--mm-data", str(bad)]
    if set_aside:
        flags = ["--mm-data", str(good / "data.json"), "--valid-mm-data", str(bad)]
    batches = source(world, tmp_path / "run", "--max-bad-fraction", "0.5", *flags).evaluation()
    assert [len(batch) for batch in islice(batches, 6)] == [1] * 6
    written = tmp_path / "run" / "bad_samples.jsonl"
    if set_aside:
        assert not written.exists()  # it lists the clips of the training set
    else:
        assert [json.loads(line)["index"] for line in written.read_text().splitlines()] == [2]
    with pytest.raises(DataError, match=r"more than max_bad_fraction 0\.1"):
        list(islice(source(world, tmp_path / "strict", "--max-bad-fraction", "0.1", *flags).evaluation(), 6))
