"""Training checkpoints on one rank: whole or absent, damage found, the previous one used, old ones removed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.background import BackgroundSave
from mindspeed_wan.checkpoint.manifest import TRACKER_NAME
from mindspeed_wan.checkpoint.sources import Found
from mindspeed_wan.errors import CheckpointError, ResourceError
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.optimizer import AdamW

CARD = {"task": "t2v", "expert": "high", "boundary": 0.875, "shift": 5.0}


class Killed(BaseException):
    """Stands for a kill at a place of our choice."""


class Tiny:
    """A model, its optimizer and its average after ``steps`` updates."""

    def __init__(self, steps: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(steps)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
        self.views = {name: p.detach() for name, p in self.model.named_parameters()}
        self.optimizer = AdamW(self.model.named_parameters())
        self.ema = Ema(self.optimizer.masters(), 0.9)
        for _ in range(steps):
            for p in self.model.parameters():
                p.grad = torch.randn_like(p)
            self.optimizer.step(1e-2, 0.1)
            self.ema.update(self.optimizer.masters())

    def state(self, **options: bool) -> dict[str, torch.Tensor]:
        return dcp.state_views(self.views, self.optimizer, ema=self.ema.averages, **options)

    def save(self, root: Path, iteration: int, keep_last: int | None = None, **options: bool) -> Path:
        progress = dcp.Progress(iteration=iteration, consumed_samples=4 * iteration,
                                optimizer_steps=self.optimizer.steps)
        return dcp.save(root, self.state(**options), dcp.Record(progress, CARD, keep_last))

    def load(self, root: Path, **options: object) -> dcp.Progress:
        found = dcp.newest(root)
        assert found is not None
        return dcp.load(found, self.views, self.optimizer, ema=self.ema.averages, **options)  # type: ignore[arg-type]


def equal(a: Tiny, b: Tiny) -> bool:
    mine, other = a.state(), b.state()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_round_trip_restores_every_bit_and_the_tracker_names_it(tmp_path: Path) -> None:
    saved, loaded = Tiny(3), Tiny()
    folder = saved.save(tmp_path, 3)
    progress = loaded.load(tmp_path)
    assert equal(saved, loaded)
    assert (progress.iteration, progress.consumed_samples, loaded.optimizer.steps) == (3, 12, 3)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert folder.name == "iter_0000003"
    assert {"wan.json", "training.json", "manifest.json", ".metadata"} <= {p.name for p in folder.iterdir()}
    assert not list(tmp_path.glob(".*.tmp"))


def test_plain_torch_reads_what_we_write(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as torch_dcp

    saved = Tiny(2)
    folder = saved.save(tmp_path, 2)
    target = {"model": {name: torch.zeros_like(view) for name, view in saved.views.items()}}
    torch_dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(target["model"][name], view) for name, view in saved.views.items())


def test_bf16_parameters_are_saved_as_their_masters(tmp_path: Path) -> None:
    saved, loaded, plain = Tiny(3, torch.bfloat16), Tiny(0, torch.bfloat16), Tiny()
    saved.save(tmp_path, 3)
    loaded.load(tmp_path)
    assert equal(saved, loaded)
    assert all(torch.equal(loaded.views[n], saved.views[n]) for n in saved.views)
    plain.load(tmp_path)  # a run with fp32 parameters goes on from the same file
    assert all(torch.equal(plain.views[n], saved.optimizer.masters()[n]) for n in saved.views)


def test_without_optimizer_state_resuming_is_refused_unless_asked_for(tmp_path: Path) -> None:
    Tiny(3).save(tmp_path, 3, with_moments=False)
    with pytest.raises(CheckpointError, match="without optimizer state"):
        Tiny().load(tmp_path)
    fresh = Tiny()
    fresh.load(tmp_path, with_moments=False)
    assert fresh.optimizer.steps == 0


def test_an_average_that_was_not_saved_starts_from_the_weights(tmp_path: Path) -> None:
    saved, loaded = Tiny(3), Tiny()
    state = dcp.state_views(saved.views, saved.optimizer)
    dcp.save(tmp_path, state, dcp.Record(dcp.Progress(iteration=3), CARD))
    loaded.load(tmp_path)
    assert all(torch.equal(loaded.ema.averages[n], saved.views[n]) for n in saved.views)


def test_other_expert_and_other_model_are_refused(tmp_path: Path) -> None:
    Tiny(1).save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="high-noise expert"):
        Tiny().load(tmp_path, expert="low")
    other = Tiny()
    other.views = {"0.weight": torch.zeros(5, 7)}
    other.optimizer = AdamW([("0.weight", nn.Parameter(other.views["0.weight"]))])
    with pytest.raises(CheckpointError, match=r"0\.weight \[5, 6\] instead of \[5, 7\]"):
        dcp.load(Found(tmp_path / "iter_0000001", "dcp", 1), other.views, other.optimizer)


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero_page", "no_metadata", "half_removed"])
def test_damage_to_the_newest_is_reported_and_the_previous_used(damage: str, tmp_path: Path) -> None:
    first = Tiny(1)
    first.save(tmp_path, 1)
    folder = Tiny(2).save(tmp_path, 2)
    data = next(folder.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[random.Random(0).randrange(len(content))] ^= 4
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(content[:-1])
    elif damage == "zero_page":
        content[1000:1400] = bytes(400)
        data.write_bytes(content)
    elif damage == "no_metadata":
        (folder / ".metadata").unlink()
    else:
        (folder / "manifest.json").unlink()
    warnings: list[str] = []
    found = dcp.newest(tmp_path, warn=warnings.append)
    assert found is not None and found.iteration == 1
    assert len(warnings) == 1
    loaded = Tiny()
    dcp.load(found, loaded.views, loaded.optimizer, ema=loaded.ema.averages)
    assert equal(first, loaded)
    with pytest.raises(CheckpointError):
        dcp.newest(tmp_path, strict=True)


@pytest.mark.parametrize("damage", ["deep", "long name", "surrogate", "read error"])
def test_what_cannot_even_be_read_counts_as_damage(damage: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    Tiny(1).save(tmp_path, 1)
    folder = Tiny(2).save(tmp_path, 2)
    path = folder / "manifest.json"
    if damage == "deep":
        path.write_text("[" * 100_000)
    elif damage == "read error":
        real = dcp.manifest.hash_file

        def failing(file: Path, **options: bool) -> object:
            if file.parent == folder:
                raise OSError(errno.EIO, "Input/output error")
            return real(file, **options)

        monkeypatch.setattr(dcp.manifest, "hash_file", failing)
    else:
        content = {**json.loads(path.read_text()), "version": 1}
        content.pop("seal")
        name = "x" * 5000 if damage == "long name" else "\ud800"
        content["files"][name] = {"size": 1, "crc32": "0", "sha256": ""}
        path.write_text(json.dumps(content))
    warnings: list[str] = []
    found = dcp.newest(tmp_path, warn=warnings.append)
    assert found is not None and found.iteration == 1 and "iter_0000002 is damaged" in warnings[0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"iteration": Infinity}', '{"iteration": null}', "[1]", "{"])
def test_a_progress_file_that_makes_no_sense_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / dcp.PROGRESS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        dcp.read_progress(tmp_path)


def test_a_progress_file_of_a_later_version_is_read(tmp_path: Path) -> None:
    (tmp_path / dcp.PROGRESS_FILE).write_text('{"iteration": 2, "something_new": [1]}')
    assert dcp.read_progress(tmp_path).iteration == 2


def test_every_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    folder = Tiny(1).save(tmp_path, 1)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        dcp.newest(tmp_path, warn=lambda text: None)


def killed_before_the_tracker_moved(root: Path, iteration: int) -> None:
    """Save ``iteration`` in a process that dies between putting the folder in place and moving the tracker."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(dcp.manifest, "write_tracker", Mock(side_effect=Killed))
        Tiny(iteration).save(root, iteration)


