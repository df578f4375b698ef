"""The annotation formats in use: JSON and JSONL lists, CSV tables, Parquet, musubi's TOML, plain folders.

All yield rows (mappings) that ``rows.record_from_row`` reads, so a field means the same in every format.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindspeed_wan.data.records import ClipRecord, Problems, RowSource, kind_of
from mindspeed_wan.data.rows import CAPTION_NAMES, PATH_NAMES, record_from_row
from mindspeed_wan.data.text_files import is_utf8, printable, read_text
from mindspeed_wan.errors import ConfigError, DataError, did_you_mean

Rows = Iterator[tuple[Any, RowSource]]
_PACKED = frozenset({".gz", ".zip", ".tar", ".tgz", ".xz", ".bz2", ".zst", ".7z"})


def read_annotation(path: Path, folder: Path, problems: Problems) -> list[ClipRecord]:
    """Read one annotation file; relative clip paths are joined to ``folder``.

    Raises:
        DataError: the file itself cannot be read; problems of single rows go to ``problems``.
    """
    if path.suffix.lower() == ".toml":
        return _read_musubi(path, problems)
    readers: dict[str, Callable[[Path, Problems], Rows]] = {
        ".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        if not path.exists():
            raise DataError("does not exist", where=str(path), fix="check the path of the annotation")
        fix = f"known: {', '.join([*readers, '.toml'])}, data.txt, or a folder"
        raise DataError(f"'{path.suffix}' is not an annotation format", where=str(path),
                        fix="unpack it first" if path.suffix.lower() in _PACKED else fix)
    found = (record_from_row(row, source, folder, problems) for row, source in reader(path, problems))
    return [record for record in found if record is not None]


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, problems: Problems) -> Rows:
    """Yield the items of a JSON list (comments and trailing commas tolerated), or the lines of a misnamed JSONL."""
    from mindspeed_wan.config.documents import parse_json

    text = read_text(path)
    if not text.strip():
        raise DataError("the file is empty", where=str(path))
    try:
        value = parse_json(text, str(path))
    except ConfigError as error:
        lines = text.strip().splitlines()
        if len(lines) > 1 and all(line.strip().startswith("{") and line.strip().endswith("}") for line in lines[:2]):
            yield from _jsonl_rows(path, problems)
            return
        raise DataError(error.message, where=error.where, fix=error.fix) from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if any(name in value for name in PATH_NAMES):
            yield value, RowSource(str(path), 1)
            return
        fix = f"write the list under '{lists[0]}' by itself" if lists else "write [ {...}, {...} ]"
        raise DataError("expected a list of clips, found one object", where=f"{path}:1", fix=fix)
    if not isinstance(value, list):
        raise DataError(f"expected a list of clips, found {type(value).__name__}", where=f"{path}:1")
    for item, row in enumerate(value):
        yield row, RowSource(str(path), None, item)


def _jsonl_rows(path: Path, problems: Problems) -> Rows:
    from mindspeed_wan.config.documents import parse_json

    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from _json_rows(path, problems)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            try:
                row = parse_json(line, str(path), first_line=number)
            except ConfigError as error:
                problems.add(error.message, error.where or f"{path}:{number}", error.fix)
                continue
        yield row, RowSource(str(path), number)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is given twice")
    return row


# ---- tables ----------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, problems: Problems) -> Rows:
    """Yield the rows of a CSV with a header (DiffSynth's ``video,prompt``, VideoX-Fun's ``file_path,text,type``)."""
    text = read_text(path)
    if not text.strip():
        raise DataError("the file is empty", where=str(path))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",\t;", key=text.split("\n", 1)[0].count)
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path)
        line = reader.line_num
        for cells in reader:
            first_line, line = line + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            source = RowSource(str(path), first_line)
            if len(cells) != len(header):
                problems.add(f"{len(cells)} cells, the header has {len(header)}", source.where,
                             'a cell with a comma is written in double quotes: "a cat, running"')
                continue
            yield {name: cell for name, cell in zip(header, cells) if cell != "" or name in CAPTION_NAMES}, source
    except csv.Error as error:
        raise DataError(f"not a CSV table: {error}", where=f"{path}:{reader.line_num}") from None


def _check_header(header: list[str], path: Path) -> None:
    double = next((name for name in header if name and header.count(name) > 1), None)
    if double is not None:
        raise DataError(f"the column '{double}' is there twice", where=f"{path}:1")
    for names, what in ((PATH_NAMES, "clip's path"), (CAPTION_NAMES, "caption")):
        if any(name in header for name in names):
            continue
        hint = next((text for column in header if (text := did_you_mean(column, list(names)))), "")
        looks_like_data = any(kind_of(Path(cell)) for cell in header)
        fix = "the first line must name the columns, e.g. video,prompt" if looks_like_data else hint
        raise DataError(f"no column for the {what} (found: {', '.join(header)})", where=f"{path}:1",
                        fix=fix or f"name it {names[1]}")


def _parquet_rows(path: Path, problems: Problems) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError("reading Parquet needs pyarrow", where=str(path), fix="pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a Parquet file: {str(error).splitlines()[0]}", where=str(path)) from None
    _check_header(table.column_names, path)
    for number, row in enumerate(table.to_pylist(), 1):
        yield {key: value for key, value in row.items() if not _is_missing(value)}, RowSource(str(path), number)


def _is_missing(value: Any) -> bool:
    """Tell an empty cell: null, or NaN in a column of floats."""
    return value is None or (isinstance(value, float) and math.isnan(value))


# ---- folders ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, problems: Problems, *, caption_suffix: str = ".txt", recursive: bool = True
                ) -> list[ClipRecord]:
    """Read a folder of clips, each with its caption in a text file of the same name (or its own annotation file).

    A ``metadata.jsonl``, ``metadata.csv``, ``metadata.json`` or ``metadata.parquet`` in the folder is read instead.
    """
    for name in ("metadata.jsonl", "metadata.csv", "metadata.json", "metadata.parquet"):
        if (folder / name).is_file():
            return read_annotation(folder / name, folder, problems)
    clips = clip_files(folder, recursive=recursive)
    if not clips:
        raise DataError("no videos or images in this folder", where=str(folder), fix=_what_is_there(folder))
    records = []
    for path in clips:
        if not is_utf8(str(path)):
            problems.add("its name is not UTF-8", printable(str(path)), "rename the file")
            continue
        caption_file = path.with_name(path.stem + caption_suffix)
        if not caption_file.is_file():
            problems.add(f"{path.name} has no caption file {caption_file.name}", str(path),
                         "write its caption there, or make an annotation with: mindspeed-wan data init FOLDER")
            continue
        # Not resolved: the target of a link (a file of a download cache) may have another name, without a suffix.
        row = {"path": str(path.absolute()), "cap": read_text(caption_file).strip()}
        record = record_from_row(row, RowSource(str(caption_file), 1), folder, problems)
        if record is not None:
            records.append(record)
    return records


def clip_files(folder: Path, *, recursive: bool = True) -> list[Path]:
    """Return the videos and images of a folder in order, those behind linked folders too, each folder once.

    Hidden files and folders are left out. Links that lead nowhere are among them, so that somebody hears of it.
    """
    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        wanted = [name for name in sorted(folders, reverse=True) if recursive and not name.startswith(".")]
        targets = {os.path.realpath(os.path.join(parent, name)): name for name in wanted}
        folders[:] = sorted(name for real, name in targets.items() if real not in seen)
        seen.update(targets)
        found += [Path(parent, name) for name in files
                  if not name.startswith(".") and kind_of(Path(name)) in ("video", "image")]
    return sorted(found)


def _what_is_there(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())[:3]
    return f"it holds {', '.join(names)} ..." if names else "it is empty"


def _read_musubi(path: Path, problems: Problems) -> list[ClipRecord]:
    """Read musubi-tuner's dataset TOML: ``[general]`` and ``[[datasets]]`` with directories or JSONL files.

    Its sizes and target frames are training settings there; here they come from data.json, so only the clips and
    ``num_repeats`` are taken.
    """
    settings = _load_toml(path)
    general, datasets = settings.get("general", {}), settings.get("datasets")
    if not isinstance(datasets, list) or not datasets or not all(isinstance(entry, dict) for entry in datasets):
        raise DataError("no [[datasets]] table", where=str(path))
    if not isinstance(general, dict):
        raise DataError("general is not a table", where=str(path), fix="write [general]")
    records: list[ClipRecord] = []
    for number, entry in enumerate(datasets, 1):
        merged, where = {**general, **entry}, f"{path}: datasets[{number}]"
        repeats = merged.get("num_repeats", 1)
        if not isinstance(repeats, int) or repeats < 1:
            problems.add(f"num_repeats is {repeats!r}; expected a whole number of at least 1", where)
            continue
        records += _musubi_dataset(merged, path, where, problems) * repeats
    return records


def _musubi_dataset(entry: dict[str, Any], path: Path, where: str, problems: Problems) -> list[ClipRecord]:
    for name in ("video_jsonl_file", "image_jsonl_file"):
        if name in entry:
            target = _beside(path, entry[name])
            return read_annotation(target, target.parent, problems)
    for name in ("video_directory", "image_directory"):
        if name in entry:
            target = _beside(path, entry[name])
            if not target.is_dir():
                problems.add(f"{name} '{entry[name]}' does not exist", where)
                return []
            suffix = str(entry.get("caption_extension", ".txt"))
            return read_folder(target, problems, caption_suffix=suffix, recursive=False)
    problems.add("names neither a directory nor a jsonl file", where, "video_directory or video_jsonl_file")
    return []


def _beside(path: Path, value: Any) -> Path:
    target = Path(os.path.expanduser(str(value)))
    return target if target.is_absolute() or target.exists() else path.parent / target


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ImportError:
            raise DataError("reading TOML on Python 3.10 needs tomli", where=str(path), fix="pip install tomli"
                            ) from None
    try:
        return tomllib.loads(read_text(path))
    except ValueError as error:  # its own error, and Python's for a number of thousands of digits
        raise DataError(f"not TOML: {error}", where=str(path)) from None
