"""What is in a data set: every clip probed (or decoded), numbers over all of them, duplicates, long captions."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspeed_wan.data import video
from mindspeed_wan.data.feature_cache import clip_content
from mindspeed_wan.data.plan import ClipSettings, sample_shape
from mindspeed_wan.data.records import ClipRecord, Problems
from mindspeed_wan.errors import DataError

_THREADS = 8


@dataclass(frozen=True)
class Surveyed:
    """One clip as its file is: ``info`` from probing, or the reason why it cannot be read."""

    record: ClipRecord
    info: video.VideoInfo | None
    problem: str | None = None

    @property
    def completed(self) -> ClipRecord:
        """The record with what the annotation left open filled in from the file."""
        if self.info is None:
            return self.record
        return replace(
            self.record,
            num_frames=self.record.num_frames or self.info.num_frames,
            fps=self.record.fps or self.info.fps or None,
            height=self.record.height or self.info.height,
            width=self.record.width or self.info.width,
        )


def survey(records: Sequence[ClipRecord], *, decode: bool = False, on_clip: Callable[[], None] = lambda: None
           ) -> list[Surveyed]:
    """Look at every clip.

    Args:
        records: from ``manifest.collect``.
        decode: decode every frame, not only headers and the first one.
        on_clip: called after each (progress).
    """
    def look(record: ClipRecord) -> Surveyed:
        try:
            return Surveyed(record, _look_at(record, decode))
        except DataError as error:
            return Surveyed(record, None, error.message)
        finally:
            on_clip()

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look, records))


def _look_at(record: ClipRecord, decode: bool) -> video.VideoInfo:
    if record.kind == "image":
        _, height, width, _ = video.read_image(record.path).shape
        return video.VideoInfo(1, 0.0, height, width)
    info = video.probe(record.path)
    if decode:
        # In pieces, so that a long file does not fill the memory.
        for start in range(0, info.num_frames, 64):
            video.read_frames(record.path, range(start, min(start + 64, info.num_frames)))
    return info


def find_problems(clips: Iterable[Surveyed], settings: ClipSettings | None, problems: Problems) -> None:
    """Note clips that cannot be read, annotations that contradict the file, and clips the settings leave out."""
    for clip in clips:
        record, info = clip.record, clip.info
        if info is None:
            problems.add(f"{record.path} {clip.problem}", record.where)
            continue
        _compare(record, info, problems)
        if settings is not None:
            try:
                sample_shape(settings, clip.completed)
            except DataError as error:
                problems.add(error.message, record.where, error.fix)


def _compare(record: ClipRecord, info: video.VideoInfo, problems: Problems) -> None:
    """Note where an annotation says something else than the file."""
    if record.kind == "image":
        return
    if record.num_frames is not None and record.num_frames > info.num_frames:
        problems.add(f"num_frames is {record.num_frames}, the file has {info.num_frames}", record.where)
    if record.cut is not None and record.cut[1] > info.num_frames:
        problems.add(f"cut ends at {record.cut[1]}, the file has {info.num_frames} frames", record.where)
    if record.fps is not None and info.fps and abs(record.fps - info.fps) > 0.02 * info.fps:
        problems.add(f"fps is {record.fps:g}, the file has {info.fps:.3f}", record.where)
    said = (record.height, record.width)
    if None not in said and said != (info.height, info.width):
        problems.add(f"resolution is {said[0]}x{said[1]}, the file has {info.height}x{info.width}", record.where)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Numbers over a data set."""

    clips: int
    unreadable: int
    seconds: float
    frames: Counter[int] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    variable_rate: int = 0
    rotated: int = 0
    stretched: int = 0
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    duplicates: list[list[Path]] = field(default_factory=list)
    equal_captions: int = 0


