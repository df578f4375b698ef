"""`python -m mindspeed_wan.cli.launch [options] SCRIPT [arguments]`: start the ranks of a job and end as they end.

Takes torchrun's options and sets its variables, so any torchrun script runs under it. What it does differently: the
exit code is that of the rank that failed first; a failure is printed once, without the launcher's own traceback; a
wrong flag or file is found before any rank starts; signals reach the ranks and leave them time to save; a restart gets
a fresh port; a rank that fell silent is named. It imports no torch, so it starts at once and costs 15 MB a node.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from mindspeed_wan.cli.nodes import Follower, Leader, SingleNode
from mindspeed_wan.cli.output import Output
from mindspeed_wan.cli.preflight import check as check_job
from mindspeed_wan.cli.ranks import Job, LocalRanks, Outcome
from mindspeed_wan.cli.variables import misspelt
from mindspeed_wan.errors import EXIT_DISTRIBUTED, EXIT_OK, ConfigError, ResourceError, WanError, run_main
from mindspeed_wan.platforms.cann import keep_torch_importable

POLL_SECONDS = 0.05
RESTART_SECONDS = 1.0
RANK_BYTES = 100 << 20
"""What a rank takes at the very least: torch and its libraries, no model."""
DEFAULT_PORT = 29500
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_USE_AGENT_STORE")

Nodes = SingleNode | Leader | Follower


class LaunchError(WanError):
    """A job that failed, with the exit code of the rank that failed first."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message or f"the job ended with exit code {outcome.code}")
        self.exit_code = outcome.code


class Signals:
    """Signals for the job: remembered by the handler, passed on by the loop."""

    FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received: list[int] = []
        self.first: int | None = None
        """The signal that asked the job to stop, if any."""

    def install(self) -> None:
        """Catch the signals from now on."""
        for signum in self.FORWARDED:
            signal.signal(signum, self._remember)

    def take(self) -> list[int]:
        """Return the signals that arrived since the last call."""
        received, self._received = self._received, []
        return received

    def raise_if_any(self) -> None:
        """End the launcher with 128 + signal if one arrived while no rank is running."""
        for signum in self.take():
            raise LaunchError(Outcome(128 + signum, f"stopped by {signal.Signals(signum).name} before the ranks ran"))

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the launcher's own options."""
    result = argparse.ArgumentParser(
        prog="python -m mindspeed_wan.cli.launch", description="Start the ranks of a job and end as they end."
    )
    for names, kind, default, text in (
        (("--nproc-per-node", "--nproc_per_node"), int, 1, "ranks on this node (one per device)"),
        (("--nnodes",), int, 1, "nodes of the job"),
        (("--node-rank", "--node_rank"), int, 0, "number of this node"),
        (("--master-addr", "--master_addr"), str, "127.0.0.1", "address of node 0"),
        (("--master-port", "--master_port"), int, None, "port of node 0; default: free, with several nodes 29500"),
        (("--max-restarts", "--max_restarts"), int, 0, "new attempts after a crash or a lost rank"),
        (("--grace-seconds",), float, 600.0, "time the ranks get to save after a signal"),
        (("--hang-timeout-minutes",), float, 0.0, "end the job when no rank makes a step for so long; 0: never"),
        (("--join-timeout-minutes",), float, 15.0, "time the nodes get to find each other"),
        (("--log-file",), Path, None, "also write all output here"),
    ):  # fmt: skip
        result.add_argument(*names, type=kind, default=default, help=text)
    result.add_argument("--script-variables", action="store_true",
                        help="note variables that look like a misspelt one of the launch scripts")
    result.add_argument("script", help="the Python script each rank runs")
    result.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ConfigError: a count below one, a node number outside the job, a time or port that is none, no such script.
        ResourceError: more ranks than this node has memory for.
    """
    for name, value, least in (
        ("--nproc-per-node", args.nproc_per_node, 1),
        ("--nnodes", args.nnodes, 1),
        ("--max-restarts", args.max_restarts, 0),
    ):
        if value < least:
            raise ConfigError(f"{value} is below {least}", where=name)
    if not 0 <= args.node_rank < args.nnodes:
        raise ConfigError(
            f"node {args.node_rank} of {args.nnodes} nodes does not exist",
            where="--node-rank",
            fix=f"number the nodes 0 to {args.nnodes - 1}",
        )
    for name, seconds in (
        ("--grace-seconds", args.grace_seconds),
        ("--hang-timeout-minutes", args.hang_timeout_minutes),
        ("--join-timeout-minutes", args.join_timeout_minutes),
    ):
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"{seconds} is no length of time", where=name, fix="give a number from 0 up")
    if args.master_port is not None and not 0 < args.master_port < 1 << 16:
        raise ConfigError(f"{args.master_port} is no port", where="--master-port", fix="choose one from 1 to 65535")
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // RANK_BYTES
    if args.nproc_per_node > most:
        raise ResourceError(f"{args.nproc_per_node} ranks do not fit the memory of this node, which holds {most} "
                            "interpreters with torch", where="--nproc-per-node", fix="start one rank per device")
    if not Path(args.script).is_file():
        raise ConfigError("the script does not exist", where=args.script)


def preflight(args: argparse.Namespace) -> tuple[str, ...]:
    """Check the job before any rank starts; return the arguments the ranks get.

    A dry run needs one rank, which is told the size of the job it checks.
    """
    arguments = tuple(args.arguments)
    world_size = args.nproc_per_node * args.nnodes
    if check_job(args.script, arguments, world_size) and world_size > 1:
        args.nproc_per_node = args.nnodes = 1
        args.node_rank = 0
        if not any(word.partition("=")[0] == "--world-size" for word in arguments):
            arguments += ("--world-size", str(world_size))
    return arguments


def meet(job: Job, args: argparse.Namespace, signals: Signals) -> Nodes:
    """Return the agreement with the other nodes, joined if there are any."""
    if job.num_nodes == 1:
        return SingleNode(args.master_port)
    port, timeout = args.master_port or DEFAULT_PORT, args.join_timeout_minutes * 60
    if job.node_rank == 0:
        return Leader(job, port, timeout)
    return Follower(job, port, timeout, signals.raise_if_any)


class Attempt:
    """One run of all ranks of this node, from start to verdict."""

    def __init__(self, ranks: LocalRanks, nodes: Nodes, signals: Signals, args: argparse.Namespace) -> None:
        self.ranks, self.nodes, self.signals, self.args = ranks, nodes, signals, args
        self._deadline: float | None = None

    def run(self) -> Outcome:
        """Watch until the attempt has ended on all nodes; this node's ranks are gone when it returns."""
        reported = False
        while True:
            outcome = None if reported else self._own_outcome()
            if outcome is not None:
                reported = True
                self.nodes.report(outcome)
            verdict = self.nodes.verdict()
            if verdict is not None:
                if verdict.code == EXIT_DISTRIBUTED:
                    self.ranks.show_stacks()
                self.ranks.stop()
                return verdict
            if reported:
                self.ranks.output.forward(POLL_SECONDS)

    def _own_outcome(self) -> Outcome | None:
        outcome = self.ranks.poll(POLL_SECONDS)
        stopped = self._pass_signals_on()
        if stopped is not None or outcome is not None:
            return stopped or self._as_signalled(outcome)
        if self._deadline is not None and time.monotonic() > self._deadline:
            names = ", ".join(str(rank.rank) for rank in self.ranks.alive())
            seconds = f"{self.args.grace_seconds:.0f} s"
            return Outcome(EXIT_DISTRIBUTED, f"rank {names} did not stop within {seconds} after the signal")
        if self.args.hang_timeout_minutes > 0:
            return self.ranks.silent(self.args.hang_timeout_minutes * 60)
        return None

    def _as_signalled(self, outcome: Outcome | None) -> Outcome | None:
        """Ranks that died of the SIGTERM we sent them for Ctrl-C give Ctrl-C's code."""
        if outcome is not None and outcome.code == 128 + signal.SIGTERM and self.signals.first is not None:
            return replace(outcome, code=128 + self.signals.first)
        return outcome

    def _pass_signals_on(self) -> Outcome | None:
        """Forward the first stop signal; a second SIGTERM or SIGINT ends everything at once.

        Ctrl-C and a lost terminal reach the ranks as SIGTERM, which training answers by saving.
        """
        for signum in self.signals.take():
            name = signal.Signals(signum).name
            first = self.signals.first
            if first is None:
                self.signals.first = signum
                self._deadline = time.monotonic() + self.args.grace_seconds
                self.ranks.output.say(f"{name}: the ranks save and stop; a second signal ends them at once")
                self.ranks.signal(signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM)
            elif first != signal.SIGUSR1 and signum in (signal.SIGTERM, signal.SIGINT):
                self.ranks.kill()
                return Outcome(128 + signum, f"ended by a second signal ({name}) before the ranks had saved")
        return None


