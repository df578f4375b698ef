"""One output file, written front to back: filling, hashing and writing overlap, memory stays at a few buffers.

The caller's thread fills aligned 8 MiB buffers; a second thread takes each full buffer, completes the checksums that
stand in it and hashes it; a third writes it. Whole blocks go to disk with ``O_DIRECT`` where the file system allows:
the page cache would copy every byte once more and push everything else out of memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import Digest, FileRecord
from mindspeed_wan_converters.plan import Deferred
from mindspeed_wan_converters.progress import Progress
from mindspeed_wan_converters.tensors import damaged

BLOCK = 8 << 20
_ALIGNMENT = 4096
_BUFFERS = 4


@dataclass(frozen=True)
class Written:
    """A finished file: its size and hashes, and the CRC-32 of every slice in it, in order."""

    record: FileRecord
    slice_crcs: tuple[int, ...]


class StoppedError(Exception):
    """Another worker failed; this one stops without an error of its own."""


@dataclass(frozen=True)
class Expected:
    """The checksum that the source recorded for a tensor."""

    crc32: int
    name: str
    path: Path


_Step = Callable[[memoryview], None]


class OutputStream:
    """A file of ``size`` bytes being written; use as a context manager and call ``finish`` last.

    Args:
        path: the file; its folder exists.
        size: its planned size.
        progress: told every byte written.
        stop: set by another worker that failed; writing then ends with ``StoppedError``.
    """

    def __init__(self, path: Path, size: int, progress: Progress, stop: threading.Event) -> None:
        self._path, self._size, self._progress, self._stop = path, size, progress, stop
        length = min(BLOCK, -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT)
        self._buffers = [memoryview(mmap.mmap(-1, length)) for _ in range(_BUFFERS)]
        self._busy: list[Future[None] | None] = [None] * _BUFFERS
        self._number, self._used, self._written = 0, 0, 0
        self._digest, self._crcs = Digest(), list[int]()
        self._expected: dict[int, Expected] = {}
        self._steps: list[_Step] = []  # checksum work on the current buffer, in file order
        self._slice_start: int | None = None
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._descriptor, self._direct = _open_for_writing(path)

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._descriptor)

    # ---- filling ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def room(self, wanted: int) -> Iterator[memoryview]:
        """Give at most ``wanted`` bytes of the current buffer; the caller fills all of them."""
        buffer = self._buffers[self._number]
        view = buffer[self._used:self._used + wanted]
        yield view
        self._used += len(view)
        if self._used == len(buffer):
            self._flush()

    def put(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view, done = memoryview(data), 0
        while done < len(view):
            with self.room(len(view) - done) as target:
                target[:] = view[done:done + len(target)]
                done += len(target)

    def put_deferred(self, part: Deferred) -> None:
        """Append bytes that the hashing thread fills in once it has seen everything before them."""
        result: list[bytes] = []
        done = 0
        while done < part.size:
            with self.room(part.size - done) as target:
                begin = self._used
                end, start = begin + len(target), done

                def fill(buffer: memoryview, begin: int = begin, end: int = end, start: int = start) -> None:
                    if not result:
                        result.append(part.build(self._crcs))
                    buffer[begin:end] = result[0][start:start + end - begin]

                self._steps.append(fill)
                done += len(target)

    def begin_slice(self) -> None:
        """Start a tensor slice at the current position."""
        self._crcs.append(0)
        self._slice_start = self._used

    def end_slice(self, expected: Expected | None = None) -> None:
        """End the slice; its checksum is compared with ``expected`` when the file is finished."""
        self._mark_slice()
        self._slice_start = None
        if expected is not None:
            self._expected[len(self._crcs) - 1] = expected

    def _mark_slice(self) -> None:
        """Have the hashing thread add what the open slice has put into the current buffer."""
        if self._slice_start is None:
            return
        begin, end, index = self._slice_start, self._used, len(self._crcs) - 1

        def add(buffer: memoryview) -> None:
            self._crcs[index] = zlib.crc32(buffer[begin:end], self._crcs[index])

        self._steps.append(add)

    # ---- hashing and writing ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Hand the current buffer to the hashing and writing threads and wait for a free one."""
        if self._stop.is_set():
            raise StoppedError
        self._mark_slice()
        view = self._buffers[self._number][:self._used]
        steps, self._steps = self._steps, []
        hashed = self._hasher.submit(self._hash, view, steps)
        self._busy[self._number] = self._writer.submit(self._write, view, hashed)
        self._number, self._used = (self._number + 1) % _BUFFERS, 0
        if self._slice_start is not None:
            self._slice_start = 0
        waiting = self._busy[self._number]
        if waiting is not None:
            waiting.result()

    def _hash(self, view: memoryview, steps: list[_Step]) -> None:
        for step in steps:
            step(view)
        self._digest.update(view)

    def _write(self, view: memoryview, hashed: Future[None]) -> None:
        hashed.result()
        if self._direct and len(view) % _ALIGNMENT:
            self._leave_direct()
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], self._written + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._leave_direct()  # the file system took the flag but not the write
            if self._direct and done % _ALIGNMENT:
                self._leave_direct()
        self._written += len(view)
        self._progress.add(len(view))

    def _leave_direct(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def finish(self) -> Written:
        """Write the rest, flush to disk, compare checksums and return the hashes."""
        if self._used:
            self._flush()
        for future in self._busy:
            if future is not None:
                future.result()
        os.fsync(self._descriptor)
        for index, expected in self._expected.items():
            if self._crcs[index] != expected.crc32:
                raise damaged(expected.name, expected.path)
        record = self._digest.record()
        if record.size != self._size:
            raise AssertionError(f"{self._path}: planned {self._size} bytes, wrote {record.size}")
        return Written(record, tuple(self._crcs))


def _open_for_writing(path: Path) -> tuple[int, bool]:
    """Open ``path``; the second value tells whether writes bypass the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    return os.open(path, flags, 0o666), False
