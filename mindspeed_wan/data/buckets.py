"""Several sizes and lengths in one run: which bucket a clip falls into, and how many clips of it make a fair batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mindspeed_wan.errors import DataError

Shape = tuple[int, int, int]
"""(frames, height, width) of a sample."""

_RATIOS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9))
_PATCH = 16
_TEMPORAL = 4


def size_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket (height, width) for a picture: the nearest side ratio; of equal ratios the largest that the
    picture fills without being enlarged, or the smallest."""
    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[0] * width / (bucket[1] * height)))

    nearest = min(distance(bucket) for bucket in buckets)
    # Sides are multiples of 16, so 480x832 and 720x1280 are the "same" ratio only to a few percent.
    alike = sorted((b for b in buckets if distance(b) <= nearest + 0.05), key=lambda b: b[0] * b[1])
    filled = [b for b in alike if b[0] <= height and b[1] <= width]
    return filled[-1] if filled else alike[0]


def frame_bucket(frames: int, buckets: Sequence[int]) -> int:
    """Return the longest bucket that ``frames`` fill.

    Raises:
        DataError: shorter than the shortest.
    """
    fitting = [bucket for bucket in buckets if bucket <= frames]
    if not fitting:
        raise DataError(f"gives {frames} frames; the shortest of frame_buckets is {min(buckets)}")
    return max(fitting)


def standard_sizes(max_pixels: int) -> list[tuple[int, int]]:
    """Return buckets of the common side ratios with at most ``max_pixels``, sides multiples of 16."""
    sizes = []
    for across, down in _RATIOS:
        height = int(math.sqrt(max_pixels * down / across)) // _PATCH * _PATCH
        sizes.append((height, min(height * across // down, max_pixels // height) // _PATCH * _PATCH))
    return sizes


def tokens(shape: Shape) -> int:
    """Return the DiT's tokens of a sample."""
    frames, height, width = shape
    return (1 + (frames - 1) // _TEMPORAL) * (height // _PATCH) * (width // _PATCH)


def batch_multiples(shapes: Iterable[Shape]) -> dict[Shape, int]:
    """Return for each shape how many samples stand for one of the largest, so that batches have alike token counts."""
    distinct = set(shapes)
    largest = max(map(tokens, distinct))
    return {shape: max(1, largest // tokens(shape)) for shape in distinct}
