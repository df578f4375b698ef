"""What is taken from each clip: which frames, resized and cropped to which size. Arithmetic only, nothing is decoded.

The rules are those of MindSpeed-MM's data pipeline (its OpensoraplanVideoProcessor), so the same data.json gives the
same tensors; where its choice is random, ours is drawn from the sample's own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mindspeed_wan.data import buckets
from mindspeed_wan.data.buckets import Shape
from mindspeed_wan.data.records import ClipRecord
from mindspeed_wan.errors import DataError

FrameChoice = Literal["random", "head", "center", "uniform", "chunk"]

VAE_STRIDE = 8
"""Pixels a side of a latent stands for."""
MODEL_STRIDE = 16
"""Sides of a sample are multiples of this: those of the VAE times 2 of the DiT's patch."""
MOST_FRAMES = 10_000_000
"""Frames of a clip above which its annotation is wrong: 46 hours at 60 frames a second."""


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """How clips become samples; the fields of the configuration's ``data`` section that decide it.

    ``frame_choice``: which frames of a clip that is longer than needed: a random or central window, its head, frames
    spread evenly over the whole clip, or ``chunk``: the clip becomes as many samples as it has whole windows.
    ``size_buckets`` ((height, width), ...) replaces the one target size, ``frame_buckets`` the one length: each clip
    takes the bucket that suits it best.
    """

    num_frames: int = 49
    min_num_frames: int = 1
    frame_interval: int = 1
    auto_interval: bool = False
    train_fps: float = 24.0
    speed_factor: float = 1.0
    max_height: int = 480
    max_width: int = 832
    max_pixels: int = 480 * 832
    min_pixels: int = 480 * 832 // 4
    force_resolution: bool = True
    hw_stride: int = MODEL_STRIDE
    max_aspect: float = 5.0
    crop: Literal["center", "random"] = "center"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = False
    frame_choice: FrameChoice = "random"
    size_buckets: tuple[tuple[int, int], ...] = ()
    frame_buckets: tuple[int, ...] = ()
    reader: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, frames in [("num_frames", self.num_frames), *(("frame_buckets", f) for f in self.frame_buckets)]:
            if frames < 1 or frames % 4 != 1:
                low = max(1, (frames - 1) // 4 * 4 + 1)
                raise DataError(f"{name} is {frames}; Wan's VAE encodes 4k+1 frames", fix=f"use {low} or {low + 4}")
        if self.hw_stride % MODEL_STRIDE:
            raise DataError(f"hw_stride is {self.hw_stride}; sizes must be multiples of {MODEL_STRIDE}")
        sides = [("size_buckets", side) for size in self.size_buckets for side in size]
        if self.force_resolution and not self.size_buckets:
            sides = [("max_height", self.max_height), ("max_width", self.max_width)]
        for name, side in sides:
            if side < MODEL_STRIDE or side % MODEL_STRIDE:
                low = max(1, side // MODEL_STRIDE) * MODEL_STRIDE
                raise DataError(f"{name} is {side}; sizes must be multiples of {MODEL_STRIDE}",
                                fix=f"use {low} or {low + MODEL_STRIDE}")

    @property
    def longest(self) -> int:
        """Most frames of a sample."""
        return max(self.frame_buckets, default=self.num_frames)


@dataclass(frozen=True)
class FrameWindow:
    """The frames a clip offers: ``indices`` in the file, ``take`` of them (4k+1) go into a sample."""

    indices: tuple[int, ...]
    take: int


@dataclass(frozen=True)
class SizePlan:
    """Resize to ``resized``, then cut out ``out``; both (height, width)."""

    resized: tuple[int, int]
    out: tuple[int, int]


def frame_window(settings: ClipSettings, num_frames: int, fps: float, cut: tuple[int, int] | None) -> FrameWindow:
    """Return the frames that a clip of ``num_frames`` offers after resampling to the training frame rate.

    Raises:
        DataError: too short for ``min_num_frames``, or without a frame rate where one is needed.
    """
    start, end = cut if cut is not None else (0, num_frames)
    if end > num_frames:
        raise DataError(f"cut ends at frame {end} of a clip of {num_frames} frames")
    interval: float = settings.frame_interval
    if settings.auto_interval:
        if fps <= 0:
            raise DataError("has no frame rate, which auto_interval needs", fix="give fps in the annotation")
        interval = 1.0 if abs(fps - settings.train_fps) < 0.1 else fps / settings.train_fps
    if end - start > interval * MOST_FRAMES:
        raise DataError(f"has more than {MOST_FRAMES:,} frames at the training frame rate",
                        fix="correct num_frames or fps in the annotation")
    count = math.ceil((end - start) / interval)
    indices = [start + int(i * interval) for i in range(count) if start + int(i * interval) < end]
    indices = _sped_up(indices, settings)
    if settings.frame_buckets and indices:
        return FrameWindow(tuple(indices), buckets.frame_bucket(len(indices), settings.frame_buckets))
    take = min(len(indices), settings.num_frames)
    take = (take - 1) // 4 * 4 + 1 if take else 0
    if take < max(1, settings.min_num_frames):
        raise DataError(
            f"gives {len(indices)} frames at the training frame rate; min_num_frames is {settings.min_num_frames}"
        )
    return FrameWindow(tuple(indices), take)


def _sped_up(indices: list[int], settings: ClipSettings) -> list[int]:
    """Thin the frames out by ``speed_factor``, never below the number that is wanted."""
    surplus = len(indices) / settings.longest
    if settings.speed_factor <= 1 or surplus <= 1:
        return indices
    count = int(len(indices) / min(settings.speed_factor, surplus))
    if count < 2:
        return indices[:count]
    step = (len(indices) - 1) / (count - 1)
    return [indices[int(i * step)] for i in range(count)]


def choose_frames(window: FrameWindow, choice: FrameChoice, draw: float) -> list[int]:
    """Return the frames of one sample; ``draw`` in [0, 1) places a random window."""
    surplus = len(window.indices) - window.take
    if choice == "uniform" and window.take > 1:
        last = len(window.indices) - 1
        return [window.indices[i * last // (window.take - 1)] for i in range(window.take)]
    start = {"random": int(draw * (surplus + 1)), "center": surplus // 2}.get(choice, 0)
    return list(window.indices[start : start + window.take])


def chunks(settings: ClipSettings, record: ClipRecord) -> list[ClipRecord]:
    """Return the records that a clip becomes: itself, or with ``frame_choice`` chunk one for each whole window.

    A window is a ``cut`` of the source; the frames after the last whole one are not used.
    """
    if settings.frame_choice != "chunk" or record.kind == "image" or record.num_frames is None:
        return [record]
    try:
        window = frame_window(settings, record.num_frames, record.fps or 0.0, record.cut)
    except DataError:
        return [record]  # the caller words the reason when it asks for the shape
    starts = range(0, len(window.indices) - window.take + 1, window.take)
    return [replace(record, cut=(window.indices[at], window.indices[at + window.take - 1] + 1)) for at in starts]


def size_plan(settings: ClipSettings, height: int, width: int) -> SizePlan:
    """Return how a picture of this size is brought to the training size.

    Raises:
        DataError: its side ratio or size is outside what the settings accept.
    """
    if settings.size_buckets:
        return _exact_size(settings, height, width, buckets.size_bucket(height, width, settings.size_buckets))
    if settings.force_resolution:
        return _exact_size(settings, height, width, (settings.max_height, settings.max_width))
    return _free_size(settings, height, width)


def _exact_size(settings: ClipSettings, height: int, width: int, target: tuple[int, int]) -> SizePlan:
    """Short side to the target, then the target cut out.

    In whole numbers. MindSpeed-MM cuts at the target's ratio in floating point and resizes once more; where its
    ``int(832 * (480 / 832))`` is 479 that second resize blurs, everywhere else it changes nothing.
    """
    target_height, target_width = target
    _check_aspect(height * target_width / (width * target_height), height, width, settings)
    if height * target_width < width * target_height:
        resized = (target_height, target_height * width // height)
    else:
        resized = (target_width * height // width, target_width)
    return SizePlan(resized, target)


def _free_size(settings: ClipSettings, height: int, width: int) -> SizePlan:
    """Shrink to at most ``max_pixels`` with the ratio kept, then cut to multiples of the stride."""
    scale = min(1.0, math.sqrt(settings.max_pixels / (height * width)))
    resized = (int(height * scale), int(width * scale)) if scale < 1 else (height, width)
    out = (resized[0] // settings.hw_stride * settings.hw_stride, resized[1] // settings.hw_stride * settings.hw_stride)
    if out[0] * out[1] < settings.min_pixels or not all(out):
        raise DataError(f"{height}x{width} becomes {out[0]}x{out[1]}: smaller than min_hxw {settings.min_pixels}")
    _check_aspect(out[0] / out[1], height, width, settings)
    return SizePlan(resized, out)


def _check_aspect(ratio: float, height: int, width: int, settings: ClipSettings) -> None:
    if not 1 / settings.max_aspect <= ratio <= settings.max_aspect:
        raise DataError(f"{height}x{width} has a side ratio outside hw_aspect_thr {settings.max_aspect:g}")


def sample_shape(settings: ClipSettings, record: ClipRecord) -> Shape:
    """Return the shape of the samples that a record gives; its frame count, rate and size must be known.

    Raises:
        DataError: the settings exclude this clip (the message says by which rule).
    """
    assert record.num_frames is not None and record.height is not None and record.width is not None
    height, width = record.height, record.width
    if record.crop is not None:
        left, right, top, bottom = record.crop
        if right > width or bottom > height:
            raise DataError(f"crop {list(record.crop)} reaches outside the picture of {height}x{width}",
                            where=record.where)
        height, width = bottom - top, right - left
    try:
        frames = 1 if record.kind == "image" else frame_window(
            settings, record.num_frames, record.fps or 0.0, record.cut
        ).take
        return (frames, *size_plan(settings, height, width).out)
    except DataError as error:
        raise DataError(f"{record.path.name} {error.message}", where=record.where, fix=error.fix) from None
