"""JSON with comments and YAML, read so that every value knows the line it was written on.

``read_document(path)`` accepts strict JSON, ``//`` and ``/* */`` comments, trailing commas and a byte-order mark; a
``.yaml`` or ``.yml`` file is YAML. The slips seen in published files (``{480, 832}``, single quotes, ``True``,
``...``, a missing comma) are named with the text that would be right. Large annotation files take the standard
parser; the tolerant one runs only when that fails or a position is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_wan.config.jsonc import parse_jsonc
from mindspeed_wan.errors import ConfigError

KeyPath = tuple[str | int, ...]
Positions = dict[KeyPath, int]
"""Line (from 1) of every key and list item; ``()`` is the top."""


@dataclass(frozen=True)
class Document:
    """A parsed file: its value, and where each key stands."""

    path: str
    value: Any
    find_positions: Callable[[], Positions] = field(repr=False)

    @cached_property
    def positions(self) -> Positions:
        """Line of every key path; found on first use."""
        return self.find_positions()

    def where(self, keys: KeyPath = ()) -> str:
        """Return ``file:line`` of the key path, or of its nearest ancestor that is in the file."""
        while keys and keys not in self.positions:
            keys = keys[:-1]
        return f"{self.path}:{self.positions.get(keys, 1)}"

    def has(self, keys: KeyPath) -> bool:
        """Tell whether the file itself spells out this key path."""
        return keys in self.positions


def read_document(path: str | Path) -> Document:
    """Read a JSON (comments allowed) or YAML file.

    Raises:
        ConfigError: unreadable, not text, or not parseable; ``where`` is ``file:line``.
    """
    text = read_text(path)
    name = str(path)
    if name.lower().endswith((".yaml", ".yml")):
        value, positions = parse_yaml(text, name)
        return Document(name, value, lambda: positions)
    return Document(name, parse_json(text, name), lambda: parse_jsonc(text, name)[1])


def read_json(path: str | Path) -> Any:
    """Read a JSON file with comments and trailing commas allowed; see ``read_document`` for the errors."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, name: str, *, first_line: int = 1) -> Any:
    """Parse JSON text; ``name`` and ``first_line`` are used in errors (a line of a JSONL file is its own text)."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return parse_jsonc(text, name, first_line=first_line)[0]


def read_text(path: str | Path) -> str:
    """Return a UTF-8 file's text without a byte-order mark, line ends normalised."""
    name = str(path)
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError("the file does not exist", where=name, fix=nearby_files(path)) from None
    except IsADirectoryError:
        hint = nearby_files(Path(path) / "config.json")
        raise ConfigError("this is a folder, a file is needed", where=name, fix=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=name) from None
    if not raw.strip():
        raise ConfigError("the file is empty", where=name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        fix = "it looks like UTF-16; save it as UTF-8" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "save it as UTF-8"
        raise ConfigError("the file is not UTF-8 text", where=f"{name}:{line}", fix=fix) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def nearby_files(path: str | Path, limit: int = 3) -> str:
    """Return a hint for a missing file: the closest existing names, or the deepest folder that exists."""
    from mindspeed_wan.errors import nearest

    wanted = Path(path)
    folder = wanted.parent
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        close = nearest(wanted.name, names, limit=limit) or [n for n in names if n.endswith(wanted.suffix)][:limit]
        return f"{folder} holds: {', '.join(close or names[:limit])}" if names else f"the folder {folder} is empty"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"the folder {wanted.parent} does not exist (from {folder.resolve()})"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")  # the tolerant parser says which and where
    return result


def _no_constant(word: str) -> Any:
    raise ValueError(word)  # NaN and Infinity are not JSON; the tolerant parser says where


def parse_yaml(text: str, name: str) -> tuple[Any, Positions]:
    """Parse YAML text into plain values and the line of every key.

    Raises:
        ConfigError: not YAML, tabs in the indentation, duplicate keys, or tags other than plain data.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or "not valid YAML"
        fix = "indent with spaces, not tabs" if "\\t" in reason else None
        raise ConfigError(f"not valid YAML: {reason}", where=where, fix=fix) from None
    if node is None:
        raise ConfigError("the file holds no values", where=name)
    positions: Positions = {(): node.start_mark.line + 1}
    _yaml_positions(node, (), positions, name)
    try:
        return yaml.safe_load(text), positions
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-01 is no date, 5000 digits no number
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"not plain YAML data: {getattr(error, 'problem', error)}", where=where) from None


def _yaml_positions(node: Any, keys: KeyPath, positions: Positions, name: str) -> None:
    """Record the line of every key below ``node``; aliases were already resolved by the composer."""
    if len(keys) > 50:
        raise ConfigError("nested more than 50 levels deep", where=f"{name}:{node.start_mark.line + 1}")
    if node.id == "mapping":
        for key_node, value_node in node.value:
            child = (*keys, str(key_node.value))
            line = key_node.start_mark.line + 1
            if child in positions:
                message = f"key '{key_node.value}' is given twice (first on line {positions[child]})"
                raise ConfigError(message, where=f"{name}:{line}", fix="keep one of them")
            positions[child] = line
            _yaml_positions(value_node, child, positions, name)
    elif node.id == "sequence":
        for index, item in enumerate(node.value):
            positions[(*keys, index)] = item.start_mark.line + 1
            _yaml_positions(item, (*keys, index), positions, name)
