"""The ranks of one node: start them, watch them, signal them, stop them, and say what went wrong first."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mindspeed_wan.cli.output import Output
from mindspeed_wan.errors import EXIT_CONFIG, EXIT_DISTRIBUTED, EXIT_OK, EXIT_REQUEUE
from mindspeed_wan.platforms.rank import HEARTBEAT_VARIABLE

SETTLE_SECONDS = 1.0
"""After the first failure, how long other ranks get to fail by themselves: the cause is chosen among all of them."""
KILL_SECONDS = 3.0
"""Between SIGTERM and SIGKILL for ranks whose peers are gone; nothing they could save is complete."""
STACK_SECONDS = 1.0
"""How long ranks get to print their stacks."""

HOPELESS = frozenset({2, 3, 4, 5, 7})
"""Exit codes that a restart would only repeat: configuration, resources, checkpoint, numerics policy, data."""


@dataclass(frozen=True)
class Job:
    """What to run and where this node stands in the job."""

    command: tuple[str, ...]
    num_local: int
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    max_restarts: int = 0
    run_id: str = "mindspeed-wan"

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.num_local * self.num_nodes


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the exit code of the script and, after a failure, the message and the rank it is from."""

    code: int
    message: str | None = None
    rank: int | None = None

    @property
    def failed(self) -> bool:
        """True unless the job finished or stopped after saving."""
        return self.code not in (EXIT_OK, EXIT_REQUEUE)

    @property
    def worth_restarting(self) -> bool:
        """True if another attempt could end differently: a lost rank, a crash; not a wrong flag."""
        return self.failed and self.code not in HOPELESS and self.code < 128


