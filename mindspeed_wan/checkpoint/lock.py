"""One job per save folder: a lock that names its holder, and that no crash leaves behind.

The lock is a POSIX record lock on ``.job.lock``: the kernel (or the lock manager of a network file system) drops it
when its process ends, however it ends, and forked data workers do not inherit it. The file's text says who holds it.
Where the file system has no locks at all, the text decides: a process of this host is looked up, one of another host
counts as alive while it touches the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.manifest import disk_error
from mindspeed_wan.errors import ConfigError

LOCK_NAME = ".job.lock"
WAIT_SECONDS = 3.0
"""How long a job waits for a predecessor that is on its way out."""
STALE_SECONDS = 900.0
"""Without file locks: a holder on another host that was silent for so long is gone."""
_TOUCH_SECONDS = 30.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The right to write checkpoints into ``folder``; ``acquire`` it on rank 0.

    Args:
        folder: the save folder; created when missing.
        wait_seconds: how long ``acquire`` waits for the current holder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, wait_seconds: float = WAIT_SECONDS) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._wait = wait_seconds
        self._descriptor: int | None = None
        self._touched = 0.0

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: another job holds it; names its process and host.
            ResourceError: the folder cannot be written.
        """
        deadline = time.monotonic() + self._wait
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                if time.monotonic() >= deadline:
                    raise ConfigError(f"another job writes this folder ({self._holder()})", where=str(self.path.parent),
                                      fix="wait for it to end, stop it, or set another --save")
                time.sleep(0.1)
        except OSError as error:
            raise disk_error(error, self.path) from None

    def touch(self) -> None:
        """Show that the holder is alive; cheap, may be called at every step. Nothing to do for a rank without it."""
        if self._descriptor is not None and time.monotonic() - self._touched > _TOUCH_SECONDS:
            os.utime(self._descriptor)
            self._touched = time.monotonic()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not self._may_take(descriptor) or not _is_still(self.path, descriptor):
                os.close(descriptor)
                return False
        except OSError:
            os.close(descriptor)
            raise
        note = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(note).encode() + b"\n")
        self._descriptor = descriptor
        return True

    def _may_take(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return not _is_alive(_read(self.path), time.time() - os.fstat(descriptor).st_mtime)

    def _holder(self) -> str:
        note = _read(self.path)
        return f"pid {note['pid']} on {note['host']}, since {note['since']}" if note else "just started"


@contextmanager
def locked_target(target: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock beside a target that is about to be written, so that no two processes use one staging folder.

    Raises:
        ConfigError: another process holds it.
        ResourceError: the folder of the target cannot be written.
    """
    target = Path(target)
    path = target.with_name(f".{target.name}.lock")
    descriptor = _locked_file(path, target)
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
        except OSError as error:
            raise disk_error(error, path) from None
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked_file(path: Path, target: Path) -> int:
    """Open and lock ``path``; a file that its holder removed in between is left for the new one."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(error, path) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor  # nothing here can lock; commands on such a disk are their user's to keep apart
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "just started"
            os.close(descriptor)
            raise ConfigError(f"another process writes this target ({holder})", where=str(target),
                              fix="wait for it to end, or choose another target") from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Return the note of the holder, empty when there is none or it is torn."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return note if {"pid", "host", "since"} <= set(note) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _is_alive(note: dict[str, Any], silent_seconds: float) -> bool:
    """Say whether the process of a note may still run."""
    if not note:
        return False
    if note["host"] != os.uname().nodename:
        return silent_seconds < STALE_SECONDS
    try:
        os.kill(int(note["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """False when a holder removed the file between our opening and locking it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