def test_a_committed_folder_the_tracker_does_not_name_yet_is_used(tmp_path: Path) -> None:
    killed_before_the_tracker_moved(tmp_path / "first", 1)
    assert dcp.newest(tmp_path / "first") is not None
    Tiny(1).save(tmp_path, 1)
    killed_before_the_tracker_moved(tmp_path, 2)
    assert (tmp_path / TRACKER_NAME).read_text() == "1"
    found = dcp.newest(tmp_path)
    assert found is not None and found.iteration == 2
    (tmp_path / TRACKER_NAME).unlink()
    assert dcp.newest(tmp_path) is not None


def test_the_first_save_over_converted_weights_is_used_when_the_tracker_still_names_them(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / TRACKER_NAME).write_text("release")
    killed_before_the_tracker_moved(tmp_path, 3)
    found = dcp.newest(tmp_path)
    assert found is not None and found.iteration == 3


def test_a_tracker_set_back_by_hand_decides(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        Tiny(iteration).save(tmp_path, iteration)
    (tmp_path / TRACKER_NAME).write_text("1\r\n")
    warnings: list[str] = []
    found = dcp.newest(tmp_path, warn=warnings.append)
    assert found is not None and found.iteration == 1
    assert len(warnings) == 1 and "the newer iter_0000002, iter_0000003 are not used" in warnings[0]


def test_a_note_of_a_save_that_never_came_to_be_is_not_believed(tmp_path: Path) -> None:
    for iteration in (1, 2):
        Tiny(iteration).save(tmp_path, iteration)
    (tmp_path / TRACKER_NAME).write_text("1")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(dcp.manifest, "commit_folder", Mock(side_effect=Killed))
        Tiny(5).save(tmp_path, 2)  # killed before it could replace the older folder of this name
    found = dcp.newest(tmp_path, warn=lambda text: None)
    assert found is not None and found.iteration == 1


def test_what_is_newer_than_the_start_is_moved_aside_whole(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        Tiny(iteration).save(tmp_path, iteration)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    aside = dcp.set_aside(tmp_path, above=1, files=("metrics.jsonl", "validation.jsonl"))
    assert aside == tmp_path / "abandoned_1"
    assert sorted(path.name for path in aside.iterdir()) == [
        "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt", "metrics.jsonl"]
    assert (dcp.newest(tmp_path), dcp.newest(aside)) == (
        Found(tmp_path / "iter_0000001", "dcp", 1), Found(aside / "iter_0000003", "dcp", 3))
    assert dcp.set_aside(tmp_path, above=1) is None
    Tiny(4).save(tmp_path, 2)
    assert dcp.set_aside(tmp_path, above=None) == tmp_path / "abandoned_2"
    assert dcp.newest(tmp_path) is None and not (tmp_path / TRACKER_NAME).exists()


def test_a_move_aside_that_was_killed_never_brings_the_branch_back(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        Tiny(iteration).save(tmp_path, iteration)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(dcp.os, "rename", Mock(side_effect=Killed))
        dcp.set_aside(tmp_path, above=1)
    found = dcp.newest(tmp_path, warn=lambda text: None)
    assert found is not None and found.iteration == 1
    aside = dcp.set_aside(tmp_path, above=1)
    assert aside is not None and len(list(aside.glob("iter_*"))) == 2


def test_a_tracker_that_names_an_iteration_which_is_gone_is_reported(tmp_path: Path) -> None:
    Tiny(1).save(tmp_path, 1)
    (tmp_path / TRACKER_NAME).write_text("7")
    warnings: list[str] = []
    found = dcp.newest(tmp_path, warn=warnings.append)
    assert found is not None and found.iteration == 1 and "names iteration 7" in warnings[0]
    with pytest.raises(CheckpointError, match="the one before is iter_0000001"):
        dcp.newest(tmp_path, strict=True)
    (tmp_path / "iter_0000001").rename(tmp_path / "iter_0000009")
    with pytest.raises(CheckpointError, match="newer ones are iter_0000009"):
        dcp.newest(tmp_path)


@pytest.mark.parametrize("name", ["iter_9", "iter_00000009", "iter_" + 7 * "\u0661", "iter_\u00b2"])
def test_other_spellings_of_a_number_are_not_checkpoints(name: str, tmp_path: Path) -> None:
    folder = Tiny(1).save(tmp_path, 1)
    shutil.copytree(folder, tmp_path / name)
    assert dcp.complete_iterations(tmp_path) == [(1, folder)]


def test_a_renamed_checkpoint_is_not_taken_for_a_newer_one(tmp_path: Path) -> None:
    folder = Tiny(1).save(tmp_path, 1)
    shutil.copytree(folder, tmp_path / "iter_0000009")
    (tmp_path / TRACKER_NAME).write_text("9")
    warnings: list[str] = []
    found = dcp.newest(tmp_path, warn=warnings.append)
    assert found is not None and found.iteration == 1 and "holds iteration 1" in warnings[0]


def test_retention_keeps_the_newest_and_leaves_strangers_alone(tmp_path: Path) -> None:
    (tmp_path / "iter_0000009").mkdir(parents=True)
    (tmp_path / "iter_0000009" / "note.txt").write_text("not ours")
    (tmp_path / "release").mkdir()
    for iteration in range(1, 6):
        Tiny(1).save(tmp_path, iteration, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "iter_0000004", "iter_0000005", "iter_0000009", "release"]


def test_retention_leaves_what_is_newer_than_the_tracker(tmp_path: Path) -> None:
    for iteration in (1, 2, 9):
        Tiny(1).save(tmp_path, iteration)
    (tmp_path / TRACKER_NAME).write_text("2")
    Tiny(1).save(tmp_path, 3, keep_last=2)
    assert [iteration for iteration, _ in dcp.complete_iterations(tmp_path)] == [9, 3, 2]


def test_retention_removes_a_link_and_not_what_it_points_at(tmp_path: Path) -> None:
    folder = Tiny(1).save(tmp_path / "run", 1)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    Tiny(2).save(tmp_path / "run", 2, keep_last=1)
    assert [path.name for path in (tmp_path / "run").glob("*iter*") if path.is_dir()] == ["iter_0000002"]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_a_removal_that_was_interrupted_is_finished_by_the_next_save(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2):
        Tiny(1).save(tmp_path, iteration)
    with monkeypatch.context() as patched:
        patched.setattr(dcp.shutil, "rmtree", lambda *_, **__: None)  # killed right after the rename
        dcp.remove_old(tmp_path, 1)
    assert [i for i, _ in dcp.complete_iterations(tmp_path)] == [2] and (tmp_path / ".iter_0000001.tmp").is_dir()
    Tiny(1).save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["iter_0000002", "iter_0000003"]


def test_saving_again_over_the_same_iteration_and_over_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".iter_0000002.tmp").mkdir(parents=True)
    (tmp_path / ".iter_0000002.tmp" / "junk").write_text("x")
    Tiny(1).save(tmp_path, 2)
    again, loaded = Tiny(2), Tiny()
    folder = again.save(tmp_path, 2)
    assert not (folder / "junk").exists()
    loaded.load(tmp_path)
    assert equal(again, loaded)


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    saved = Tiny(1)
    saved.save(tmp_path, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(ResourceError):
            Tiny(2).save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = Tiny()
    assert loaded.load(tmp_path).iteration == 1
    assert equal(saved, loaded)


def test_background_save_holds_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    run, expected = Tiny(2), Tiny(2)
    pending = BackgroundSave(tmp_path, run.state(), dcp.Record(dcp.Progress(iteration=2), CARD), None)
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    run.optimizer.step(1.0, 0.0)  # training goes on while the bytes are written
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
    folder = pending.finish()
    assert folder.is_dir() and dcp.newest(tmp_path) is not None
    loaded = Tiny()
    loaded.load(tmp_path)
    assert equal(expected, loaded)


KILLED = """
import os, sys, threading, time
from pathlib import Path
from tests.unit.checkpoint.test_dcp import Tiny
root = Path(sys.argv[1])
Tiny(1).save(root, 1)
print("ready", flush=True)
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os.kill(os.getpid(), 9)), daemon=True).start()
for i in range(2, 1000):
    Tiny(1).save(root, i, keep_last=2)
"""


@pytest.mark.parametrize("delay", [0.01, 0.037])
def test_kill_at_any_moment_leaves_a_loadable_checkpoint(delay: float, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(delay)], env=environment, check=False,
                            capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    loaded = Tiny()
    progress = loaded.load(tmp_path)
    assert equal(Tiny(1), loaded)
    named = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert progress.iteration in (named, named + 1)
    assert json.loads((tmp_path / f"iter_{progress.iteration:07d}" / "training.json").read_text())
    Tiny(1).save(tmp_path, progress.iteration + 1)  # the next save clears what the kill left
    assert not list(tmp_path.glob(".*.tmp"))
