"""Counting cases, and processes that may be killed: torch is imported once, every victim is forked from there.

A property is a function ``(tally, count, folder)`` that runs ``count`` cases; each case is a ``with tally.case(...)``
block. A block that raises counts as failed, with its reason, and the next case runs. A case costs about 0.1 s of
processor time instead of the 5 s of a fresh interpreter with torch.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
            "megatron.core.parallel_state", "megatron.core.tensor_parallel", "mindspeed_wan.training.setup",
            "mindspeed_wan.training.pretrain", "mindspeed_wan.config.load", "mindspeed_wan.training.loop",
            "mindspeed_wan.checkpoint.background", "mindspeed_wan.training.saving", "tests.faults.victims",
            # what runs with online encoders would otherwise import one by one (several CPU seconds each)
            "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5"]


@dataclass
class Tally:
    """What became of the cases of one property."""

    run: int = 0
    passed: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """Measured figures, for the results file."""

    @contextmanager
    def case(self, label: object) -> Iterator[None]:
        """Run one case; whatever it raises is noted under ``label``."""
        self.run += 1
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip().splitlines() or [type(error).__name__]
            self.problems.append(f"{label}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: "
                                 f"{' | '.join(text)[:500]}")
        else:
            self.passed += 1

    def add(self, passed: int, run: int, label: object = "") -> None:
        """Add cases that another process has counted."""
        self.run += run
        self.passed += passed
        if passed < run:
            self.problems.append(f"{label}: {run - passed} of {run} failed")


Property = Callable[[Tally, int, Path], None]


class Victim:
    """A forked process that runs ``function(*arguments)``; its output goes to ``log``.

    ``exit_code`` is negative when a signal killed it, as in ``subprocess``.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, log: Path | None = None,
                 environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.log = log
        self._process = context.Process(target=_main, args=(function, arguments, log, environment or {}), daemon=False)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while it runs."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """Kill -9 and return the exit code."""
        self.signal(signal.SIGKILL)
        return self.wait(30)

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end and return the exit code.

        Raises:
            TimeoutError: it still runs (and is killed now).
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(10)
            raise TimeoutError(f"still running after {timeout:.0f} s: {self.output()[-500:]}")
        return self._process.exitcode

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log and self.log.exists() else ""


def _main(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None,
          environment: dict[str, str]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", MINDSPEED_WAN_DEVICE="cpu", HF_HUB_OFFLINE="1", **environment)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function(*arguments)


def kept_folder(name: str) -> Path:
    """Return a new folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
    owner = os.getpid()  # forked victims share the list of what to do at the end
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 120, alive: Victim | None = None) -> None:
    """Poll ``condition`` every 10 ms.

    Raises:
        TimeoutError: it did not become true in time, or ``alive`` ended before it did.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or (alive is not None and not alive.alive and not condition()):
            raise TimeoutError(f"{what} did not happen; {alive.output()[-500:] if alive else ''}")
        time.sleep(0.01)
