"""One stream of features for two experts: every clip is decoded and encoded once, by one rank of the job.

The samples of each event (``joint_order``) are dealt out to all ranks of both experts. A rank encodes its share in the
training process, right before it asks for an event itself, and sends every sample to the ranks of both experts that
train on it. Nothing is encoded further ahead than the slower expert's queue of ``QUEUE`` events, so memory is bounded
and an expert waits for the other only when it is that far ahead.

An expert that has ended, or that stands further on than the other after a restart, goes on encoding its share
(``serve``) until it is needed no more. Randomness belongs to the samples, so what arrives is, bit for bit, what the
rank would have encoded itself.
"""

from __future__ import annotations

import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.bad_samples import BadSample, BadSampleLog
from mindspeed_wan.data.build import OpenedData, open_data
from mindspeed_wan.data.loader import load_batches
from mindspeed_wan.data.sampler import Key
from mindspeed_wan.errors import CheckpointError, ParallelError
from mindspeed_wan.parallel.agreement import all_or_none
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.parts import Sending
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.encoders import Encoders, Features, SampleFeatures, assemble
from mindspeed_wan.training.joint_board import IDLE_SECONDS, LOOK_SECONDS, Board, Standing
from mindspeed_wan.training.joint_order import Events, Reader, encoder_of, ever_encodes, share, shared_keys
from mindspeed_wan.training.source import BAD_SAMPLES_FILE, evaluation_data, evaluation_order

QUEUE = 4
"""Events that may wait encoded for the slower expert."""
AHEAD = 1
"""Events a rank encodes before they are asked for, so that nobody waits for a sample in the middle of a step."""


@dataclass(frozen=True)
class Course:
    """What both experts have agreed on: the events, and which of them each expert reads."""

    events: Events
    own: Reader
    other: Reader

    @property
    def first(self) -> int:
        """The first event that anybody reads."""
        return min((r.start for r in (self.own, self.other) if r.start < r.stop), default=0)

    @property
    def stop(self) -> int:
        """The event after the last one that anybody reads."""
        return max((r.stop for r in (self.own, self.other) if r.start < r.stop), default=0)


