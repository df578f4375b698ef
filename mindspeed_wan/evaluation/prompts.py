"""The prompt that a generated video was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation.tables import read_table, read_text


def read_prompts(path: Path) -> dict[str, str]:
    """Read {clip name: prompt} from a JSON object or a CSV with the columns clip and prompt.

    Raises:
        DataError: neither of these.
    """
    if path.suffix.lower() == ".csv":
        table = read_table(path, ("clip", "prompt"))
        for where, row in table:
            if not row["clip"]:
                raise DataError("names no clip", where=where)
        return {row["clip"]: row["prompt"] for _, row in table}
    found = _json(path)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError('is not an object like {"clip name": "prompt"}', where=str(path))
    return found


def prompt_of(video: Path, given: Mapping[str, str]) -> str | None:
    """Return a video's prompt: as given, or from the JSON or text file beside it (generation writes the JSON)."""
    if video.stem in given:
        return given[video.stem]
    beside = video.with_suffix(".json")
    if beside.is_file():
        values = _json(beside)
        if isinstance(values, dict) and isinstance(values.get("prompt"), str):
            return str(values["prompt"])
    beside = video.with_suffix(".txt")
    return read_text(beside).strip() if beside.is_file() else None


def _json(path: Path) -> object:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=str(path)) from None
