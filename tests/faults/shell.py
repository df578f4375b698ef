"""T22: the launcher corpus. Every case is a real command of a user: ``bash examples/...``, ``mm-convert`` and so on."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import runs
from tests.faults.harness import Tally
from tests.faults.shell_inputs import Case, generation_cases, tool_cases, training_cases, write_files
from tests.helpers.world import REPOSITORY, World

SETTINGS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DEVICE", "LOAD_PATH", "SAVE_PATH", "MM_DATA", "MM_MODEL")
LONGEST_MESSAGE = 30
"""Lines: a file with many mistakes lists them all."""


def corpus() -> list[Case]:
    """Return every case."""
    return [*training_cases(), *generation_cases(), *tool_cases()]


def bad_commands(tally: Tally, count: int, folder: Path) -> None:
    """T22: 0 tracebacks, 0 false successes, the exit code of the design, and nothing half-made left behind."""
    world = runs.world()
    write_files(folder / "files", world)
    cases = corpus()
    chosen = cases[:: max(1, len(cases) // count)][: max(count, 1)] if count < len(cases) else cases
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda numbered: _run(numbered[0], numbered[1], folder, world), enumerate(chosen)))
    for case, (code, output, left) in zip(chosen, results):
        with tally.case(case.name):
            assert code == case.code, f"exit code {code} instead of {case.code}: {output[-400:]}"
            assert "Traceback" not in output, output[-600:]
            message = output[output.rfind("error: "):] if "error: " in output else output
            assert case.phrase in message, f"does not say {case.phrase!r}: {message[:400]}"
            assert len(message.splitlines()) <= LONGEST_MESSAGE, message
            assert "iteration 1/" not in output and not left, f"left {left}"


def _run(number: int, case: Case, folder: Path, world: World) -> tuple[int, str, list[str]]:
    place = folder / f"case{number}"
    place.mkdir()
    paths = {"@repo": REPOSITORY, "@model": world.model, "@files": folder / "files", "@world": world.files,
             "@new": place / "new", "@bin": Path(sys.executable).parent}

    def filled(text: str) -> str:
        for mark, path in paths.items():
            text = text.replace(mark, str(path))
        return text

    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    environment |= {"DEVICE": "cpu", "NPROC_PER_NODE": "2", "MM_DATA": str(world.files / "data.json"),
                    "MM_MODEL": str(world.files / "model_high.json"), "SAVE_PATH": str(place / "save"),
                    "LOAD_PATH": str(world.model / "transformer"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                    "LOG_FOLDER": str(place / "logs"), "FSDP_CONFIG": "", "TRAIN_ITERS": "1"}
    if "pretrain" not in " ".join(case.command) and "finetune" not in " ".join(case.command):
        for name in ("MM_DATA", "MM_MODEL", "LOAD_PATH", "NPROC_PER_NODE"):
            del environment[name]
    environment |= {name: filled(value) for name, value in case.variables.items()}
    try:
        done = subprocess.run([filled(word) for word in case.command], env=environment, cwd=place, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return -1, "still running after 120 s", []
    left = [path.name for path in place.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock")]
    return done.returncode, done.stdout + done.stderr, left
