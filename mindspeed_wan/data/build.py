"""From the configuration's ``data`` section to a data set and its order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.config.schema import DataSection
from mindspeed_wan.data import manifest
from mindspeed_wan.data.bad_samples import BadSample, BadSampleLog
from mindspeed_wan.data.dataset import ClipDataset, prepare
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.records import ClipRecord
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import DataError


def clip_settings(section: DataSection) -> ClipSettings:
    """Return the part of the section that decides how a clip becomes a sample."""
    return ClipSettings(
        num_frames=section.num_frames,
        min_num_frames=section.min_num_frames,
        frame_interval=section.frame_interval,
        auto_interval=section.auto_interval,
        train_fps=section.train_fps,
        speed_factor=section.speed_factor,
        max_height=section.max_height,
        max_width=section.max_width,
        max_pixels=section.max_pixels,
        min_pixels=section.min_pixels,
        force_resolution=section.force_resolution,
        hw_stride=section.hw_stride,
        max_aspect=section.hw_aspect_thr,
        crop=section.crop,
        interpolation=section.interpolation,
        reader=section.reader,
        caption_dropout=section.caption_dropout,
    )


@dataclass(frozen=True)
class OpenedClips:
    """A data set, its order, and what was left out: (clip, reason)."""

    dataset: ClipDataset
    sampler: GlobalBatchSampler
    excluded: list[tuple[ClipRecord, str]]
    unreadable: list[tuple[ClipRecord, str]]

    def describe(self, global_batch_size: int) -> list[str]:
        """Return the lines that a run prints once: clips, shapes, and everything that is left out."""
        counts: dict[tuple[int, int, int], int] = {}
        for shape in self.dataset.shapes:
            counts[shape] = counts.get(shape, 0) + 1
        shapes = ", ".join(f"{n} of {f}x{h}x{w}" for (f, h, w), n in sorted(counts.items(), key=lambda c: -c[1])[:8])
        lines = [f"data: {len(self.dataset)} clips ({shapes}{', ...' if len(counts) > 8 else ''})"]
        for what, group in (("left out by the settings", self.excluded), ("cannot be read", self.unreadable)):
            if group:
                record, reason = group[0]
                lines.append(f"data: {len(group)} clips {what}, e.g. {record.where}: {reason}")
        for left_shape, dropped in self.sampler.dropped_per_epoch(global_batch_size).items():
            lines.append(f"data: drop_last leaves out {dropped} clips of shape {left_shape} in each epoch")
        return lines

    def bad_sample_log(self, path: Path | None, max_fraction: float, *, write: bool = True) -> BadSampleLog:
        """Return the log of bad clips, with those found at start-up already in it.

        Raises:
            DataError: these alone are more than the run accepts.
        """
        total = len(self.dataset) + len(self.unreadable)
        log = BadSampleLog(path, total, max_fraction, write=write)
        # Clips found at start-up have no index in the data set: they count from its end.
        log.add(BadSample(len(self.dataset) + number, str(record.path), record.where, reason)
                for number, (record, reason) in enumerate(self.unreadable))
        return log


def open_clips(section: DataSection, *, seed: int, decoder_threads: int = 1) -> OpenedClips:
    """Read the annotations, find every clip's shape, and set up the order.

    Args:
        section: the configuration's ``data`` section, ``kind`` video.
        seed: of order, crops, frame windows and captions.
        decoder_threads: 1 with worker processes, more when decoding in the training process.

    Raises:
        DataError: annotations with problems (all are listed), or no usable clip.
    """
    if section.data_path is None:
        raise DataError("no data set is named", fix="data_path in data.json")
    settings = clip_settings(section)
    records = manifest.load(section.data_path, section.data_folder)
    prepared = prepare(records, settings, seed=seed, drop_short_ratio=section.drop_short_ratio)
    dataset = ClipDataset(prepared, settings, seed=seed, decoder_threads=decoder_threads)
    sampler = GlobalBatchSampler(
        len(dataset), seed, section.shuffle, shapes=dataset.shapes, drop_last=section.drop_last
    )
    return OpenedClips(dataset, sampler, prepared.excluded, prepared.unreadable)
