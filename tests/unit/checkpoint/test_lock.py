"""The lock of a save folder: one holder, named; gone with its process; decided by its text without file locks."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mindspeed_wan.checkpoint.lock import LOCK_NAME, STALE_SECONDS, FolderLock, locked_target
from mindspeed_wan.errors import ConfigError


def _hold(folder: Path, ready: Any) -> None:
    FolderLock(folder).acquire()
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_the_second_job_is_refused_and_told_who_has_it(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(ConfigError, match=f"pid {holder.pid} on {os.uname().nodename}"):
        FolderLock(tmp_path, wait_seconds=0.2).acquire()


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    lock.touch()
    lock.release()
    assert not (tmp_path / LOCK_NAME).exists()
    lock.release()


@pytest.mark.parametrize(("note", "age", "taken"), [
    ("", 0, True), ("{", 0, True),
    ({"pid": os.getpid(), "host": os.uname().nodename, "since": "x"}, 0, False),
    ({"pid": 2**22 + 1, "host": os.uname().nodename, "since": "x"}, 0, True),
    ({"pid": 1, "host": "elsewhere", "since": "x"}, 1, False),
    ({"pid": 1, "host": "elsewhere", "since": "x"}, STALE_SECONDS + 1, True),
])
def test_without_file_locks_the_text_decides(note: Any, age: float, taken: bool, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    path = tmp_path / LOCK_NAME
    path.write_text(note if isinstance(note, str) else json.dumps(note))
    os.utime(path, (time.time() - age, time.time() - age))
    lock = FolderLock(tmp_path, wait_seconds=0.0)
    if taken:
        lock.acquire()
        lock.release()
    else:
        with pytest.raises(ConfigError, match=str(note["pid"])):
            lock.acquire()


def test_a_target_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with locked_target(target):
        with pytest.raises(ConfigError, match=f"another process writes this target .pid {os.getpid()} on"), \
                locked_target(target):
            pytest.fail("held twice")
        # Whoever opened the file before its holder removed it must not take the dead file for the lock.
        stale = os.open(tmp_path / "new" / ".out.lock", os.O_RDWR)
    with locked_target(target):
        assert not os.path.samestat(os.fstat(stale), os.stat(tmp_path / "new" / ".out.lock"))
    os.close(stale)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_without_locks_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_target(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
