"""Runs the commands that a user would type, their output shown and kept: what demo and world are made of."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_wan.errors import ConfigError, ResourceError, WanError


@dataclass(frozen=True)
class Command:
    """One command: the name of its log, its words, and what it finds in the environment."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def find_repository() -> Path:
    """Return the checkout that holds examples/ (the launchers are shown, so a wheel alone is not enough)."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "examples" / "wan2.2" / "common" / "launch.sh").is_file():
            return folder
    raise ResourceError(
        "examples/wan2.2 is not beside the installed package",
        fix="run this from a checkout of the repository (it walks through its launch scripts)",
    )


def make_folder(path: Path) -> Path:
    """Make ``path`` and return it.

    Raises:
        ResourceError: nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"no folder can be made here: {error.strerror}", where=str(path),
                            fix="choose another --out") from None
    return path


def claim_folder(folder: Path, file: str, settings: Mapping[str, int]) -> None:
    """Remember in ``folder/file`` what everything there is made with; training there resumes, so it must not change.

    Raises:
        ConfigError: the folder holds the work of other settings.
    """
    path = make_folder(folder) / file
    if not path.is_file():
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if before != settings:
        known = before if isinstance(before, dict) else {}
        changed = ", ".join(f"{name} {known.get(name, '?')}, not {value}" for name, value in settings.items()
                            if known.get(name) != value)
        raise ConfigError(f"holds work done with other settings ({changed or file + ' is damaged'})", where=str(folder),
                          fix="choose another --out, or remove this folder to begin again")


def python(module: str) -> list[str]:
    """Return the words that start a module with this very interpreter."""
    return [sys.executable, "-m", module]


def require(path: Path) -> None:
    """Raise when a stage did not write ``path``."""
    if not path.exists():
        raise WanError("the stage did not write this", where=str(path))


def run_together(commands: Sequence[Command], *, repository: Path, logs: Path, show: bool = True) -> None:
    """Run commands at the same time and wait for all of them; logs go to ``logs/NAME.log``.

    Raises:
        WanError: with the exit code of the first command in the list that failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes = [_start(command, repository) for command in commands]
    threads = []
    for command, process in zip(commands, processes):
        prefix = f"{command.name}: " if len(commands) > 1 else ""
        threads.append(threading.Thread(target=_copy_output, args=(process, logs / f"{command.name}.log",
                                                                   prefix if show else None)))
        threads[-1].start()
    try:
        with _asked_to_stop():
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.05)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for thread in threads:
            thread.join()
    for command, process in zip(commands, processes):
        if code := process.wait():
            error = WanError(f"the command ended with exit code {code}", where=command.name,
                             fix=f"see {logs / f'{command.name}.log'}")
            error.exit_code = code
            raise error


@contextmanager
def _asked_to_stop() -> Iterator[None]:
    """Turn SIGTERM into an exit, so that the commands are asked to stop as well and none is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(command: Command, repository: Path) -> subprocess.Popen[str]:
    shown = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in command.environment.items()), shlex.join(command.words)])
    print(f"  $ {shown.replace(str(repository), '.')}", flush=True)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", **command.environment}
    return subprocess.Popen(command.words, env=environment, cwd=repository, text=True, errors="replace",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _copy_output(process: subprocess.Popen[str], log: Path, prefix: str | None) -> None:
    """Write what a process prints to its log and, unless ``prefix`` is ``None``, to the terminal."""
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            if prefix is not None:
                print(f"    {prefix}{line.rstrip()}", flush=True)
