"""The errors users see. Each class carries the exit code that every entry point and launcher passes through.

An error message says what is wrong, where (``file:line`` or key), the value, and the fix. ``run_main`` is the
only place that turns an error into a process exit, so no command ever shows a traceback for bad input.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_RESOURCE = 3
EXIT_CHECKPOINT = 4
EXIT_NUMERICS = 5
EXIT_DISTRIBUTED = 6
EXIT_DATA = 7
EXIT_REQUEUE = 75


class WanError(Exception):
    """Base of all errors with a message for the user.

    Args:
        message: what is wrong, with the offending value.
        where: ``file:line``, a config key or a path; printed before the message.
        fix: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.message, self.where, self.fix = message, where, fix
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ConfigError(WanError):
    """A flag, a config key, or a combination of them that cannot be run (illegal layouts included)."""

    exit_code = EXIT_CONFIG


class ResourceError(WanError):
    """Disk, memory or device that the run needs and the machine does not have."""

    exit_code = EXIT_RESOURCE


class CheckpointError(WanError):
    """Weights or a checkpoint that are missing, damaged, or of another model than asked for."""

    exit_code = EXIT_CHECKPOINT


class NumericsError(WanError):
    """NaN, Inf or a spike that the run's policy does not accept."""

    exit_code = EXIT_NUMERICS


class ParallelError(WanError):
    """A distributed failure at run time: a lost or hung rank, ranks that disagree."""

    exit_code = EXIT_DISTRIBUTED


class DataError(WanError):
    """An annotation, clip or caption that cannot be used."""

    exit_code = EXIT_DATA


class StopRequested(WanError):
    """The run stopped on request after saving; running it again continues it (exit code 75, Slurm's requeue)."""

    exit_code = EXIT_REQUEUE


def nearest(name: str, known: list[str] | tuple[str, ...], *, limit: int = 3) -> list[str]:
    """Return up to ``limit`` known names that look like ``name``, best first (for did-you-mean messages)."""
    import difflib

    return difflib.get_close_matches(name, known, n=limit, cutoff=0.6)


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"did you mean 'x'?"`` or an empty string."""
    close = nearest(name, known, limit=1)
    return f"did you mean '{close[0]}'?" if close else ""


def nearest_option(message: str, known: list[str]) -> str:
    """Return ``"did you mean '--x'?"`` where argparse's ``message`` is about an option or a value it does not know."""
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
        return did_you_mean(choice[1], [name.strip("' ") for name in choice[2].split(",")])
    if not message.startswith("unrecognized arguments"):
        return ""
    word = next((word for word in message.split() if word.startswith("--")), "").partition("=")[0]
    return did_you_mean(word, known) if word else ""


class _Signalled(BaseException):
    """The process was asked to end: unwinds what is under way, so that no half-written file is left."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit with its code; a ``WanError`` becomes one message on stderr.

    So does what the system says about a path or a disk where no function had better words for it (exit code 3).
    SIGTERM and SIGHUP end the process as they would without it, after temporary files have been removed; a second one
    ends it at once.

    Under the launcher (``mindspeed_wan.cli.launch``) the message goes to ``TORCHELASTIC_ERROR_FILE`` and the
    launcher prints it once for all ranks. ``MINDSPEED_WAN_TRACEBACK=1`` shows the traceback as well.
    """
    # No command asks a server for anything unless the user says HF_HUB_OFFLINE=0.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with _unwinding():
            code = main() or EXIT_OK
    except _Signalled as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), stop.number)  # whoever waits for this process sees what ended it
        code = 128 + stop.number
    except WanError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        if not _is_about_files(error):
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        code = _fail(ResourceError(f"{error.strerror}", where=str(name) if name else None,
                                   fix="look at the path, its permissions and the space on its disk"))
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("RANK") is not None and code != EXIT_OK:
        # Other ranks may hang in a collective; a normal interpreter exit would wait for them.
        os._exit(code)
    sys.exit(code)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Turn the signals that would end the process into an exception; those that are handled or ignored stay so."""
    def end(number: int, frame: FrameType | None) -> None:
        # Under the launcher a repetition is its own or the batch system's, not the user's (see training.stop).
        launched = os.environ.get("MINDSPEED_WAN_LAUNCHED") == "1"
        signal.signal(number, signal.SIG_IGN if launched else signal.SIG_DFL)
        raise _Signalled(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)
                  if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: WanError) -> int:
    """Report an error and return its exit code."""
    if os.environ.get("MINDSPEED_WAN_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    _report(error)
    return error.exit_code


def _is_about_files(error: OSError) -> bool:
    """Tell a folder that may not be read, a name that is too long or a full disk from a lost connection or a bug."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    return error.errno is not None and (error.filename is not None or error.errno in full)


def _report(error: WanError) -> None:
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file and os.environ.get("MINDSPEED_WAN_LAUNCHED") == "1":
        record = {"message": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
        Path(error_file).parent.mkdir(parents=True, exist_ok=True)
        Path(error_file).write_text(json.dumps(record), encoding="utf-8")
        return
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank not in (None, "0") else ""
    print(f"{prefix}error: {error}", file=sys.stderr)