def supervise(job: Job, nodes: Nodes, signals: Signals, args: argparse.Namespace, output: Output) -> int:
    """Run attempts until one ends well or none is left; return the exit code.

    Raises:
        LaunchError: the job failed; carries the first failing rank's message and exit code.
    """
    with tempfile.TemporaryDirectory(prefix="mindspeed_wan_") as folder:
        for attempt in range(job.max_restarts + 1):
            port = nodes.start(attempt, signals.raise_if_any)
            outcome = Attempt(LocalRanks(job, attempt, port, Path(folder), output), nodes, signals, args).run()
            if not outcome.failed:
                if outcome.message:
                    output.say(outcome.message)
                return outcome.code
            if not outcome.worth_restarting or signals.first is not None or attempt == job.max_restarts:
                raise LaunchError(outcome)
            output.say(f"{outcome.message}; restart {attempt + 1} of {job.max_restarts}")
            time.sleep(RESTART_SECONDS)
    return EXIT_OK


def launch(argv: Sequence[str]) -> int:
    """Parse the options, check the job, run it, return its exit code."""
    args = parser().parse_args(argv)
    check(args)
    for name in RANK_VARIABLES:  # a cluster's own RANK means something else; ranks get theirs below
        os.environ.pop(name, None)
    if args.script_variables and args.node_rank == 0:
        for note in misspelt(os.environ):
            print(note, file=sys.stderr)
    arguments = preflight(args)
    keep_torch_importable()
    job = Job(
        command=(sys.executable, "-u", str(Path(args.script).resolve()), *arguments),
        num_local=args.nproc_per_node,
        num_nodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        max_restarts=args.max_restarts,
        run_id=uuid.uuid4().hex[:8],
    )
    signals = Signals()
    signals.install()
    output = Output(args.log_file)
    try:
        nodes = meet(job, args, signals)
        try:
            return supervise(job, nodes, signals, args, output)
        finally:
            nodes.close()
    except WanError as error:
        output.note(f"error: {error}")
        raise
    finally:
        output.close()


def main() -> None:
    """Entry point."""
    run_main(lambda: launch(sys.argv[1:]))


if __name__ == "__main__":
    main()