class JointFeed:
    """This rank's feed and its share of the work for all others. Collective over the whole job to create.

    Args:
        config: of this rank's expert.
        groups: its layout; ``None`` for an expert that is done and only serves.
        platform: where encoders run.
        progress: where the expert stands.
        board: between the experts.
        saves: the save folders of both experts, for the lists of bad samples.

    Raises:
        CheckpointError: the experts' data positions do not belong together.
        DataError: on every rank, when annotations or clips cannot be used.
    """

    def __init__(self, config: RunConfig, groups: ParallelGroups | None, platform: Platform, progress: Progress,
                 board: Board, saves: Iterable[str | None]) -> None:
        self._board, self._link, self._device = board, board.link, platform.device()
        self._micro_batch_size = config.training.micro_batch_size
        self._world_size = len(board.own) + len(board.other)
        data = all_or_none(lambda: open_data(config))
        evaluated = all_or_none(lambda: evaluation_data(config, data))
        self._course = agree(config, groups, progress, board, (data, evaluated))
        self._description = data.describe(self._course.events.batch)
        if evaluated is not data:
            self._description += [f"validation {line}" for line in evaluated.describe(self._course.events.batch)]
        self._encoders: Encoders | None = None
        if self._course.first < self._course.stop and ever_encodes(self._course.events, self._link.rank,
                                                                   self._world_size):
            self._encoders = Encoders(config, ParallelGroups(), platform)
        logs = _Logs(data, saves, config.data.max_bad_fraction, is_first=self._link.rank == 0)
        self._batches = load_batches(
            data.dataset, self._own_keys(evaluation=False),
            num_workers=0 if self._encoders is None else config.training.num_workers,
            pin_memory=config.data.pin_memory and platform.device_type == "cuda",
            bad_samples=logs,
        )
        self._evaluation_batches = load_batches(
            evaluated.dataset, self._own_keys(evaluation=True),
            bad_samples=logs if evaluated is data else evaluated.bad_sample_log(None, config.data.max_bad_fraction),
        )
        # encoder_offload_interval counts micro-batches of a data rank; here whole events are encoded together.
        per_event = config.gradient_accumulation(len(board.own))
        self._together = math.ceil(config.model.encoder_offload_interval / per_event)
        self._next = self._course.first
        self._at = self._course.own.start
        self._reading = True
        self._kept: dict[tuple[int, int], SampleFeatures] = {}
        self._sent: dict[str, deque[tuple[int, Sending]]] = {board.own.name: deque(), board.other.name: deque()}
        self._waited = 0.0
        self.features: Iterator[Features] = self._stream()

    @property
    def waited(self) -> float:
        """Seconds spent waiting for clips, for the other expert and for samples on their way."""
        return self._waited

    @property
    def description(self) -> list[str]:
        """Lines to print once."""
        own, other = self._course.own, self._course.other
        lines = [*self._description, f"features: each clip is encoded once, by one of the {self._world_size} ranks of "
                 "both experts"]
        if own.start > other.start and other.start < other.stop:
            lines.append(f"features: this expert is {own.start - other.start} batches ahead of the "
                         f"{self._board.other.name}-noise one and encodes for it until it has caught up")
        return lines

    def evaluation(self, count: int) -> Iterator[Features]:
        """Return the next ``count`` micro-batches: evaluations have their place in the order of events."""
        return islice(self.features, count)

    def serve(self, enough: Callable[[Standing], bool]) -> None:
        """Encode this rank's share for others until ``enough`` says so about the other expert's standing.

        Waits without a time limit: no rank of this expert is in a collective meanwhile.
        """
        while not enough(standing := self._board.look()):
            goal = min(self._room(standing), self._next + self._together, self._course.stop)
            if goal > self._next:
                self._encode(range(self._next, goal), standing)
            else:
                time.sleep(IDLE_SECONDS)

    def leave(self) -> None:
        """Say that this rank reads no further."""
        self._reading = False

    def _own_keys(self, *, evaluation: bool) -> Iterator[list[Key]]:
        """Yield the keys of what this rank encodes, in order."""
        span = range(self._course.first, self._course.stop)
        return shared_keys(self._course.events, span, self._link.rank, self._world_size, evaluation=evaluation)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _stream(self) -> Iterator[Features]:
        own, other, events = self._course.own, self._course.other, self._course.events
        if own.start > other.start and other.start < other.stop:
            self.serve(lambda standing: bool(standing.ended) or standing.event >= own.start)
        for event in range(own.start, own.stop):
            self._at = event
            self._board.tell(event=event)
            self._encode_until(event)
            keys = events.keys(event)
            mine = self._own_slice(len(keys))
            # A batch of small clips may be a multiple of the usual size; the number of passes stays the same.
            size = self._micro_batch_size * (len(keys) // events.batch)
            for start in range(0, len(mine), size):
                samples = [self._take(event, position, len(keys)) for position in mine[start : start + size]]
                named = [(index, epoch) for epoch, index in (keys[p] for p in mine[start : start + size])]
                yield assemble(samples, named, self._device)

    def _own_slice(self, length: int) -> range:
        own = self._course.own
        rank, size = own.data_rank(self._link.rank), length // own.data
        return range(rank * size, (rank + 1) * size)

    def _take(self, event: int, position: int, length: int) -> SampleFeatures:
        source = encoder_of(position, length, self._world_size)
        if source == self._link.rank:
            return self._kept.pop((event, position))
        started = time.perf_counter()
        data = self._link.receive(source, self._number(event, position))
        self._waited += time.perf_counter() - started
        return unpack(data)

    # ---- encoding --------------------------------------------------------------------------------------------------

    def _encode_until(self, event: int) -> None:
        """Encode this rank's share of ``event`` and of what comes next, as far as the other expert's queue allows.

        Raises:
            ParallelError: the other expert did not move for longer than a collective may take.
        """
        started, timeout = time.monotonic(), self._link.timeout.total_seconds()
        while True:
            standing = self._board.look()
            if self._next <= event + AHEAD:
                goal = min(event + AHEAD + self._together, self._room(standing), self._course.stop)
                self._encode(range(self._next, goal), standing)
            if self._next > event:
                return
            if time.monotonic() - started > timeout:
                raise ParallelError(
                    f"waited {timeout / 60:.0f} minutes for the {self._board.other.name}-noise expert, which is "
                    f"{event - standing.event} batches behind",
                    fix="look at its last lines; if it is slow rather than lost, raise --distributed-timeout-minutes")
            time.sleep(LOOK_SECONDS)
            self._waited += LOOK_SECONDS

    def _room(self, standing: Standing) -> int:
        """Return the first event that does not fit into the other expert's queue."""
        other = self._course.other
        if standing.ended or self._next >= other.stop:
            return self._course.stop
        return max(standing.event, other.start) + QUEUE + self._together

    def _encode(self, events: range, standing: Standing) -> None:
        """Decode, encode and send this rank's share of some events."""
        lengths = {event: len(self._course.events.keys(event)) for event in events}
        places = [(event, position) for event, length in lengths.items()
                  for position in share(length, self._link.rank, self._world_size)]
        batches = []
        for event in dict.fromkeys(event for event, _ in places):
            started = time.perf_counter()
            batches.append(next(self._evaluation_batches if self._course.events.evaluates(event) else self._batches))
            self._waited += time.perf_counter() - started
        self._forget_arrived(standing)
        if places:
            assert self._encoders is not None
            with torch.no_grad():
                samples = self._encoders.encode_samples(batches)
            for (event, position), sample in zip(places, samples, strict=True):
                self._deliver(event, position, lengths[event], sample, standing)
        self._next = max(self._next, events.stop)

    def _deliver(self, event: int, position: int, length: int, sample: SampleFeatures, standing: Standing) -> None:
        """Hand a sample to every rank that reads it."""
        data: Tensor | None = None
        going_on = ((self._board.own, self._course.own, self._reading),
                    (self._board.other, self._course.other, not standing.ended))
        for part, reader, active in going_on:
            for rank in reader.readers(position, length) if active and reader.reads(event) else ():
                if rank == self._link.rank:
                    self._kept[event, position] = on_host(sample)
                    continue
                data = pack(sample) if data is None else data
                self._sent[part.name].append((event, self._link.send(data, rank, self._number(event, position))))

    def _forget_arrived(self, standing: Standing) -> None:
        """Free what was sent for events that the receivers have behind them."""
        for part, event in ((self._board.own, self._at), (self._board.other, standing.event)):
            sent = self._sent[part.name]
            while sent and sent[0][0] < event:
                sent.popleft()[1].wait()

    def _number(self, event: int, position: int) -> int:
        events = self._course.events
        return event * events.batch * max(1, *events.training.multiples) + position


def agree(config: RunConfig, groups: ParallelGroups | None, progress: Progress, board: Board,
          data: tuple[OpenedData, OpenedData]) -> Course:
    """Exchange where both experts stand and return what follows from it. Collective over the whole job.

    Args:
        config: of this rank's expert.
        groups: its layout, ``None`` when it is done.
        progress: where it stands.
        board: between the experts.
        data: training and evaluation samples.

    Raises:
        CheckpointError: the samples behind one expert are not those behind the other at the same iteration.
    """
    training, batch = config.training, config.global_batch(len(board.own))
    evaluates = training.eval_interval is not None and training.eval_iters > 0
    events = Events(data[0].sampler, evaluation_order(data[1], training.seed), batch,
                    offset=progress.consumed_samples - progress.iteration * batch,
                    interval=training.eval_interval or 0 if evaluates else 0, rounds=training.eval_iters)
    stop = events.before(training.train_iters)
    start = stop if groups is None else events.before(progress.iteration)
    dims = ParallelGroups().dims if groups is None else groups.dims
    own = {"model_ranks": dims.tensor * dims.context, "data": dims.data, "start": start, "stop": stop}
    told = board.exchange("course", {**own, "offset": events.offset})
    offset = told.pop("offset")
    readers = Reader(board.own.ranks, **own), Reader(board.other.ranks, **told)
    assert groups is None or readers[0].data_rank(board.link.rank) == groups.dp_rank, "ranks are in another order"
    if readers[1].start < readers[1].stop:
        if start < stop and offset != events.offset:
            raise CheckpointError(
                f"at iteration {progress.iteration} the {board.own.name}-noise expert has consumed "
                f"{progress.consumed_samples} samples, the {board.other.name}-noise one {offset - events.offset:+d} at "
                "the same iteration: they read different samples",
                fix="go on with each in a job of its own, or from checkpoints made with one batch size")
        events = Events(events.training, events.evaluation, batch, offset, events.interval, events.rounds)
    return Course(events, *readers)


class _Logs:
    """Notes bad clips in the save folders of both experts."""

    def __init__(self, data: OpenedData, saves: Iterable[str | None], max_fraction: float, *, is_first: bool) -> None:
        self._logs: list[BadSampleLog] = [
            data.bad_sample_log(Path(save) / BAD_SAMPLES_FILE if save else None, max_fraction, is_first=is_first)
            for save in saves]

    def add(self, samples: Iterable[BadSample]) -> None:
        """Note bad samples; raises ``DataError`` when there are too many."""
        noted = list(samples)
        for log in self._logs:
            log.add(noted)


def on_host(sample: SampleFeatures) -> SampleFeatures:
    """Return a sample in host memory."""
    return replace(sample, **{name: value.cpu() for name, value in vars(sample).items() if value is not None})


def pack(sample: SampleFeatures) -> Tensor:
    """Return a sample as bytes [n] uint8 on the host."""
    buffer = io.BytesIO()
    # A clone: torch.save writes the whole storage, and a sample may be one row of its batch.
    torch.save({name: value.cpu().clone() for name, value in vars(sample).items() if value is not None}, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def unpack(data: Tensor) -> SampleFeatures:
    """Return the sample of :func:`pack`'s bytes."""
    return SampleFeatures(**torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True))
