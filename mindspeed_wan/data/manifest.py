"""From any annotation to a list of clips.

``load(path)`` reads MindSpeed-MM's ``data.txt`` (lines ``folder,annotation``), one annotation file (json, jsonl, csv,
parquet), musubi's dataset TOML, or a folder: the data set that is described in it, or its clips with ``.txt`` captions.
Every problem is collected with its ``file:line`` before anything is raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mindspeed_wan.data import formats
from mindspeed_wan.data.records import ClipRecord, Problems, kind_of
from mindspeed_wan.data.text_files import read_text
from mindspeed_wan.errors import DataError

_STAT_THREADS = 16


def load(data_path: str | Path, data_folder: str | Path | None = None, *, check_files: bool = True) -> list[ClipRecord]:
    """Read a data set's annotations.

    Args:
        data_path: ``data.txt``, an annotation file, or a folder.
        data_folder: what relative clip paths are joined to; ``None`` takes the folder that ``data.txt`` names, else
            the annotation's own folder.
        check_files: also look whether every clip exists and is not empty.

    Returns:
        records in the order of the annotations.

    Raises:
        DataError: lists the problems found, each with ``file:line``; also when there is no clip at all.
    """
    problems = Problems()
    records = collect(Path(data_path), Path(data_folder) if data_folder else None, problems)
    if check_files:
        check_existence(records, problems)
    problems.raise_if_any()
    return records


def collect(path: Path, folder: Path | None, problems: Problems) -> list[ClipRecord]:
    """Read annotations, noting problems instead of raising them; see ``load``."""
    path = Path(os.path.expanduser(path))
    folder = Path(os.path.expanduser(folder)) if folder else None
    if path.is_dir() and _has_data_txt(path):
        path = path / "data.txt"
    records = _guarded(lambda: _read(path, folder, problems), problems)
    if not records and not problems:
        problems.add("no clips", str(path), "the annotation is empty")
    return records


def _has_data_txt(folder: Path) -> bool:
    """Tell whether a folder's ``data.txt`` lists data sets (it may be the caption of a clip named data)."""
    return (folder / "data.txt").is_file() and not any(
        kind_of(path) in ("video", "image") for path in folder.glob("data.*"))


def _read(path: Path, folder: Path | None, problems: Problems) -> list[ClipRecord]:
    if path.is_dir():
        return formats.read_folder(path, problems)
    if path.suffix.lower() == ".txt":
        return _read_data_txt(path, folder, problems)
    return formats.read_annotation(path, folder or path.parent, problems)


def _guarded(read: Callable[[], list[ClipRecord]], problems: Problems) -> list[ClipRecord]:
    try:
        return read()
    except DataError as error:
        problems.found.append(error)
        return []


def _read_data_txt(path: Path, folder: Path | None, problems: Problems) -> list[ClipRecord]:
    """Read MindSpeed-MM's list of data sets: ``folder,annotation`` lines; blank lines and # comments are skipped."""
    records: list[ClipRecord] = []
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"{path}:{number}"
        named_folder, annotation = _parts(text, path.parent)
        if not annotation or not named_folder:
            problems.add(f"'{text}' is not 'folder,annotation'", where,
                         "write the clips' folder, a comma, and the annotation file")
            continue
        root = _resolve(named_folder, path.parent)
        target = _resolve(annotation, path.parent, root)
        if not target.is_file():
            problems.add(f"annotation '{annotation}' does not exist", where,
                         "a relative path is looked for here, beside data.txt and in the folder of the line")
            continue
        if folder is None and not root.is_dir():
            problems.add(f"folder '{named_folder}' does not exist", where)
            continue
        clip_folder = folder or root
        records += _guarded(lambda: formats.read_annotation(target, clip_folder, problems), problems)  # noqa: B023
    if not records and not problems:
        problems.add("names no data set", str(path), "one line per data set: folder,annotation.json")
    return records


def _parts(line: str, base: Path) -> tuple[str, str]:
    """Return (folder, annotation) of a line; with several commas, those at which an annotation is found.

    Either may stand in double quotes.
    """
    commas = [position for position, letter in enumerate(line) if letter == ","]
    choices = [(_unquoted(line[:at]), _unquoted(line[at + 1 :])) for at in reversed(commas)]
    found = (pair for pair in choices if pair[1] and _resolve(pair[1], base, _resolve(pair[0], base)).is_file())
    return next(found, choices[0] if choices else ("", ""))


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _resolve(text: str, *bases: Path) -> Path:
    """Return a path as given when it exists from here, else from the first of ``bases`` where it does."""
    path = Path(os.path.expanduser(text))
    if path.is_absolute() or path.exists():
        return path
    return next((base / path for base in bases if (base / path).exists()), path)


def check_existence(records: list[ClipRecord], problems: Problems) -> None:
    """Note every clip that is missing or empty (one ``stat`` each; nothing is decoded)."""
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        for record, message in zip(records, pool.map(lambda record: _file_problem(record.path), records)):
            if message:
                fix = _where_else(record.path) if message.startswith("does not exist") else None
                problems.add(f"{record.path} {message}", record.where, fix)


def _where_else(path: Path) -> str:
    if "\\" in str(path):
        return "this is a path of Windows: write / between folders, and the folder it has on this machine"
    return "check the folder that paths are joined to"


def _file_problem(path: Path) -> str | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:  # a loop of links, a name too long, no permission on the folder
        return f"cannot be opened: {error.strerror or error}"
    if not os.path.isfile(path):
        return "is not a file"
    return "is empty (0 bytes)" if stat.st_size == 0 else None
