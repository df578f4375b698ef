"""The run's data: an endless stream of this rank's micro-batches from a given position on, encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.build import OpenedData, open_data
from mindspeed_wan.data.loader import MicroBatch, Schedule, build_loader
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.parallel.agreement import all_or_none
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.encoders import Encoders, Features

BAD_SAMPLES_FILE = "bad_samples.jsonl"


class BatchSource:
    """Micro-batches of this rank, with the time spent waiting for them. Collective to create.

    Tensor and context ranks of one data rank read the same samples.

    Args:
        config: the resolved configuration.
        groups: the layout.
        platform: where batches go.
        consumed: samples of the job before the first batch.

    Raises:
        DataError: on every rank, when annotations or clips cannot be used.
    """

    def __init__(self, config: RunConfig, groups: ParallelGroups, platform: Platform, consumed: int) -> None:
        section, training = config.data, config.training
        self.data: OpenedData = all_or_none(lambda: open_data(config))
        self.evaluation_data = all_or_none(lambda: evaluation_data(config, self.data))
        self.waited = 0.0
        batch = config.global_batch(groups.dims.world_size)
        schedule = Schedule(global_batch_size=batch, micro_batch_size=training.micro_batch_size, rank=groups.dp_rank,
                            ranks=groups.dims.data, consumed=consumed)
        self._seed, self._schedule = training.seed, schedule
        save = config.checkpoint.save
        log = self.data.bad_sample_log(Path(save) / BAD_SAMPLES_FILE if save else None, section.max_bad_fraction,
                                        write=groups.tp_rank == groups.cp_rank == groups.pp_rank == 0,
                                        is_first=groups.dp_rank == 0)
        self._batches = build_loader(
            self.data.dataset, self.data.sampler, schedule, num_workers=training.num_workers,
            pin_memory=section.pin_memory and platform.device_type == "cuda", bad_samples=log,
        )
        is_own = self.evaluation_data is self.data
        self._evaluation_log = log if is_own else self.evaluation_data.bad_sample_log(None, section.max_bad_fraction)
        self.description = self.data.describe(batch)
        if self.evaluation_data is not self.data:
            self.description += [f"validation {line}" for line in self.evaluation_data.describe(batch)]

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - started

    def evaluation(self) -> Iterator[MicroBatch]:
        """Return a fresh pass over the evaluation samples in file order; deterministic, so it can run right here."""
        sampler = evaluation_order(self.evaluation_data, self._seed)
        return build_loader(self.evaluation_data.dataset, sampler, replace(self._schedule, consumed=0),
                            bad_samples=self._evaluation_log)


def evaluation_data(config: RunConfig, training: OpenedData) -> OpenedData:
    """Return the evaluation samples: those of ``--valid-mm-data``, or else the training clips.

    Raises:
        DataError: they cannot be used.
    """
    if config.valid_data is None:
        return training
    return open_data(config.model_copy(update={"data": config.valid_data}))


def evaluation_order(data: OpenedData, seed: int) -> GlobalBatchSampler:
    """Return the order of the evaluation samples: that of the file, whatever the training order is."""
    return GlobalBatchSampler(len(data.dataset), seed, shuffle=False, shapes=data.dataset.shapes)


class Feed(Protocol):
    """What a run learns from, encoded and in order.

    ``features`` yields this rank's micro-batches, as long as the run lasts.
    """

    features: Iterator[Features]

    @property
    def description(self) -> list[str]:
        """Lines to print once."""

    @property
    def waited(self) -> float:
        """Seconds in which ``features`` was not ready in time."""

    def evaluation(self, count: int) -> Iterator[Features]:
        """Return the first ``count`` evaluation micro-batches of this rank."""


FeedOpener = Callable[[RunConfig, ParallelGroups, Platform, Progress], Feed]
"""Makes the feed of a run that stands at ``Progress``. Collective."""


class OwnFeed:
    """A feed that needs nobody else: each rank reads and encodes what it trains on. Collective to create.

    Args:
        config: the resolved configuration.
        groups: the layout.
        platform: where the encoders run.
        progress: where the run stands.
    """

    def __init__(self, config: RunConfig, groups: ParallelGroups, platform: Platform, progress: Progress) -> None:
        self._source = BatchSource(config, groups, platform, progress.consumed_samples)
        self._encoders = all_or_none(lambda: Encoders(config, groups, platform))
        self.features: Iterator[Features] = self._encoders.stream(self._source)

    @property
    def description(self) -> list[str]:
        """Lines to print once."""
        return self._source.description

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the loader."""
        return self._source.waited

    def evaluation(self, count: int) -> Iterator[Features]:
        """Return the first ``count`` evaluation micro-batches of this rank."""
        return self._encoders.stream(islice(self._source.evaluation(), count))
