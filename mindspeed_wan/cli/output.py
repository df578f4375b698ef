"""The ranks' output, line by line, to the terminal and to one log file."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mindspeed_wan.errors import ResourceError

CHUNK = 1 << 16


@dataclass
class _Stream:
    """One pipe of one rank and what it has written of a line that is not complete yet."""

    pipe: IO[bytes]
    target: IO[bytes]
    pending: bytearray = field(default_factory=bytearray)


class Output:
    """Reads the pipes of all ranks in one loop. Lines stay whole; a log file gets both streams.

    The launcher writes the log itself: a shell pipe into ``tee`` would hide the exit code, and dies of Ctrl-C before
    the ranks have said their last words.
    """

    def __init__(self, log_file: Path | None = None) -> None:
        self._selector = selectors.DefaultSelector()
        self._log: IO[bytes] | None = None
        if log_file is not None:
            try:
                log_file.parent.mkdir(parents=True, exist_ok=True)
                self._log = log_file.open("ab")
            except OSError as error:
                reason = error.strerror or str(error)
                fix = "choose another --log-file (SAVE_PATH in the launch scripts)"
                raise ResourceError(f"the log file cannot be written: {reason}", where=str(log_file), fix=fix) from None

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Forward the process's stdout and stderr from now on."""
        for pipe, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Stream(pipe, target))

    def forward(self, timeout: float) -> None:
        """Forward what there is, waiting at most ``timeout`` seconds for something."""
        if not self._selector.get_map():
            time.sleep(timeout)
            return
        for key, _ in self._selector.select(timeout):
            self._read(key.data)

    def drain(self) -> None:
        """Forward what is left in the pipes and close them; children of a dead rank may still hold the other end."""
        for key in list(self._selector.get_map().values()):
            while self._read(key.data):
                pass
            self._close(key.data)

    def say(self, text: str) -> None:
        """Write a line of the launcher's own to stderr and to the log."""
        self._emit(sys.stderr.buffer, f"[launcher] {text}\n".encode())

    def note(self, text: str) -> None:
        """Write a line to the log only."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.write(f"{text}\n".encode())

    def close(self) -> None:
        """Forward the rest and close the log."""
        self.drain()
        self._selector.close()
        if self._log is not None:
            self._log.close()

    def _read(self, stream: _Stream) -> bool:
        """Forward one chunk; False when the pipe is empty or closed."""
        try:
            data = os.read(stream.pipe.fileno(), CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close(stream)
            return False
        stream.pending += data
        end = max(stream.pending.rfind(b"\n"), stream.pending.rfind(b"\r")) + 1  # progress bars end with \r
        if end or len(stream.pending) > CHUNK:
            end = end or len(stream.pending)
            self._write(stream, bytes(stream.pending[:end]))
            del stream.pending[:end]
        return True

    def _close(self, stream: _Stream) -> None:
        if stream.pipe.closed:
            return
        self._selector.unregister(stream.pipe)
        self._write(stream, bytes(stream.pending))
        stream.pending.clear()
        stream.pipe.close()

    def _write(self, stream: _Stream, data: bytes) -> None:
        if data:
            self._emit(stream.target, data)

    def _emit(self, target: IO[bytes], data: bytes) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk must not stop the job; its own saves will say so
                self._log.write(data)
                self._log.flush()
        with contextlib.suppress(BrokenPipeError):  # the reader went away; the job and its log go on
            target.write(data)
            target.flush()
