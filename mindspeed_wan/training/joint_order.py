"""Which sample is encoded by whom and read by whom, when two experts train on the same batches: arithmetic only.

An *event* is one global batch in the order in which a run meets them: the batch of each step and, after every
``--eval-interval`` steps, the batches of one evaluation. Events are numbered from the first step on, so a number
means the same samples to both experts, wherever each of them stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_wan.data.sampler import GlobalBatchSampler, Key


@dataclass(frozen=True)
class Events:
    """The batches of a run.

    Args:
        training: order of the training samples.
        evaluation: order of the evaluation samples.
        batch: samples per step.
        offset: samples consumed before the step with number 0 (not 0 when the batch size changed on the way).
        interval: steps between evaluations; 0 for none.
        rounds: batches per evaluation.
    """

    training: GlobalBatchSampler
    evaluation: GlobalBatchSampler
    batch: int
    offset: int = 0
    interval: int = 0
    rounds: int = 0

    def before(self, iteration: int) -> int:
        """Return the number of events before the step that follows ``iteration`` done ones."""
        return iteration + (self.rounds * (iteration // self.interval) if self.interval else 0)

    def evaluates(self, event: int) -> bool:
        """Tell whether an event belongs to an evaluation."""
        return bool(self.interval) and event % (self.interval + self.rounds) >= self.interval

    def keys(self, event: int) -> list[Key]:
        """Return the (epoch, index) of every sample of an event, in order."""
        if not self.interval:
            return self.training.indices(self.offset + event * self.batch, self.batch)
        cycle, place = divmod(event, self.interval + self.rounds)
        if place >= self.interval:
            return self.evaluation.indices((place - self.interval) * self.batch, self.batch)
        return self.training.indices(self.offset + (cycle * self.interval + place) * self.batch, self.batch)


@dataclass(frozen=True)
class Reader:
    """An expert as a reader of events.

    Args:
        ranks: its ranks in the job.
        model_ranks: neighbours that read the same samples (tensor x context).
        data: its data ranks.
        start: the first event it reads.
        stop: the event after its last.
    """

    ranks: range
    model_ranks: int
    data: int
    start: int
    stop: int

    def reads(self, event: int) -> bool:
        """Tell whether this expert needs an event."""
        return self.start <= event < self.stop

    def data_rank(self, rank: int) -> int:
        """Return which slice of a batch a rank of the job reads (pipeline stages are the slowest axis)."""
        return (rank - self.ranks.start) // self.model_ranks % self.data

    def readers(self, position: int, length: int) -> list[int]:
        """Return the ranks that read sample ``position`` of a batch of ``length``."""
        wanted = position * self.data // length
        return [rank for rank in self.ranks if self.data_rank(rank) == wanted]


def encoder_of(position: int, length: int, world_size: int) -> int:
    """Return the rank that decodes and encodes a sample: neighbours on one rank, spread over the whole job."""
    return position * world_size // length


def share(length: int, rank: int, world_size: int) -> list[int]:
    """Return the positions that ``rank`` encodes of a batch of ``length`` samples."""
    return [position for position in range(length) if encoder_of(position, length, world_size) == rank]


def ever_encodes(events: Events, rank: int, world_size: int) -> bool:
    """Tell whether ``rank`` has anything to encode, whatever shape a batch has; if not, it needs no encoder."""
    sizes = {events.batch * multiple for multiple in (1, *events.training.multiples)}
    return any(share(size, rank, world_size) for size in sizes)


def shared_keys(events: Events, span: range, rank: int, world_size: int, *, evaluation: bool) -> Iterator[list[Key]]:
    """Yield the keys of this rank's share of each training (or evaluation) event; events without one are left out."""
    for event in span:
        if events.evaluates(event) != evaluation:
            continue
        keys = events.keys(event)
        mine = [keys[position] for position in share(len(keys), rank, world_size)]
        if mine:
            yield mine
