"""``--expert both --expert-ranks``: both experts train side by side, each on its own ranks of one job.

Each expert's ranks are a world of their own (``parallel.parts``), in which the run is the one that would train this
expert alone: same files, same checkpoints, same bits. Shared are the clips, which are encoded once (``joint_feed``),
and the end: when one expert is stopped or fails, the other one saves and stops too, and nobody leaves before both have.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, cast

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError, NumericsError, StopRequested, WanError
from mindspeed_wan.parallel.agreement import barrier, first_decides
from mindspeed_wan.parallel.failures import explained
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.parts import Part, join_part, launched
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.both import EXPERTS, collect_adapters, is_done
from mindspeed_wan.training.joint_board import Board, JointStop, Standing
from mindspeed_wan.training.joint_feed import JointFeed
from mindspeed_wan.training.source import Feed, FeedOpener, OwnFeed
from mindspeed_wan.training.stop import StopRequest

RunOne = Callable[[RunConfig, Platform, StopRequest, FeedOpener], None]
"""Trains one expert to its end in a world that exists."""


def train_side_by_side(configs: Sequence[RunConfig], sizes: Sequence[int], platform: Platform, run: RunOne) -> None:
    """Train this rank's expert and end together with the other one. Collective over the whole job.

    Args:
        configs: of the high and of the low expert.
        sizes: their ranks.
        platform: where they run.
        run: trains one of them.

    Raises:
        WanError: why this rank's expert, or the other one, could not go on; the message names the expert.
    """
    rank, world_size = launched()
    parts = (Part(EXPERTS[0], range(sizes[0])), Part(EXPERTS[1], range(sizes[0], sum(sizes))))
    if world_size != sum(sizes):
        raise ConfigError(f"{world_size} ranks were started for experts of {sizes[0]} and {sizes[1]}")
    own = 0 if rank in parts[0].ranks else 1
    with _speaking_as(EXPERTS[own]), explained():
        platform.activate()
        link = join_part(platform, parts[own], configs[own].parallel.distributed_timeout_minutes)
        expert = _Expert(configs, own, Board(link, parts[own], parts[1 - own]), platform)
        with JointStop(expert.board, configs[own].training.exit_duration_minutes) as stop:
            failure = expert.train(run, stop)
            standing = expert.end(failure, stop)
        link.barrier()
        _raise_for(failure, standing, expert.board)
        if rank == 0 and all(is_done(config) for config in configs):
            for path in collect_adapters(configs):
                print(f" adapter {path}", flush=True)


class _Expert:
    """One of the two experts, as its ranks see it."""

    def __init__(self, configs: Sequence[RunConfig], own: int, board: Board, platform: Platform) -> None:
        self.config, self.board, self._platform = configs[own], board, platform
        self._saves = [config.checkpoint.save for config in configs]
        self._feed: JointFeed | None = None
        self._progress: Progress | None = None

    def train(self, run: RunOne, stop: StopRequest) -> WanError | None:
        """Train to the end; returns what ended the run early on all of the expert's ranks."""
        if first_decides(lambda: is_done(self.config)):
            if self.config.data.kind == "video":
                self._feed = JointFeed(self.config, None, self._platform, Progress(), self.board, self._saves)
            return None
        try:
            run(self.config, self._platform, stop, self._open)
        except (NumericsError, StopRequested) as error:
            return error
        return None

    def end(self, failure: WanError | None, stop: StopRequest) -> Standing:
        """Tell the other expert that this one has ended, encode for it until it has too, and return its standing."""
        barrier()
        if self._feed is not None:
            self._feed.leave()
        due = self.config.training.exit_interval
        told = self._progress is not None and due is not None and self._progress.iteration % due == 0
        if failure is None or (told and isinstance(failure, StopRequested)):
            self.board.tell(ended="done")  # --exit-interval stops the other expert at its own iteration
        elif isinstance(failure, StopRequested):
            self.board.tell(ended="stopped", reason=f"stopped by {stop.reason}")
        else:
            self.board.tell(ended="failed", reason=failure.message)
        if self._feed is not None:
            self._feed.serve(lambda standing: bool(standing.ended))
        return self.board.wait_for_end()

    def _open(self, config: RunConfig, groups: ParallelGroups, platform: Platform, progress: Progress) -> Feed:
        self._progress = progress
        if config.data.kind != "video":
            return OwnFeed(config, groups, platform, progress)  # a cache is read by everybody: nothing to share
        self._feed = JointFeed(config, groups, platform, progress, self.board, self._saves)
        return self._feed


def _raise_for(failure: WanError | None, other: Standing, board: Board) -> None:
    """End like the expert that failed, so that the job's exit code says what happened."""
    if other.ended == "failed" and not isinstance(failure, NumericsError):
        here = "had ended" if failure is None else failure.message
        raise NumericsError(f"the {board.other.name}-noise expert failed: {other.reason}\n"
                            f"  the {board.own.name}-noise expert: {here}",
                            fix="the same as for that expert alone; started again, both go on from their last saves")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _speaking_as(expert: str) -> Iterator[None]:
    """Put the expert's name in front of every line this process prints and of every error."""
    try:
        with contextlib.redirect_stdout(cast(TextIO, _Named(sys.stdout, f"[{expert}] "))):
            yield
    except WanError as error:
        if f"{expert}-noise expert" not in error.message:
            error.message = f"the {expert}-noise expert: {error.message}"
        raise


class _Named:
    """A text stream that begins every line with a name."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._at_start = stream, name, True

    def write(self, text: str) -> int:
        """Write text; returns its length."""
        named = "".join((self._name if start else "") + line for start, line in self._lines(text))
        self._stream.write(named)
        return len(text)

    def _lines(self, text: str) -> Iterator[tuple[bool, str]]:
        for line in text.splitlines(keepends=True):
            yield self._at_start, line
            self._at_start = line.endswith("\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
