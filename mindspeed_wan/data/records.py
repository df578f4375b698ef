"""One clip as an annotation describes it, and the list of problems found while reading annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mindspeed_wan.errors import DataError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif", ".ts", ".wmv"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
FEATURE_SUFFIXES = frozenset({".pt", ".pth"})

Kind = Literal["video", "image", "feature"]


@dataclass(frozen=True)
class RowSource:
    """Where a row stands: its file and its line, or (``line`` None) its number in a JSON list."""

    file: str
    line: int | None = None
    item: int = 0

    @property
    def where(self) -> str:
        """``file:line``; the line of an item of a JSON list is looked up when somebody asks."""
        return f"{self.file}:{self.line if self.line is not None else _json_line(self.file, self.item)}"


@lru_cache(maxsize=8)
def _json_positions(file: str, version: tuple[int, int]) -> dict[tuple[str | int, ...], int]:
    from mindspeed_wan.config.jsonc import parse_jsonc
    from mindspeed_wan.data.text_files import read_text

    return parse_jsonc(read_text(Path(file)), file)[1]


def _json_line(file: str, item: int) -> int:
    stat = Path(file).stat()  # a file that was mended while a program runs is looked at again
    return _json_positions(file, (stat.st_mtime_ns, stat.st_size)).get((item,), 1)


@dataclass(frozen=True)
class ClipRecord:
    """One clip of the training set. Fields an annotation does not give are ``None`` and found by probing the file.

    ``captions`` holds one or more texts, one of which is drawn each time. ``cut`` is a window (first frame, one past
    the last) in frames of the file; ``crop`` is (left, right, top, bottom) in its pixels.
    """

    path: Path
    captions: tuple[str, ...]
    source: RowSource
    kind: Kind = "video"
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    cut: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def where(self) -> str:
        """``file:line`` of the annotation."""
        return self.source.where


def kind_of(path: Path) -> Kind | None:
    """Return what a file is by its name, ``None`` when this package cannot read it."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "feature" if suffix in FEATURE_SUFFIXES else None


class Problems:
    """Collects what is wrong with a data set, so that one run of a check shows everything."""

    SHOWN = 10

    def __init__(self) -> None:
        self.found: list[DataError] = []

    def add(self, message: str, where: str, fix: str | None = None) -> None:
        """Note one problem."""
        self.found.append(DataError(message, where=where, fix=fix))

    def __bool__(self) -> bool:
        return bool(self.found)

    def raise_if_any(self) -> None:
        """Raise one ``DataError`` that shows the first problems and counts the others."""
        if not self.found:
            return
        first = self.found[0]
        if len(self.found) == 1:
            raise first
        lines = [f"{problem.where}: {problem.message}" for problem in self.found[: self.SHOWN]]
        rest = len(self.found) - self.SHOWN
        more = [f"... and {rest} more"] if rest > 0 else []
        text = "\n  ".join([f"{len(self.found)} problems with the data", *lines, *more])
        raise DataError(text, fix=first.fix or "mindspeed-wan data check lists every problem")
