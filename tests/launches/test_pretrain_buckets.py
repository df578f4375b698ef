"""Images and clips of several sizes in one run, tokens balanced: every layout and a resumed run agree."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.odd_media import numbered_frames, write_stream
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, losses, make_world, metrics, train_rank, write_json

ITERATIONS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for number in range(6):
        size = (32, 48) if number < 4 else (48, 64)
        Image.fromarray(numbered_frames(number + 1, *size)[number]).save(folder / f"{number}.png")
        write_stream(folder / f"{number}.mp4", numbered_frames(9 if number < 4 else 5, 32, 48))
        rows += [{"path": f"{number}.{kind}", "cap": f"{kind} {number}"} for kind in ("png", "mp4")]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.txt").write_text(f"{folder},d.jsonl\n")
    world = make_world(folder / "files")
    data = json.loads((world.files / "data.json").read_text())
    data["dataset_param"]["basic_parameters"] = {"data_path": str(folder / "data.txt")}
    data["dataset_param"]["preprocess_parameters"] = {
        "num_frames": 9, "max_height": 32, "max_width": 48, "size_buckets": [[32, 48], [48, 64]],
        "frame_buckets": [1, 5, 9],
    }
    data["dataloader_param"] = {"balance_tokens": True, "drop_last": False}
    write_json(world.files / "data.json", data)
    return world


def train_with_log(rank: int, world_size: int, argv: list[str], log: str) -> None:
    """``train_rank`` with what it prints in a file (a forked rank keeps the standard output of the fork server)."""
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        train_rank(rank, world_size, argv)


def test_balanced_buckets_in_every_layout(world: World, tmp_path: Path) -> None:
    def train(name: str, ranks: int, *flags: str, iters: int = ITERATIONS, resume: bool = False) -> list[float]:
        argv = world.flags(tmp_path / name, *flags, iters=iters)
        if resume:
            argv[argv.index("--load") + 1] = str(tmp_path / name)
        run_ranks(train_rank, ranks, argv, init=ranks > 1)
        return losses(tmp_path / name)

    log = tmp_path / "log"
    run_ranks(train_with_log, 1, world.flags(tmp_path / "one", iters=ITERATIONS), str(log), init=False)
    reference, printed = losses(tmp_path / "one"), log.read_text()
    assert "clips per batch slot" in printed and "1x32x48: 3" in printed
    assert all(map(lambda row: row["loss"] > 0, metrics(tmp_path / "one")))
    assert train("pairs", 1, "--micro-batch-size", "2") == pytest.approx(reference, rel=1e-5)
    # One run that goes on with other numbers of data ranks in the middle of an epoch.
    train("chain", 2, "--use-torch-fsdp2", iters=2)
    train("chain", 1, iters=4, resume=True)
    chain = train("chain", 4, "--use-torch-fsdp2", resume=True)
    assert [row["consumed_samples"] for row in metrics(tmp_path / "chain")] == [4 * n for n in range(1, 7)]
    assert chain == pytest.approx(reference, rel=1e-5)
