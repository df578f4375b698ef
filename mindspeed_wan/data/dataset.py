"""Samples by (epoch, index): decoded, cut to shape and captioned; a function of its key and the seed only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_wan.data import plan, transforms, video
from mindspeed_wan.data.bad_samples import BadSample
from mindspeed_wan.data.plan import ClipSettings, Shape
from mindspeed_wan.data.records import ClipRecord
from mindspeed_wan.data.sampler import Key
from mindspeed_wan.diffusion import randomness
from mindspeed_wan.errors import DataError

MAX_REPLACEMENTS = 16
"""Unreadable clips in a row after which a sample gives up."""
_PROBE_THREADS = 8


@dataclass(frozen=True)
class Sample:
    """One training sample.

    ``index`` and ``epoch`` are the key it was asked for under (its randomness belongs to it); ``source`` is the clip
    it came from, another one when that was unreadable, and ``bad`` says which were. ``video`` is [3, F, h, w] uint8.
    """

    index: int
    epoch: int
    source: int
    video: Tensor
    caption: str
    path: Path
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made; travels from a worker process to the one that raises it."""

    message: str
    where: str | None
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be sampled: records whose shape is known, and what was left out, each with its reason."""

    records: list[ClipRecord]
    shapes: list[Shape]
    excluded: list[tuple[ClipRecord, str]] = field(default_factory=list)
    unreadable: list[tuple[ClipRecord, str]] = field(default_factory=list)


def prepare(records: Sequence[ClipRecord], settings: ClipSettings, *, seed: int = 0, drop_short_ratio: float = 0.0
            ) -> Prepared:
    """Find every clip's shape, probing the files whose annotation does not say it.

    Args:
        records: from ``manifest.load``.
        settings: which clips are accepted and how they are cut.
        seed: decides which short clips ``drop_short_ratio`` drops.
        drop_short_ratio: share of clips shorter than ``settings.num_frames`` that is left out.

    Raises:
        DataError: no clip is left; lists the reasons with their counts.
    """
    result = Prepared([], [])
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        for number, (record, known) in enumerate(zip(records, pool.map(_completed, records))):
            if isinstance(known, str):
                result.unreadable.append((record, known))
                continue
            for piece in plan.chunks(settings, known):
                try:
                    shape = plan.sample_shape(settings, piece)
                except DataError as error:
                    result.excluded.append((record, error.message))
                    continue
                is_short = shape[0] < min(settings.frame_buckets, default=settings.num_frames)
                if is_short and piece.kind == "video" and drop_short_ratio > 0:
                    draw = randomness.uniform(1, seed=seed, sample_index=number, stream="data/drop_short").item()
                    if draw < drop_short_ratio:
                        result.excluded.append((record, f"{record.path.name} is short (drop_short_ratio)"))
                        continue
                result.records.append(piece)
                result.shapes.append(shape)
    if not result.records:
        raise _nothing_left(result)
    return result


def _nothing_left(result: Prepared) -> DataError:
    both = [*result.unreadable, *result.excluded]
    shown = "\n  ".join(f"{record.where}: {reason}" for record, reason in both[:5])
    more = f"\n  ... and {len(both) - 5} more" if len(both) > 5 else ""
    return DataError(f"none of the {len(both)} clips can be used:\n  {shown}{more}",
                     fix="change num_frames, max_height, max_width or hw_aspect_thr in data.json, or the clips")


def _completed(record: ClipRecord) -> ClipRecord | str:
    """Return the record with frame count, rate and size known, or the reason why they cannot be."""
    if record.kind == "image":
        if record.height and record.width:
            return replace(record, num_frames=1)
        try:
            height, width = video.read_image(record.path).shape[1:3]
        except DataError as error:
            return error.message
        return replace(record, num_frames=1, height=height, width=width)
    if record.num_frames and record.fps and record.height and record.width:
        return record
    try:
        info = video.probe(record.path)
    except DataError as error:
        return error.message
    return replace(record, num_frames=record.num_frames or info.num_frames, fps=record.fps or info.fps or None,
                   height=record.height or info.height, width=record.width or info.width)


class KeyedDataset(torch.utils.data.Dataset):
    """What data sets of clips and of cached features share: records by index, and choices that follow from the key.

    Args:
        captions: the texts of every record.
        shapes: the shape of every record; a bad one is replaced by another of its shape.
        seed: of all choices.
        caption_dropout: probability of an empty caption.
    """

    def __init__(self, captions: Sequence[Sequence[str]], shapes: Sequence[Shape], seed: int, caption_dropout: float
                 ) -> None:
        self.captions, self.shapes, self.seed, self.caption_dropout = captions, list(shapes), seed, caption_dropout
        self._same_shape: dict[Shape, list[int]] = {}
        for index, shape in enumerate(self.shapes):
            self._same_shape.setdefault(shape, []).append(index)

    def __len__(self) -> int:
        return len(self.shapes)

    def candidates(self, epoch: int, index: int) -> Iterable[int]:
        """Yield the clip itself, then others of its shape in an order that depends on the key alone."""
        yield index
        others = [other for other in self._same_shape[self.shapes[index]] if other != index]
        draws = self.draws(epoch, index, "replacement", MAX_REPLACEMENTS)
        for draw in draws[: len(others)]:
            yield others.pop(int(draw * len(others)))

    def caption_choice(self, epoch: int, index: int) -> int | None:
        """Return which of a record's captions a sample gets, ``None`` where it is dropped."""
        pick, drop = self.draws(epoch, index, "caption", 2)
        return None if drop < self.caption_dropout else int(pick * len(self.captions[index]))

    def caption(self, index: int, choice: int | None) -> str:
        """Return the text of a ``caption_choice``: one of the record's, or "" where it is dropped."""
        return "" if choice is None else self.captions[index][choice]

    def draws(self, epoch: int, index: int, stream: str, count: int) -> list[float]:
        """Return numbers in [0, 1) that belong to (seed, epoch, index, stream)."""
        values = randomness.uniform(count, seed=self.seed, sample_index=index, epoch=epoch, stream=f"data/{stream}")
        return values.tolist()


