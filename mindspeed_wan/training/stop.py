"""Stopping on request: SIGTERM and SIGUSR1 ask for a save at the next step, a second signal ends the process at once.

Slurm, Kubernetes and torchrun all announce the end of an allocation with SIGTERM; after the save the run exits with
75, which means "run the same command again and it goes on".
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal came, while used as a context manager around the loop.

    Args:
        after_minutes: also ask for a stop after this long (``--exit-duration-in-mins``).
    """

    def __init__(self, after_minutes: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._deadline = time.monotonic() + 60 * after_minutes if after_minutes is not None else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def wanted(self) -> bool:
        """True once this rank was asked to stop. Ranks agree on it in the step's own reduction."""
        return self.signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """What asked for the stop, for the message."""
        if self.signal is not None:
            return self.signal.name
        return "the time limit" if self.wanted else "another rank"

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        # A batch system signals every process of a job, and our launcher passes its signal on as well: under it the
        # repetition is not the user's second signal. The launcher counts those and kills the ranks itself.
        elif os.environ.get("MINDSPEED_WAN_LAUNCHED") != "1":
            os._exit(128 + number)