def statistics(clips: Sequence[Surveyed], *, tokenizer: Any = None, max_length: int = 512) -> Statistics:
    """Count everything about a surveyed data set; ``tokenizer`` adds caption lengths in tokens."""
    readable = [clip for clip in clips if clip.info is not None]
    result = Statistics(len(clips), len(clips) - len(readable), 0.0)
    captions = [caption for clip in clips for caption in clip.record.captions]
    for clip in readable:
        info = clip.info
        assert info is not None
        result.frames[info.num_frames] += 1
        result.rates[round(info.fps, 2)] += 1
        result.sizes[f"{info.height}x{info.width}"] += 1
        result.codecs[info.codec or "image"] += 1
        result.variable_rate += not info.constant_rate
        result.rotated += info.rotation != 0
        result.stretched += abs(info.pixel_aspect - 1) > 0.01
        result.seconds += info.num_frames / info.fps if info.fps else 0.0
    result.words = [len(caption.split()) for caption in captions]
    if tokenizer is not None:
        from mindspeed_wan.models.text_encoder import clean_prompt

        result.tokens = [len(tokenizer(clean_prompt(caption))["input_ids"]) for caption in captions]
    result.equal_captions = len(captions) - len(set(captions))
    result.duplicates = duplicates([clip.record.path for clip in readable])
    return result


def duplicates(paths: Iterable[Path]) -> list[list[Path]]:
    """Return groups of different files with equal content (only files of equal size are read)."""
    by_size: dict[int, set[Path]] = defaultdict(set)
    for path in paths:
        resolved = path.resolve()
        by_size[resolved.stat().st_size].add(resolved)
    groups: dict[str, list[Path]] = defaultdict(list)
    for same in by_size.values():
        if len(same) > 1:
            for path in sorted(same):
                groups[clip_content(path).digest].append(path)
    return [group for group in groups.values() if len(group) > 1]


def describe(numbers: Statistics, *, max_length: int = 512) -> list[str]:
    """Return the statistics as lines of text."""
    minutes, seconds = divmod(round(numbers.seconds), 60)
    lines = [
        f"clips: {numbers.clips} ({numbers.unreadable} cannot be read), {minutes} min {seconds} s",
        f"frames: {_spread(list(numbers.frames.elements()))}",
        f"frame rate: {_common(numbers.rates)}; variable in {numbers.variable_rate} files",
        f"size (height x width): {_common(numbers.sizes)}; {numbers.rotated} rotated, "
        f"{numbers.stretched} with pixels that are not square",
        f"codec: {_common(numbers.codecs)}",
        f"caption words: {_spread(numbers.words)}; {numbers.equal_captions} captions occur more than once",
    ]
    if numbers.tokens:
        over = sum(count > max_length for count in numbers.tokens)
        share = 100 * over / len(numbers.tokens)
        lines.append(f"caption tokens: {_spread(numbers.tokens)}; {over} ({share:.1f} %) are cut at {max_length}")
    copies = sum(len(group) - 1 for group in numbers.duplicates)
    lines.append(f"duplicates: {copies} files have the content of another")
    lines += [f"  {' = '.join(map(str, group))}" for group in numbers.duplicates[:5]]
    return lines


def _spread(values: list[int]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def _common(counter: Counter[Any]) -> str:
    shown = ", ".join(f"{value} ({count})" for value, count in counter.most_common(4))
    return shown + (f" and {len(counter) - 4} more" if len(counter) > 4 else "") or "none"


# ---- split -----------------------------------------------------------------------------------------------------------


def split(records: Sequence[ClipRecord], share: float, seed: int) -> tuple[list[ClipRecord], list[ClipRecord]]:
    """Split by source file, so that two windows of one video never fall on both sides.

    Args:
        records: the clips.
        share: of the source files that goes into the first part, in (0, 1).
        seed: of the draw.

    Returns:
        (first, second), both in the order of ``records`` and neither empty.

    Raises:
        DataError: fewer than two source files.
    """
    from mindspeed_wan.data.sampler import shuffled

    source_of = {path: os.path.realpath(path) for path in dict.fromkeys(record.path for record in records)}
    sources = list(dict.fromkeys(source_of.values()))
    if len(sources) < 2:
        raise DataError(f"{len(sources)} source file cannot be split")
    count = min(len(sources) - 1, max(1, math.floor(share * len(sources) + 0.5)))
    chosen = {sources[i] for i in shuffled(len(sources), seed, 0, "split")[:count].tolist()}
    first = [record for record in records if source_of[record.path] in chosen]
    return first, [record for record in records if source_of[record.path] not in chosen]