class Rank:
    """One process of the job."""

    def __init__(self, job: Job, local_rank: int, attempt: int, store_port: int, folder: Path) -> None:
        self.rank = job.node_rank * job.num_local + local_rank
        self.error_file = folder / f"error_{attempt}_{self.rank}.json"
        self.heartbeat_file = folder / f"heartbeat_{attempt}_{self.rank}"
        self.exit_code: int | None = None
        self.exit_time = 0.0
        self.stopped_by_us = False
        environment = {
            **os.environ,
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(job.world_size),
            "LOCAL_WORLD_SIZE": str(job.num_local),
            "GROUP_RANK": str(job.node_rank),
            "MASTER_ADDR": job.master_addr,
            "MASTER_PORT": str(store_port),
            "TORCHELASTIC_RUN_ID": job.run_id,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
            "TORCHELASTIC_ERROR_FILE": str(self.error_file),
            "MINDSPEED_WAN_LAUNCHED": "1",
            HEARTBEAT_VARIABLE: str(self.heartbeat_file),
            "PYTHONUNBUFFERED": "1",
        }
        if job.num_local > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.num_local)))
        # A session of its own: Ctrl-C reaches the launcher only, which passes it on once, and a rank can be killed
        # together with its data loader workers.
        self.process = subprocess.Popen(
            job.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509 (no threads)
        )

    @property
    def running(self) -> bool:
        """True until the process has been seen to end."""
        return self.exit_code is None

    def poll(self) -> None:
        """Note the exit code if the process has ended."""
        if self.running and (code := self.process.poll()) is not None:
            self.exit_code, self.exit_time = code, time.monotonic()

    def send(self, signum: int) -> None:
        """Send a signal to the rank's main process."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)

    def kill(self) -> None:
        """Kill the rank and its children; a rank stopped by SIGSTOP dies of this too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def record(self) -> dict[str, object] | None:
        """Return what the rank reported about its failure (``errors._report``), if anything."""
        try:
            record = json.loads(self.error_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("message"), str) else None

    def progress(self) -> tuple[float, str] | None:
        """Return (time of the last heartbeat, iteration), or ``None`` before the first."""
        try:
            iteration = self.heartbeat_file.read_text(encoding="ascii")
            return (self.heartbeat_file.stat().st_mtime, iteration) if iteration else None
        except OSError:
            return None

    def suspended(self) -> bool:
        """True if the process is stopped (SIGSTOP, a debugger); only Linux tells."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")


class LocalRanks:
    """All ranks of this node in one attempt."""

    def __init__(self, job: Job, attempt: int, store_port: int, folder: Path, output: Output) -> None:
        self.job, self.output = job, output
        self.ranks: list[Rank] = []
        try:
            for local_rank in range(job.num_local):
                self.ranks.append(Rank(job, local_rank, attempt, store_port, folder))
                output.watch(self.ranks[-1].process)
        except OSError:
            self.kill()
            raise
        self._first_failure = 0.0

    def poll(self, wait: float) -> Outcome | None:
        """Forward output for ``wait`` seconds; return the outcome once it is known."""
        self.output.forward(wait)
        for rank in self.ranks:
            rank.poll()
        failed = [rank for rank in self.ranks if rank.exit_code not in (None, EXIT_OK, EXIT_REQUEUE)]
        if failed:
            self._first_failure = self._first_failure or time.monotonic()
            settled = time.monotonic() - self._first_failure > SETTLE_SECONDS
            return self._explain(failed) if settled or not self.alive() else None
        if self.alive():
            return None
        codes = {rank.exit_code for rank in self.ranks}
        return Outcome(EXIT_REQUEUE, self._message_of(self.ranks), None) if EXIT_REQUEUE in codes else Outcome(EXIT_OK)

    def alive(self) -> list[Rank]:
        """Return the ranks that still run."""
        return [rank for rank in self.ranks if rank.running]

    def signal(self, signum: int) -> None:
        """Pass a signal on to every rank that runs."""
        for rank in self.alive():
            rank.send(signum)

    def silent(self, seconds: float) -> Outcome | None:
        """Return a failure if no running rank has reached a new iteration for ``seconds``.

        Judged only when every rank has reported an iteration: loading and compiling may take long.
        """
        beats = {rank: rank.progress() for rank in self.alive()}
        if not beats or any(beat is None for beat in beats.values()):
            return None
        newest = max(beat[0] for beat in beats.values() if beat is not None)
        if time.time() - newest < seconds:
            return None
        names = self._suspects()
        return Outcome(EXIT_DISTRIBUTED, f"no rank has made a step for {seconds / 60:.1f} minutes{names}", None)

    def show_stacks(self) -> None:
        """Ask every rank that can for the stacks of its threads, and forward them."""
        asked = [rank for rank in self.alive() if rank.heartbeat_file.exists() and not rank.suspended()]
        for rank in asked:
            self.output.say(f"stacks of rank {rank.rank}:")
            rank.send(signal.SIGUSR2)
            self._forward_for(STACK_SECONDS / len(asked))

    def stop(self, grace: float = KILL_SECONDS) -> None:
        """End every rank: SIGTERM, then SIGKILL after ``grace`` seconds; forward their last output."""
        for rank in self.alive():
            rank.stopped_by_us = True
            rank.send(signal.SIGTERM)
            rank.send(signal.SIGCONT)
        deadline = time.monotonic() + grace
        while self.alive() and time.monotonic() < deadline:
            self._forward_for(0.05)
        self.kill()

    def kill(self) -> None:
        """Kill every rank and its children at once, and close their pipes."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.process.wait()
            rank.poll()
        self.output.drain()

    def _forward_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.output.forward(left)
        for rank in self.ranks:
            rank.poll()

    def _explain(self, failed: Sequence[Rank]) -> Outcome:
        """Choose the rank that failed first, causes before their consequences, and say what it said."""
        first = min(failed, key=_blame)
        code = first.exit_code or EXIT_OK
        record = first.record()
        where = f"rank {first.rank}"
        if record is not None:
            same = sum(_text(rank.record()) == record["message"] for rank in failed)
            prefix = f"[{where}] " if same < self.job.world_size else ""
            suspects = self._suspects() if code == EXIT_DISTRIBUTED else ""
            return Outcome(_exit_code(code), f"{prefix}{record['message']}{suspects}", first.rank)
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
            return Outcome(_exit_code(code), f"{where} was killed by {name}{hint}", first.rank)
        return Outcome(code, f"{where} ended with exit code {code}; its own messages are above", first.rank)

    def _suspects(self) -> str:
        """Name the ranks that are stopped or furthest behind, for a failure that shows only elsewhere."""
        stopped = [rank.rank for rank in self.alive() if rank.suspended()]
        if stopped:
            return f"\n  suspended (SIGSTOP): rank {', '.join(map(str, stopped))}"
        busy = [rank.rank for rank in self.alive()]
        if 0 < len(busy) < len(self.ranks):
            return f"\n  still busy when the others gave up: rank {', '.join(map(str, busy))} (stacks above)"
        beats = {rank.rank: beat for rank in self.ranks if (beat := rank.progress()) is not None}
        if not beats or len({iteration for _, iteration in beats.values()}) == 1:
            return ""
        last = min(beats, key=lambda rank: beats[rank][0])
        age = time.time() - beats[last][0]
        return f"\n  silent longest: rank {last}, {age:.0f} s since iteration {beats[last][1]}"

    @staticmethod
    def _message_of(ranks: Sequence[Rank]) -> str | None:
        return next((text for rank in ranks if (text := _text(rank.record()))), None)


def _text(record: dict[str, object] | None) -> str | None:
    return str(record["message"]) if record else None


def _blame(rank: Rank) -> tuple[int, float]:
    """Order failures: a reported cause, a kill from outside, an unreported crash, a lost peer; then by time."""
    code = rank.exit_code or EXIT_OK
    if code == EXIT_DISTRIBUTED:
        return 3, rank.exit_time
    if code < 0:
        return 1, rank.exit_time
    return (0 if rank.record() is not None or code == EXIT_CONFIG else 2), rank.exit_time


def _exit_code(code: int) -> int:
    """Map a process's code to the script's: an outside SIGINT or SIGTERM is 130 or 143, any other kill a lost rank."""
    if code >= 0:
        return code
    return 128 - code if -code in (signal.SIGINT, signal.SIGTERM) else EXIT_DISTRIBUTED


def _die_with(launcher: int) -> None:
    """In the child before exec: ask Linux to kill this process when the launcher dies, however it dies."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the request was made
        os._exit(EXIT_DISTRIBUTED)
