"""From a parsed file to a typed section: every mistake becomes one ``ConfigError`` with its line and the right name."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mindspeed_wan.config.documents import Document, KeyPath
from mindspeed_wan.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)
SCHEMA_KEY = "$schema"
"""At the top of a file: where an editor finds the schema. It says nothing else."""


def validate(kind: type[Model], document: Document, why: dict[str, str]) -> tuple[Model | None, list[ConfigError]]:
    """Read a document as ``kind``.

    Args:
        kind: pydantic class of the whole file.
        document: the parsed file.
        why: reason by dotted path, added where a value is refused on purpose.

    Returns:
        The section and no errors, or None and all errors of the file.
    """
    if not isinstance(document.value, dict):
        found = type(document.value).__name__
        return None, [ConfigError(f"expected an object with keys, found a {found}", where=document.where())]
    try:
        # JSON mode is strict (no "81" for 81, no true for 1) and yet takes lists for tuples.
        value = {key: item for key, item in document.value.items() if key != SCHEMA_KEY}
        text = json.dumps(value, default=str)
        return kind.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, list(_explain(kind, document, error, why))


def _explain(
    kind: type[BaseModel], document: Document, error: ValidationError, why: dict[str, str]
) -> Iterator[ConfigError]:
    """Yield one error per place; the branches of a union (int or "auto") are folded into one."""
    places: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        places.setdefault(_place(item, document), []).append(item)
    for place, items in places.items():
        if any(other[: len(place)] == place for other in places if len(other) > len(place)):
            continue  # another branch of a union, which the user did not mean: the mistake is inside the value
        if any(item["type"] == "extra_forbidden" for item in items):
            yield unknown_key(kind, document, place)
        elif items[0]["type"] == "missing":
            key = dotted(place)
            yield ConfigError(f"the key '{key}' is missing", where=document.where(place[:-1]))
        else:
            wanted = " or ".join(dict.fromkeys(wanted_text(item) for item in items))
            message = f"{dotted(place)} = {_show(_input(document.value, place))}: {wanted}"
            names = tuple(part for part in place if isinstance(part, str))  # a reason holds for every item of a list
            yield ConfigError(message, where=document.where(place), fix=why.get(dotted(names)))


def _place(item: Any, document: Document) -> KeyPath:
    """Return the key path of an error as the file has it; pydantic also puts the names of union branches into it."""
    place: KeyPath = ()
    for part in item["loc"]:
        if document.has((*place, part)):
            place = (*place, part)
    return (*place, item["loc"][-1]) if item["type"] == "missing" else place


def unknown_key(kind: type[BaseModel], document: Document, place: KeyPath) -> ConfigError:
    """Return the error for a key that ``kind`` does not have, with the nearest name or the block it belongs in."""
    name, parent = str(place[-1]), place[:-1]
    here = section_at(kind, parent)
    block = f"'{dotted(parent)}'" if parent else "this file"
    message = f"unknown key '{dotted(place)}'"
    where = document.where(place)
    homes = [path for path in key_paths(kind) if path[-1] == name]
    if homes:
        return ConfigError(message, where=where, fix=f"it belongs in '{dotted(homes[0][:-1]) or 'the top level'}'")
    known = list(here.model_fields) if here else []
    close = nearest(name, known, limit=1) or nearest(name.lower(), known, limit=1)
    if close:
        return ConfigError(message, where=where, fix=f"did you mean '{close[0]}'?")
    elsewhere = nearest(name, [str(path[-1]) for path in key_paths(kind)], limit=1)
    if elsewhere:
        home = next(path for path in key_paths(kind) if path[-1] == elsewhere[0])
        return ConfigError(message, where=where, fix=f"did you mean '{dotted(home)}'?")
    return ConfigError(message, where=where, fix=f"{block} knows: {', '.join(sorted(known))}" if known else None)


def section_at(kind: type[BaseModel], keys: KeyPath) -> type[BaseModel] | None:
    """Return the class that describes the object at ``keys``, or None where any object is allowed."""
    current: type[BaseModel] | None = kind
    for key in keys:
        if current is None:
            return None
        if isinstance(key, int):
            continue  # list items share the class of their list
        field = current.model_fields.get(key)
        current = next(_sections(field.annotation), None) if field else None
    return current


def key_paths(kind: type[BaseModel], prefix: KeyPath = ()) -> list[KeyPath]:
    """Return the path of every key of a file, outermost first."""
    paths: list[KeyPath] = []
    for name, field in kind.model_fields.items():
        paths.append((*prefix, name))
        for section in _sections(field.annotation):
            paths.extend(key_paths(section, (*prefix, name)))
            break
    return paths


def dotted(keys: KeyPath) -> str:
    """Return ``a.b[2].c`` for a key path."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)


def _input(value: Any, keys: KeyPath) -> Any:
    for key in keys:
        value = value[key]
    return value


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def wanted_text(item: Any) -> str:
    """Say in our words what a pydantic error asks for."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return f"expected {context['expected']}".replace("True", "true").replace("False", "false")
    words = {
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected text in quotes",
        "tuple_type": "expected a list",
        "list_type": "expected a list",
        "dict_type": "expected an object {...}",
        "model_type": "expected an object {...}",
        "model_attributes_type": "expected an object {...}",
        "none_required": "null",
        "finite_number": "expected a finite number",
    }
    if kind in words:
        return words[kind]
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("greater than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
        "multiple_of": ("a multiple of", "multiple_of"),
    }
    if kind in bounds:
        word, name = bounds[kind]
        return f"must be {word} {context[name]:g}"
    if kind in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        return f"expected {length} values, found {context['actual_length']}"
    return str(item["msg"])
