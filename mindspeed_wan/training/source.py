"""The run's data: an endless stream of this rank's micro-batches from a given position on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.build import OpenedData, open_data
from mindspeed_wan.data.loader import MicroBatch, Schedule, build_loader
from mindspeed_wan.parallel.agreement import all_or_none
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms.base import Platform

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
        self.waited = 0.0
        batch = config.global_batch(groups.dims.world_size)
        schedule = Schedule(global_batch_size=batch, micro_batch_size=training.micro_batch_size, rank=groups.dp_rank,
                            ranks=groups.dims.data, consumed=consumed)
        save = config.checkpoint.save
        log = self.data.bad_sample_log(Path(save) / BAD_SAMPLES_FILE if save else None, section.max_bad_fraction,
                                        write=groups.tp_rank == 0 and groups.cp_rank == 0)
        self._batches = build_loader(
            self.data.dataset, self.data.sampler, schedule, num_workers=training.num_workers,
            pin_memory=section.pin_memory and platform.device_type == "cuda", bad_samples=log,
        )
        self.description = self.data.describe(batch)

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - started
