"""The run's data: annotations read once for all ranks, then an endless stream of this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.config.schema import DataSection, RunConfig
from mindspeed_wan.data import loader, manifest
from mindspeed_wan.data.bad_samples import BadSampleLog
from mindspeed_wan.data.dataset import ClipDataset, Prepared, prepare
from mindspeed_wan.data.loader import MicroBatch
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import DataError
from mindspeed_wan.parallel.agreement import first_decides
from mindspeed_wan.parallel.groups import ParallelGroups

BAD_SAMPLES_FILE = "bad_samples.jsonl"


@dataclass(frozen=True)
class DataSource:
    """Clips ready to be sampled, and their order."""

    dataset: ClipDataset
    sampler: GlobalBatchSampler
    prepared: Prepared

    def describe(self) -> str:
        """Return one line: clips, shapes, what was left out."""
        shapes = sorted(set(self.prepared.shapes))
        listed = ", ".join("x".join(map(str, shape)) for shape in shapes[:4]) + (" ..." if len(shapes) > 4 else "")
        left_out = len(self.prepared.excluded)
        excluded = f", {left_out} left out (first: {self.prepared.excluded[0][1]})" if left_out else ""
        return f"{len(self.dataset)} clips of {listed}{excluded}"


def clip_settings(section: DataSection) -> ClipSettings:
    """Return the part of the ``data`` section that decides how a clip becomes a sample."""
    return ClipSettings(
        num_frames=section.num_frames, min_num_frames=section.min_num_frames, frame_interval=section.frame_interval,
        auto_interval=section.auto_interval, train_fps=section.train_fps, speed_factor=section.speed_factor,
        max_height=section.max_height, max_width=section.max_width, max_pixels=section.max_pixels,
        min_pixels=section.min_pixels, force_resolution=section.force_resolution, hw_stride=section.hw_stride,
        max_aspect=section.hw_aspect_thr, crop=section.crop, interpolation=section.interpolation,
        reader=section.reader, caption_dropout=section.caption_dropout,
    )


def open_data(config: RunConfig) -> DataSource:
    """Read the annotations and find every clip's shape. Not collective; see :func:`open_data_once`.

    Raises:
        DataError: annotation problems with file and line, unreadable clips beyond ``max_bad_fraction``, no clip left.
    """
    return _source(config, _prepare(config))


def open_data_once(config: RunConfig) -> DataSource:
    """:func:`open_data` with the disk work done on rank 0. Collective."""
    return _source(config, first_decides(lambda: _prepare(config)))


def _prepare(config: RunConfig) -> Prepared:
    section = config.data
    records = manifest.load(str(section.data_path), section.data_folder)
    prepared = prepare(records, clip_settings(section), seed=config.training.seed,
                       drop_short_ratio=section.drop_short_ratio)
    bad, total = len(prepared.unreadable), len(records)
    if bad > section.max_bad_fraction * total:
        record, reason = prepared.unreadable[0]
        raise DataError(f"{record.path}: {reason}; {bad} of {total} clips cannot be read", where=record.where,
                        fix="repair or remove the clip, or raise --max-bad-fraction")
    return prepared


def _source(config: RunConfig, prepared: Prepared) -> DataSource:
    section, seed = config.data, config.training.seed
    dataset = ClipDataset(prepared, clip_settings(section), seed=seed)
    sampler = GlobalBatchSampler(len(dataset), seed, section.shuffle, shapes=dataset.shapes,
                                 drop_last=section.drop_last)
    return DataSource(dataset, sampler, prepared)


def micro_batches(config: RunConfig, source: DataSource, groups: ParallelGroups, consumed: int) -> Iterator[MicroBatch]:
    """Return this rank's micro-batches from position ``consumed`` on; TP and CP ranks of a data rank get the same."""
    section, training = config.data, config.training
    schedule = loader.Schedule(
        global_batch_size=config.global_batch(groups.dims.world_size), micro_batch_size=training.micro_batch_size,
        rank=groups.dp_rank, ranks=groups.dims.data, consumed=consumed,
    )
    save = config.checkpoint.save
    writes = groups.tp_rank == 0 and groups.cp_rank == 0
    bad = BadSampleLog(Path(save) / BAD_SAMPLES_FILE if save else None, len(source.dataset), section.max_bad_fraction,
                       write=writes)
    return loader.build_loader(source.dataset, source.sampler, schedule, num_workers=training.num_workers,
                               bad_samples=bad)
