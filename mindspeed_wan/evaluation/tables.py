"""Text and tables that people give: every unreadable file and every bad row is named."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mindspeed_wan.errors import DataError

_MAX_FIELD = 1 << 17


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, without the mark that spreadsheets put before it.

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text", where=str(path)) from None


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return (where it ends, row) of every row of a CSV that has these columns, and others if it likes.

    Raises:
        DataError: no CSV, a column that is missing or there twice, no row, or a row with more or fewer values than the
            header.
    """
    csv.field_size_limit(_MAX_FIELD)  # of the whole process: whoever read annotations before has raised it
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows = []
    try:
        header = list(reader.fieldnames or ())
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"does not have the header's {len(header)} values", where=where)
            rows.append((where, row))
    except csv.Error as error:
        raise DataError(f"is not a CSV: {error}", where=f"{path}:{reader.line_num}") from None
    if not rows or any(header.count(column) != 1 for column in columns):
        raise DataError(f"needs a header with {','.join(columns)} and at least one row", where=str(path))
    return rows
