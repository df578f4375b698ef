"""Progress in bytes with speed and time left: a line that updates on a terminal, one line every few seconds else."""

from __future__ import annotations

import sys
import threading
import time

_GIB = 1 << 30


def human(count: float) -> str:
    """Return a byte count for people: ``28.6 GB``."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class Progress:
    """Counts bytes from several threads and reports to stderr.

    Args:
        total: bytes to come.
        quiet: count only.
        label: what is being done.
    """

    def __init__(self, total: int, *, quiet: bool = False, label: str = "converting") -> None:
        self._total, self._quiet, self._label = total, quiet, label
        self._done, self._skipped, self._start, self._shown = 0, 0, time.monotonic(), time.monotonic()
        self._lock, self._terminal = threading.Lock(), sys.stderr.isatty()

    def add(self, count: int) -> None:
        """Count ``count`` more bytes and report now and then."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if not self._quiet and now - self._shown >= (0.5 if self._terminal else 5.0):
                self._shown = now
                self._print(now)

    def skip(self, count: int) -> None:
        """Count bytes that an earlier run has already written; they do not raise the speed shown."""
        with self._lock:
            self._skipped += count
            self._done += count

    def _print(self, now: float) -> None:
        speed = (self._done - self._skipped) / max(now - self._start, 1e-6)
        left = (self._total - self._done) / speed if speed else 0.0
        share = 100 * self._done / max(1, self._total)
        text = (f"{self._label} {human(self._done)} of {human(self._total)} ({share:.0f} %), "
                f"{human(speed)}/s, {int(left // 60)} min {int(left % 60):02d} s left")
        end = "\r" if self._terminal else "\n"
        print(f"\033[2K{text}" if self._terminal else text, end=end, file=sys.stderr, flush=True)

    def finish(self) -> float:
        """Erase the terminal line and return the seconds since the start."""
        if self._terminal and not self._quiet:
            print("\033[2K", end="\r", file=sys.stderr, flush=True)
        return time.monotonic() - self._start