def give_up(bad: Sequence[BadSample]) -> Failure:
    """Return the failure of a sample whose clip and replacements are all bad."""
    last = bad[-1]
    return Failure(f"{last.path}: {last.reason} (and {len(bad) - 1} replacements cannot be read either)", last.where,
                   tuple(bad))


class ClipDataset(KeyedDataset):
    """Clips by (epoch, index).

    Args:
        prepared: records and shapes.
        settings: how clips become samples.
        seed: of crops, frame windows, caption choice and dropout.
        decoder_threads: threads per decoder; 1 inside worker processes.
    """

    def __init__(self, prepared: Prepared, settings: ClipSettings, *, seed: int = 0, decoder_threads: int = 1) -> None:
        super().__init__([record.captions for record in prepared.records], prepared.shapes, seed,
                         settings.caption_dropout)
        self.records, self.settings, self.decoder_threads = prepared.records, settings, decoder_threads

    def __getitem__(self, key: Key) -> Sample | Failure:
        """Return the sample of (epoch, index), or of its replacement when that clip cannot be read."""
        epoch, index = key
        bad: list[BadSample] = []
        for source in self.candidates(epoch, index):
            record = self.records[source]
            try:
                pixels = self.read(epoch, source)
            except DataError as error:
                bad.append(BadSample(source, str(record.path), record.where, error.message))
                continue
            caption = self.caption(source, self.caption_choice(epoch, source))
            return Sample(index, epoch, source, pixels, caption, record.path, tuple(bad))
        return give_up(bad)

    def read(self, epoch: int, index: int) -> Tensor:
        """Decode and transform one clip to [3, F, h, w] uint8.

        Raises:
            DataError: the clip cannot be read, or is not what its annotation says.
        """
        record, settings = self.records[index], self.settings
        place, down, across = self.draws(epoch, index, "window", 3)
        if record.kind == "image":
            frames = video.read_image(record.path)
        else:
            assert record.num_frames is not None
            window = plan.frame_window(settings, record.num_frames, record.fps or 0.0, record.cut)
            chosen = plan.choose_frames(window, settings.frame_choice, place)
            frames = video.read_frames(record.path, chosen, backend=settings.reader, threads=self.decoder_threads)
        if record.crop is not None:
            left, right, top, bottom = record.crop
            frames = frames[:, top:bottom, left:right]
            if not frames.size:
                raise DataError(f"crop {list(record.crop)} lies outside the picture")
        size = plan.size_plan(settings, *frames.shape[1:3])
        if (len(frames), *size.out) != self.shapes[index]:
            raise DataError(f"the annotation's size {record.height}x{record.width} is not the file's "
                            f"{frames.shape[1]}x{frames.shape[2]}")
        return transforms.to_sample(frames, size, settings, (down, across))
