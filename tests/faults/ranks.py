"""Ranks under the launcher: killed ones come back, hung ones are named. Real processes, one interpreter each.

The jobs read cached features, so that a start costs the import of torch and not that of the encoders' libraries.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import TRACKER_NAME
from tests.faults.harness import Tally, kept_folder
from tests.faults.runs import FSDP2, saved, steps
from tests.faults.runs import world as online_world
from tests.helpers.world import REPOSITORY, World, metrics, with_cached_features

ITERATIONS = 24
INTERVAL = 2
"""Every second iteration is saved."""
TIMEOUT_SECONDS = 6.0
"""How long the collectives of T12 wait."""

HANGS = """
import os, sys, time
from mindspeed_wan.errors import run_main
from mindspeed_wan.training.pretrain import main
from mindspeed_wan.training.step import TrainStep

real, seen = TrainStep.accumulate, [0]

def accumulate(self, *args, **options):
    seen[0] += 1
    if seen[0] == 4 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return real(self, *args, **options)

TrainStep.accumulate = accumulate
run_main(lambda: main(sys.argv[1:]))
"""


@lru_cache(maxsize=1)
def world() -> World:
    """Return the files of one tiny job that reads cached features."""
    return with_cached_features(online_world(), kept_folder("cached"))


class Job:
    """A training job of two ranks through the launcher; its output goes to a file beside ``save``."""

    def __init__(self, save: Path, *flags: str, script: Path = REPOSITORY / "pretrain_sora.py",
                 launcher: tuple[str, ...] = ()) -> None:
        self.save, self.log = save, save.with_name(f"{save.name}.log")
        command = [sys.executable, "-m", "mindspeed_wan.cli.launch", "--nproc-per-node", "2", *launcher, str(script),
                   *world().flags(save, *FSDP2, *flags, iters=ITERATIONS)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log,
                                            stderr=subprocess.STDOUT, env=environment)

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> list[int]:
        """Return the process ids of its ranks."""
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait_for(self, step: int, timeout: float = 300) -> None:
        """Wait until iteration ``step`` is reported.

        Raises:
            AssertionError: the job ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while steps(self.save) < step:
            assert self.process.poll() is None, f"ended before step {step}: {self.output()[-800:]}"
            assert time.monotonic() < deadline, f"step {step} was not reached: {self.output()[-800:]}"
            time.sleep(0.02)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout)

    def end(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


# ---- T11: lost ranks -----------------------------------------------------------------------------------------


def killed_ranks(tally: Tally, count: int, folder: Path) -> None:
    """T11: kill -9 one rank at random steps, up to three times a job; the launcher restarts it and it finishes."""
    seconds: list[float] = []
    for number in range(-(-count // 3)):
        kills, rng = min(3, count - 3 * number), random.Random(number)
        job = Job(folder / str(number), "--save-interval", str(INTERVAL), launcher=("--max-restarts", "3"))
        recovered: list[float] = []
        try:
            for kill in range(kills):
                job.wait_for(7 * kill + rng.randrange(INTERVAL + 1, 7))  # something is saved by then
                recovered.append(_kill_one_rank(job, rng, kill + 1))
            _finished(job, kills)
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            tally.add(0, kills, f"job {number}: {error}")
        else:
            tally.add(kills, kills)
            seconds += recovered
        finally:
            job.end()
    if seconds:
        tally.notes.append(f"from the kill to the next step: {min(seconds):.0f} to {max(seconds):.0f} s, of which the "
                           "start of two interpreters with torch is nearly all")


def _kill_one_rank(job: Job, rng: random.Random, attempt: int) -> float:
    """Kill a rank and wait until the next attempt goes on; nothing that was saved may be lost. Returns the seconds."""
    before = int((job.save / TRACKER_NAME).read_text())
    os.kill(rng.choice(job.ranks()), signal.SIGKILL)
    started = time.monotonic()
    while len(found := re.findall(r"resumed from .* \(iteration (\d+)", job.output())) < attempt:
        assert job.process.poll() is None, f"was not restarted: {job.output()[-800:]}"
        assert time.monotonic() - started < 300, f"did not come back: {job.output()[-800:]}"
        time.sleep(0.02)
    assert int(found[-1]) >= before, f"went back to {found[-1]} although {before} was saved"
    job.wait_for(int(found[-1]) + 1)
    return time.monotonic() - started


def _finished(job: Job, kills: int) -> None:
    """Require a good end: every restart told, every iteration counted once, the last one saved."""
    code, output = job.wait(), job.output()
    assert code == 0 and output.count("; restart ") == kills, output[-800:]
    assert saved(job.save) == ITERATIONS
    assert [row["iteration"] for row in metrics(job.save)] == list(range(1, ITERATIONS + 1))


# ---- T12: hung ranks -----------------------------------------------------------------------------------------


def hung_ranks(tally: Tally, count: int, folder: Path) -> None:
    """T12: a rank that is suspended or busy for ever is named, with stacks, and the job ends with 6 in time.

    Half of the cases are training runs, half bare jobs of collectives.
    """
    cases = (_suspended_in_training, _busy_in_training, _suspended_in_a_collective, _busy_in_a_collective)
    for number in range(count):
        case = cases[number % len(cases)]
        place = folder / str(number)
        place.mkdir()
        with tally.case(f"{number} {case.__name__.strip('_')}"):
            seconds = case(place)
            tally.notes.append(f"{case.__name__.strip('_').replace('_', ' ')}: {seconds:.0f} s")


def _suspended_in_training(place: Path) -> float:
    job = _waiting_job(place)
    try:
        job.wait_for(3)
        os.kill(job.ranks()[1], signal.SIGSTOP)
        return _ends_with_6(job, "suspended (SIGSTOP): rank 1")
    finally:
        job.end()


def _busy_in_training(place: Path) -> float:
    (place / "hangs.py").write_text(HANGS)
    job = _waiting_job(place, script=place / "hangs.py")
    try:
        job.wait_for(3)
        seconds = _ends_with_6(job, "still busy when the others gave up: rank 1")
        assert "time.sleep" in job.output() or "in accumulate" in job.output(), "rank 1 does not show where it is"
        return seconds
    finally:
        job.end()


def _waiting_job(place: Path, script: Path = REPOSITORY / "pretrain_sora.py") -> Job:
    return Job(place / "run", "--save-interval", str(INTERVAL), "--distributed-timeout-minutes",
               str(TIMEOUT_SECONDS / 60), script=script)


def _ends_with_6(job: Job, message: str) -> float:
    """Require the end within the time-out, its announcement, and whole checkpoints; returns the seconds it took."""
    started = time.monotonic()
    code, output = job.wait(), job.output()
    seconds = time.monotonic() - started
    assert code == 6 and message in output and output.count("error: ") == 1, output[-1500:]
    assert "stopped here" in output, "the waiting rank shows where it waits"
    assert seconds < TIMEOUT_SECONDS + 30, f"took {seconds:.0f} s"
    assert saved(job.save) >= INTERVAL
    return seconds


def _suspended_in_a_collective(place: Path) -> float:
    return _collective(place, "suspend", "suspended (SIGSTOP): rank 1")


def _busy_in_a_collective(place: Path) -> float:
    return _collective(place, "busy", "still busy when the others gave up: rank 1")


def _collective(place: Path, how: str, message: str) -> float:
    from tests.launches.test_launch_gloo import run

    result, seconds = run(place, how)
    assert result.returncode == 6 and message in result.stderr, result.stderr[-500:]
    assert "all_reduce" in result.stderr and seconds < 90
    return seconds
