"""Checkpoints under fire: kills during saves, rot, leftovers, retention, torn trackers, full disks, file modes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.manifest import TRACKER_NAME, verify_manifest, write_manifest
from mindspeed_wan.checkpoint.sources import find
from mindspeed_wan.errors import CheckpointError, ResourceError, WanError
from tests.faults import victims
from tests.faults.harness import Tally, Victim, wait_until
from tests.helpers.spawn import run_ranks
from tests.unit.checkpoint.test_dcp import Tiny, equal


def _tracker(root: Path) -> int:
    return int((root / TRACKER_NAME).read_text())


def _kill_one(root: Path, rng: random.Random, *, background: bool) -> None:
    """Kill -9 a process that does nothing but save, then resume from what it left."""
    victim = Victim(victims.save_for_ever, str(root), background)
    wait_until((root / TRACKER_NAME).exists, "the first save", alive=victim)
    time.sleep(rng.random() * 0.3)
    assert victim.kill() == -9
    named = _tracker(root)
    verify_manifest(root / f"iter_{named:07d}", full=True)  # what the tracker names is whole
    warnings: list[str] = []
    found = dcp.newest(root, full_hash=True, warn=warnings.append)
    assert found is not None and found.iteration in (named, named + 1), f"{found} but the tracker says {named}"
    assert not warnings, warnings
    loaded = Tiny()
    progress = dcp.load(found, loaded.views, loaded.optimizer, ema=loaded.ema.averages)
    assert progress.iteration == found.iteration and equal(loaded, victims.content(found.iteration))
    Tiny(1).save(root, found.iteration + 1, keep_last=2)  # the next save clears what the kill left
    assert not list(root.glob(".iter_*")) and _tracker(root) == found.iteration + 1


def killed_saves(tally: Tally, count: int, folder: Path) -> None:
    """T1: kill -9 at random moments of a save; the run resumes and nothing partial was ever named."""
    for number in range(count):
        with tally.case(number):
            _kill_one(folder / f"sync{number}", random.Random(number), background=False)


def killed_background_saves(tally: Tally, count: int, folder: Path) -> None:
    """T2: the same between submission and completion of a background save; one case in ten loses one of two ranks."""
    for number in range(count // 10):
        with tally.case(f"one of two ranks, {number}"):
            _lose_one_rank(folder / f"two{number}")
    for number in range(count - count // 10):
        with tally.case(number):
            _kill_one(folder / f"async{number}", random.Random(number), background=True)


def _lose_one_rank(root: Path) -> None:
    """Kill -9 one of two ranks after it has submitted its part: the tracker stays where it was."""
    root.mkdir()
    ranks = [Victim(victims.lose_a_rank, rank, str(root / "store"), str(root), log=root / f"{rank}.log")
             for rank in range(2)]
    assert ranks[1].wait() == -9
    assert ranks[0].wait() == 6, ranks[0].output()[-500:]
    found = dcp.newest(root, full_hash=True)
    assert found is not None and found.iteration == 1 == _tracker(root)
    assert not (root / "iter_0000002").exists()


# ---- rot -----------------------------------------------------------------------------------------------------


def _damage(kind: str, folder: Path, rng: random.Random) -> Path:
    """Damage one file of a checkpoint: a bit, its end, or 4 KiB of it. Returns the file."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    if kind == "bit":
        path = rng.choice(files)
        raw = bytearray(path.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "truncation":
        path = rng.choice(files)
        raw = bytearray(path.read_bytes())
        del raw[rng.randrange(len(raw)):]
    else:
        path = rng.choice([p for p in files if p.suffix == ".distcp" or p.name == ".metadata"])
        raw = bytearray(path.read_bytes())
        start = rng.randrange(0, max(1, len(raw) - 512))
        raw[start : start + 4096] = bytes(len(raw[start : start + 4096]))
    path.write_bytes(raw)
    return path


def rot(tally: Tally, count: int, folder: Path) -> None:
    """T3: every damaged newest checkpoint is found, named in one line, and the one before it is used."""
    first = Tiny(1)
    first.save(folder, 1)
    newest = Tiny(2).save(folder, 2)
    spare = folder / "spare"
    shutil.copytree(newest, spare)
    kinds = ["bit"] * (count * 100 // 160) + ["truncation"] * (count * 30 // 160)
    kinds += ["zero page"] * (count - len(kinds))
    for number, kind in enumerate(kinds):
        with tally.case(f"{number} {kind}"):
            path = _damage(kind, newest, random.Random(number))
            warnings: list[str] = []
            found = dcp.newest(folder, warn=warnings.append)
            assert found is not None and found.iteration == 1, f"{path.name} was not noticed"
            assert len(warnings) == 1 and path.name in warnings[0] and "\n" not in warnings[0], warnings
            _strict_refuses(folder)
            loaded = Tiny()
            dcp.load(found, loaded.views, loaded.optimizer, ema=loaded.ema.averages)
            assert equal(first, loaded)
        shutil.rmtree(newest)
        shutil.copytree(spare, newest)


def _strict_refuses(root: Path) -> None:
    try:
        dcp.newest(root, strict=True)
    except CheckpointError as error:
        assert error.exit_code == 4
    else:
        raise AssertionError("--strict-resume used a damaged checkpoint")


# ---- leftovers and retention ---------------------------------------------------------------------------------


def _leave(root: Path, iteration: int, rng: random.Random) -> None:
    """Leave what an interrupted run of any kind may leave at ``iteration``."""
    name = f"iter_{iteration:07d}"
    for path in rng.sample([name, f".{name}.tmp", f".{name}.old", f".iter_{iteration + 3:07d}.tmp"], rng.randint(1, 4)):
        (root / path).mkdir()
        for file in rng.sample(["__0_0.distcp", "__1_0.distcp", ".metadata", "wan.json", "training.json", "x/y"],
                               rng.randint(0, 6)):
            (root / path / file).parent.mkdir(exist_ok=True)
            (root / path / file).write_bytes(rng.randbytes(rng.randint(0, 300)))


def _save_over_leftovers(rank: int, world_size: int, root: str, count: int) -> int:
    from mindspeed_wan.parallel.agreement import barrier

    passed = 0
    for number in range(count):
        case, rng = Path(root) / str(number), random.Random(number)
        if rank == 0:
            case.mkdir()
            _leave(case, 5, rng)
        barrier()
        state = {f"model.part{rank}": torch.full((64,), float(number))}
        folder = dcp.save(case, state, dcp.Record(dcp.Progress(iteration=5), {"task": "t2v"}))
        verify_manifest(folder, full=True)
        kept = {p.name for p in folder.iterdir()}
        whole = kept == {"__0_0.distcp", "__1_0.distcp", ".metadata", "wan.json", "training.json", "manifest.json"}
        passed += whole and _tracker(case) == 5 and not [p for p in case.glob(".iter_*")]
        barrier()
    return passed


def leftovers(tally: Tally, count: int, folder: Path) -> None:
    """T4: two ranks save over whatever an interrupted run left under the same names; nobody hangs."""
    counts = run_ranks(_save_over_leftovers, 2, str(folder), count, timeout=60 + 5 * count)
    tally.add(min(counts), count, "saves over leftovers")


def retention(tally: Tally, count: int, folder: Path) -> None:
    """T5: exactly the newest complete checkpoints stay; partial and strange folders are neither counted nor removed."""
    for number in range(count):
        with tally.case(number):
            rng, root = random.Random(number), folder / str(number)
            numbers = rng.sample(range(1, 60), rng.randint(2, 9))
            good = sorted(rng.sample(numbers, rng.randint(1, len(numbers))), reverse=True)
            for iteration in numbers:
                path = root / f"iter_{iteration:07d}"
                path.mkdir(parents=True)
                (path / "__0_0.distcp").write_bytes(b"x")
                if iteration in good:
                    (path / dcp.PROGRESS_FILE).write_text("{}")
                    write_manifest(path)
            strangers = rng.sample(["iter_final", "release", "iter_0000007.bak", "logs", ".iter_0000061.tmp"], 3)
            for name in strangers:
                (root / name).mkdir()
            named = rng.choice(good[:2])
            (root / TRACKER_NAME).write_text(str(named))
            keep = rng.randint(1, 3)
            dcp.remove_old(root, keep)
            left = {p.name for p in root.iterdir() if p.is_dir()}
            newer = {i for i in good if i > named}  # of a branch that was left: somebody may want it
            wanted = {named, *newer, *[i for i in good if i < named][: keep - 1]}
            expected = {f"iter_{i:07d}" for i in wanted | (set(numbers) - set(good))} | set(strangers)
            assert left == expected, f"keep {keep}, good {good}, tracker {named}: {left ^ expected}"


TORN = [b"", b" ", b"\n", b"1000x", b"-1", b"+1", b"1.5", b"1e3", b"0x10", b"release\nx", b"Release", b"releas", b"\0",
        b"\0\0\0\0", b"7\0", b"\xff\xfe7\0", b"\xef\xbb\xbf", b"1 2", b"None", b"nan", b"true", b"[1]", b'"1"',
        b"iter_1", b"iter_0000001", b"../1", b"1/..", b"9" * 100, b"x" * (10 << 20), "٣".encode(), b"999", b"1\n2",
        b"\x1a"]


def torn_trackers(tally: Tally, count: int, folder: Path) -> None:
    """T6: a torn tracker ends in one line and exit code 4, for training and for reading weights."""
    Tiny(1).save(folder, 1)
    for raw in TORN[:count]:
        with tally.case(raw[:20]):
            (folder / TRACKER_NAME).write_bytes(raw)
            if raw == b"999":
                # An honest number of a folder that is gone: training scans and goes on from the newest whole one.
                found = dcp.newest(folder)
                assert found is not None and found.iteration == 1
            else:
                _refused(lambda: dcp.newest(folder))
            _refused(lambda: find(folder))


def _refused(action: Callable[[], Any]) -> None:
    try:
        action()
    except WanError as error:
        assert error.exit_code == 4 and error.where and TRACKER_NAME in error.where, error
        assert len(str(error).splitlines()) <= 2
    else:
        raise AssertionError("was accepted")


# ---- disks and modes -----------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk_saves(tally: Tally, count: int, folder: Path) -> None:
    """T18, saves: a save that runs out of disk says so (exit 3), and the checkpoint before it is untouched."""
    first = Tiny(1)
    largest = max(p.stat().st_size for p in first.save(folder, 1).iterdir())
    for number in range(count):
        with tally.case(number):
            with file_size_limit(random.Random(number).randrange(largest)):
                try:
                    Tiny(2).save(folder, 2)
                except ResourceError as error:
                    assert error.exit_code == 3
                else:
                    raise AssertionError("a save without disk reported success")
            found = dcp.newest(folder, warn=lambda text: None)
            assert found is not None and found.iteration == 1 and _tracker(folder) == 1
            loaded = Tiny()
            dcp.load(found, loaded.views, loaded.optimizer, ema=loaded.ema.averages)
            assert equal(first, loaded)


def file_modes(tally: Tally, count: int, folder: Path) -> None:
    """Checkpoints get the modes that the umask asks for, so that a group can share a save folder."""
    for number, mask in enumerate((0o022, 0o002, 0o027, 0o077)[:count]):
        before = os.umask(mask)
        try:
            with tally.case(oct(mask)):
                saved = Tiny(1).save(folder / str(number), 1)
                for path in (saved, saved.parent, *saved.rglob("*"), saved.parent / TRACKER_NAME):
                    wanted = (0o777 if path.is_dir() else 0o666) & ~mask
                    assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path.name}: {oct(path.stat().st_mode)}"
        finally:
            os.umask(before)
