"""The prompt that a generated video was asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

from mindspeed_wan.errors import DataError


def read_prompts(path: Path) -> dict[str, str]:
    """Read {clip name: prompt} from a JSON object or a CSV with the columns clip and prompt.

    Raises:
        DataError: neither of these.
    """
    text = _read(path)
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows or not {"clip", "prompt"} <= set(rows[0]):
            raise DataError("needs a header with the columns clip and prompt", where=str(path))
        for line, row in enumerate(rows, 2):
            if not row["clip"] or row["prompt"] is None:
                raise DataError(f"row {line} has no clip or no prompt", where=str(path))
        return {row["clip"]: row["prompt"] for row in rows}
    found = _json(text, path)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError('is not an object like {"clip name": "prompt"}', where=str(path))
    return found


def prompt_of(video: Path, given: Mapping[str, str]) -> str | None:
    """Return a video's prompt: as given, or from the JSON or text file beside it (generation writes the JSON)."""
    if video.stem in given:
        return given[video.stem]
    beside = video.with_suffix(".json")
    if beside.is_file():
        values = _json(_read(beside), beside)
        if isinstance(values, dict) and isinstance(values.get("prompt"), str):
            return str(values["prompt"])
    beside = video.with_suffix(".txt")
    return _read(beside).strip() if beside.is_file() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text", where=str(path)) from None


def _json(text: str, path: Path) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=str(path)) from None
