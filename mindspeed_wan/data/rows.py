"""One annotation row, a mapping as any format yields it, to a ``ClipRecord``: names, types and units in one place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_wan.data.records import ClipRecord, Problems, RowSource, kind_of
from mindspeed_wan.data.text_files import is_utf8, printable
from mindspeed_wan.errors import did_you_mean

# The field a format calls by any of these names; the first present wins. MindSpeed-MM: path, cap. DiffSynth: video or
# image, prompt. VideoX-Fun: file_path, text. musubi: video_path, caption. Others: file, file_name.
PATH_NAMES = ("path", "video", "file_path", "video_path", "image_path", "image", "file_name", "file", "filename")
CAPTION_NAMES = ("cap", "prompt", "text", "caption", "captions")
_SHOWN = 80
_PLACEHOLDERS = ("path to ", "your/path", "your_path", "/path/to")


def record_from_row(row: Any, source: RowSource, folder: Path, problems: Problems) -> ClipRecord | None:
    """Read one row; what is wrong with it goes to ``problems``, and the answer is then ``None``.

    Args:
        row: the row's mapping.
        source: where it stands.
        folder: what a relative path is joined to.
        problems: collects errors.
    """
    if not isinstance(row, Mapping):
        problems.add(f"expected an object with path and cap, found {type(row).__name__}", source.where)
        return None
    before = len(problems.found)
    path = _path(row, source, folder, problems)
    captions = _captions(row, source, problems)
    reader = _Numbers(row, source, problems)
    height, width = reader.resolution()
    num_frames, fps = reader.positive_int("num_frames"), reader.positive_float("fps")
    duration = reader.positive_float("duration")
    if num_frames is None and duration and fps and math.isfinite(duration * fps):
        num_frames = round(duration * fps)
    cut, crop = reader.span("cut"), reader.box("crop")
    if path is None or len(problems.found) > before:
        return None
    known = {*PATH_NAMES, *CAPTION_NAMES, "num_frames", "fps", "resolution", "height", "width", "cut", "crop",
             "duration", "type"}
    extra = {key: value for key, value in row.items() if key not in known}
    kind = kind_of(path)
    assert kind is not None  # _path refused others
    return ClipRecord(path, captions, source, kind, num_frames, fps, height, width, cut, crop, extra)


def _path(row: Mapping[str, Any], source: RowSource, folder: Path, problems: Problems) -> Path | None:
    name = next((name for name in PATH_NAMES if row.get(name) not in (None, "")), None)
    if name is None:
        given = next((name for name in PATH_NAMES if name in row), None)
        message = f"'{given}' is empty" if given else f"no 'path' (found: {', '.join(map(str, row)) or 'nothing'})"
        hint = next((text for key in row if (text := did_you_mean(str(key), list(PATH_NAMES)))), None)
        problems.add(message, source.where, hint or "a row names its clip by path, video or file_path")
        return None
    value = row[name]
    if not isinstance(value, str):
        problems.add(f"'{name}' is {type(value).__name__}, not text", source.where)
        return None
    if "://" in value:
        problems.add(f"'{value}' is an address; clips are read from disk", source.where, "download it first")
        return None
    if "\x00" in value:
        problems.add(f"'{name}' holds a NUL character", source.where)
        return None
    if not is_utf8(value):
        problems.add(f"'{printable(value)}' is not a name in UTF-8", source.where, "rename the file")
        return None
    if any(mark in value.lower() for mark in _PLACEHOLDERS):
        problems.add(f"'{value}' is a placeholder", source.where, "write the clip's real path")
        return None
    # Absolute, so that it means the same from another folder and in another annotation (data split writes one).
    path = (folder / os.path.expanduser(value)).absolute()
    if kind_of(path) is None:
        problems.add(f"'{value}' is neither a video nor an image by its name", source.where,
                     "known: mp4 mov avi mkv webm gif ..., jpg png webp ..., pt for feature folders")
        return None
    return path


def _captions(row: Mapping[str, Any], source: RowSource, problems: Problems) -> tuple[str, ...]:
    name = next((name for name in CAPTION_NAMES if name in row), None)
    if name is None:
        hint = next((text for key in row if (text := did_you_mean(str(key), list(CAPTION_NAMES)))), None)
        problems.add("no caption ('cap')", source.where, hint or "a row gives its caption as cap, prompt or text")
        return ()
    value = row[name]
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not texts:
        problems.add(f"'{name}' is an empty list", source.where)
    for text in texts:
        if text is None or (isinstance(text, float) and math.isnan(text)):
            problems.add(f"'{name}' is null", source.where, "write a caption")
        elif not isinstance(text, str):
            problems.add(f"'{name}' is {type(text).__name__} ({text!r}), not text", source.where)
        elif not text.strip():
            problems.add(f"'{name}' is empty", source.where, "write a caption (caption dropout is a training option)")
        elif not is_utf8(text):
            problems.add(f"'{name}' holds half a character: {printable(text)[:60]!r}", source.where)
    return tuple(text for text in texts if isinstance(text, str))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


class _Numbers:
    """Typed access to the numeric fields of a row."""

    def __init__(self, row: Mapping[str, Any], source: RowSource, problems: Problems) -> None:
        self.row, self.source, self.problems = row, source, problems

    def bad(self, name: str, value: Any, expected: str) -> None:
        shown = repr(value) if len(repr(value)) <= _SHOWN else f"{repr(value)[:_SHOWN]}..."
        self.problems.add(f"'{name}' is {shown}; expected {expected}", self.source.where)

    def number(self, name: str) -> float | None:
        """Return a finite number, or None when the field is absent, empty or null."""
        value = self.row.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.bad(name, self.row[name], "a number")
                return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.bad(name, value, "a number")
            return None
        if isinstance(value, float) and math.isnan(value):  # an empty cell of a table
            return None
        if not _is_finite(value):
            self.bad(name, value, "a finite number")
            return None
        return float(value)

    def positive_float(self, name: str) -> float | None:
        value = self.number(name)
        if value is not None and value <= 0:
            self.bad(name, self.row[name], "a number above 0")
            return None
        return value

    def positive_int(self, name: str) -> int | None:
        value = self.number(name)
        if value is None:
            return None
        if value < 1 or value != int(value):
            self.bad(name, self.row[name], "a whole number of at least 1")
            return None
        return int(value)

    def resolution(self) -> tuple[int | None, int | None]:
        """Read ``resolution`` as {"height", "width"} or [height, width], or plain ``height`` and ``width``."""
        value = self.row.get("resolution")
        if value is None or value == "":
            return self.positive_int("height"), self.positive_int("width")
        if isinstance(value, Mapping):
            pair = _Numbers(value, self.source, self.problems)
            if {"height", "width"} - set(value):
                self.bad("resolution", dict(value), '{"height": 480, "width": 832}')
                return None, None
            return pair.positive_int("height"), pair.positive_int("width")
        if isinstance(value, (list, tuple)) and len(value) == 2:
            pair = _Numbers({"height": value[0], "width": value[1]}, self.source, self.problems)
            return pair.positive_int("height"), pair.positive_int("width")
        self.bad("resolution", value, '{"height": 480, "width": 832} or [480, 832]')
        return None, None

    def span(self, name: str) -> tuple[int, int] | None:
        """Read a window of frames [start, end)."""
        values = self._whole_numbers(name, 2, "[first frame, one past the last]")
        if values is None:
            return None
        if values[0] < 0 or values[1] <= values[0]:
            self.bad(name, self.row[name], "0 <= start < end")
            return None
        return values[0], values[1]

    def box(self, name: str) -> tuple[int, int, int, int] | None:
        """Read a crop [left, right, top, bottom] in pixels; all null means none."""
        value = self.row.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 4 and all(v is None for v in value):
            return None
        values = self._whole_numbers(name, 4, "[left, right, top, bottom] in pixels")
        if values is None:
            return None
        left, right, top, bottom = values
        if left < 0 or top < 0 or right <= left or bottom <= top:
            self.bad(name, self.row[name], "0 <= left < right and 0 <= top < bottom")
            return None
        return left, right, top, bottom

    def _whole_numbers(self, name: str, count: int, expected: str) -> list[int] | None:
        value = self.row.get(name)
        if value is None or value == "":
            return None
        good = (
            isinstance(value, (list, tuple))
            and len(value) == count
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) and _is_finite(v) and v == int(v)
                    for v in value)
        )
        if not good:
            self.bad(name, value, expected)
            return None
        return [int(v) for v in value]
