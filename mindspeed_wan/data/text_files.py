"""Text files as people save them: UTF-8 with or without a byte-order mark, UTF-16, or GBK."""

from __future__ import annotations

import codecs
from pathlib import Path

from mindspeed_wan.errors import DataError

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_text(path: Path) -> str:
    """Return the text of a file with line ends normalised.

    A byte-order mark decides; else UTF-8, and what is not UTF-8 is read as GB18030 (GBK's superset).

    Raises:
        DataError: absent, a folder, unreadable, or not text.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=_nearest_files(path)) from None
    except IsADirectoryError:
        raise DataError("this is a folder, not an annotation file", where=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=str(path)) from None
    return decode(raw, str(path)).replace("\r\n", "\n").replace("\r", "\n")


def decode(raw: bytes, name: str) -> str:
    """Return the text of ``raw``.

    Raises:
        DataError: binary content, or no known encoding.
    """
    encoding = next((e for mark, e in _MARKS if raw.startswith(mark)), None)
    if encoding is None and b"\x00" in raw[:4096]:
        raise DataError("this is a binary file, not text", where=name)
    for candidate in (encoding,) if encoding else ("utf-8", "gb18030"):
        try:
            return raw.decode(candidate)
        except UnicodeDecodeError as error:
            bad_line = raw[: error.start].count(b"\n") + 1
    raise DataError("neither UTF-8 nor GBK text", where=f"{name}:{bad_line}", fix="save the file as UTF-8")


def is_utf8(text: str) -> bool:
    """Tell whether text can be written down: JSON can hold half a character, a file name any bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return text with ``?`` for what is not a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _nearest_files(path: Path) -> str | None:
    """Return up to three files beside ``path`` whose names look like it."""
    from mindspeed_wan.errors import nearest

    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"did you mean {' or '.join(close)}?" if close else None
