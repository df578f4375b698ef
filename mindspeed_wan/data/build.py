"""From the configuration to a data set and its order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_wan.config.schema import DataSection, RunConfig
from mindspeed_wan.data import manifest
from mindspeed_wan.data.bad_samples import BadSample, BadSampleLog
from mindspeed_wan.data.buckets import batch_multiples
from mindspeed_wan.data.dataset import ClipDataset, KeyedDataset, prepare
from mindspeed_wan.data.feature_cache import EncoderChoice
from mindspeed_wan.data.features import FeatureDataset
from mindspeed_wan.data.mm_features import MMFeatureDataset
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
        frame_choice=section.frame_choice,
        size_buckets=section.size_buckets,
        frame_buckets=section.frame_buckets,
        reader=section.reader,
        caption_dropout=section.caption_dropout,
    )


@dataclass(frozen=True)
class OpenedData:
    """A data set, its order, and what was left out: (clip, reason)."""

    dataset: KeyedDataset
    sampler: GlobalBatchSampler
    excluded: list[tuple[ClipRecord, str]] = field(default_factory=list)
    unreadable: list[tuple[ClipRecord, str]] = field(default_factory=list)

    def describe(self, global_batch_size: int) -> list[str]:
        """Return the lines that a run prints once: clips, shapes, and everything that is left out."""
        counts: dict[tuple[int, int, int], int] = {}
        for shape in self.dataset.shapes:
            counts[shape] = counts.get(shape, 0) + 1
        shapes = ", ".join(f"{n} of {f}x{h}x{w}" for (f, h, w), n in sorted(counts.items(), key=lambda c: -c[1])[:8])
        lines = [f"data: {len(self.dataset)} clips ({shapes}{', ...' if len(counts) > 8 else ''})"]
        if max(self.sampler.multiples) > 1:
            sizes = zip(self.sampler.bucket_shapes, self.sampler.multiples)
            lines.append("data: clips per batch slot " + ", ".join(f"{_text(shape)}: {n}" for shape, n in sizes))
        for what, group in (("left out by the settings", self.excluded), ("cannot be read", self.unreadable)):
            if group:
                record, reason = group[0]
                lines.append(f"data: {len(group)} clips {what}, e.g. {record.where}: {reason}")
        for left_shape, dropped in self.sampler.dropped_per_epoch(global_batch_size).items():
            lines.append(f"data: drop_last leaves out {dropped} clips of {_text(left_shape)} in each epoch")
        return lines

    def bad_sample_log(self, path: Path | None, max_fraction: float, *, write: bool = True, is_first: bool = True
                       ) -> BadSampleLog:
        """Return the log of bad clips, with those found at start-up already in it.

        Args:
            path: its file; ``None`` keeps the count in memory only.
            max_fraction: share of bad clips above which the run stops.
            write: whether this rank writes down the bad clips it meets.
            is_first: whether this rank writes down those found at start-up, which every rank finds.

        Raises:
            DataError: these alone are more than the run accepts.
        """
        total = len(self.dataset) + len(self.unreadable)
        log = BadSampleLog(path, total, max_fraction, write=write and is_first)
        # Clips found at start-up have no index in the data set: they count from its end.
        log.add(BadSample(len(self.dataset) + number, str(record.path), record.where, reason)
                for number, (record, reason) in enumerate(self.unreadable))
        log.write = write
        return log


def _text(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def open_data(config: RunConfig) -> OpenedData:
    """Open what the run trains on: clips, a feature cache, or a MindSpeed-MM feature folder.

    Raises:
        DataError: see ``open_clips`` and ``open_features``.
    """
    if config.data.kind == "video":
        return open_clips(config.data, seed=config.training.seed)
    return open_features(config)


def open_clips(section: DataSection, *, seed: int, decoder_threads: int = 1) -> OpenedData:
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
    return OpenedData(dataset, _order(dataset, section, seed), prepared.excluded, prepared.unreadable)


def open_features(config: RunConfig) -> OpenedData:
    """Open cached features: a folder with ``cache.json``, or MindSpeed-MM's ``data.jsonl``.

    A cache is compared with what this run would make: settings, clips that have changed, and the weights of the
    encoders where the model file names them.

    Raises:
        DataError: no cache, an unfinished, damaged or stale one.
    """
    section, seed = config.data, config.training.seed
    if section.data_path is None:
        raise DataError("no feature folder is named", fix="data_path in data.json")
    path = Path(section.data_path)
    if config.model.vae.do_sample:
        raise DataError("do_sample draws new latents each time; cached features hold one", where=str(path),
                        fix="set do_sample to false in the model file")
    if path.suffix == ".jsonl":
        if section.caption_dropout > 0:
            raise DataError("cfg (caption dropout) needs the states of the empty caption, which this folder lacks",
                            where=str(path), fix="set cfg to 0, or use mindspeed-wan features build")
        folder = Path(section.data_folder) if section.data_folder else None
        wan = config.model.wan
        mm_dataset = MMFeatureDataset(path, folder, task=config.model.task, seed=seed, channels=wan.out_channels,
                                      text_width=wan.text_dim, text_length=wan.text_len)
        return OpenedData(mm_dataset, _order(mm_dataset, section, seed), unreadable=mm_dataset.unreadable)
    dataset = FeatureDataset(path.parent if path.name == "cache.json" else path, seed=seed,
                             caption_dropout=section.caption_dropout)
    dataset.check(clip_settings(section), config.model.task, encoder_choice(config, must_exist=False))
    if dataset.text_width != (wanted := config.model.wan.text_dim):
        raise DataError(f"the cached text states have {dataset.text_width} channels, the model reads {wanted}",
                        where=str(path), fix="build the cache with the model's encoders")
    dataset.check_clips()
    return OpenedData(dataset, _order(dataset, section, seed))


def encoder_choice(config: RunConfig, *, must_exist: bool = True) -> EncoderChoice:
    """Return the encoders that the model file names, and how it runs them.

    Raises:
        DataError: one is not named or not there, and ``must_exist``.
    """
    vae, text = config.model.vae, config.model.text_encoder
    for name, path in (("ae", vae.path), ("text_encoder", text.path)):
        if must_exist and (path is None or not Path(path).exists()):
            raise DataError(f"{name}.from_pretrained is {path!r}, which does not exist",
                            fix="give the encoder's folder in the model file")
    tiling = (*vae.tile_size, *vae.tile_stride) if vae.tiling else None
    return EncoderChoice(
        vae=vae.path, text_encoder=text.path, tokenizer=text.tokenizer_path, vae_dtype=vae.dtype,
        text_dtype=text.dtype, tiling=tiling, max_length=text.max_length,
        clean_captions=config.data.clean_captions,
    )


def _order(dataset: KeyedDataset, section: DataSection, seed: int) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        len(dataset), seed, section.shuffle, shapes=dataset.shapes, drop_last=section.drop_last,
        multiples=batch_multiples(dataset.shapes) if section.balance_tokens else None,
    )
