"""A JSON parser that forgives comments and trailing commas and explains everything else.

It returns the value and the line of every key. It is slower than ``json`` and therefore runs on configuration files
and on text that ``json`` refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from typing import Any, NoReturn

from mindspeed_wan.errors import ConfigError

MAX_DIGITS = 1000
"""Longer whole numbers are refused: Python itself converts no more than 4300 digits, and nothing here is that large."""
MAX_DEPTH = 100
"""Deeper nesting is refused: no configuration needs it, and recursion would fail without a position."""

_SPACE = re.compile(r"(?:[ \t\n\r\f\v\u00a0\ufeff]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"[^\s,:{}\[\]\"']+")
_SET = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")
_WORDS = {"true": True, "false": False, "null": None}
_FOREIGN_WORDS = {"True": "true", "False": "false", "None": "null", "undefined": "null", "NULL": "null"}
_QUOTES = "\u201c\u201d\u2018\u2019"


def parse_jsonc(text: str, name: str, *, first_line: int = 1) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """Parse JSON with comments and trailing commas.

    Args:
        text: the file's text.
        name: file name for errors.
        first_line: line number of the text's first line in that file.

    Returns:
        The value, and the line of every key path (``()`` is the top).

    Raises:
        ConfigError: with ``where`` ``file:line`` and, for the usual slips, the text that would be right.
    """
    parser = _Parser(text, name, first_line)
    return parser.document(), parser.positions


class _Parser:
    def __init__(self, text: str, name: str, first_line: int) -> None:
        self.text, self.name, self.first_line = text, name, first_line
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.positions: dict[tuple[str | int, ...], int] = {}

    def document(self) -> Any:
        self.skip()
        self.positions[()] = self.line()
        value = self.value((), 0)
        self.skip()
        if self.at < len(self.text):
            self.fail(f"text after the end of the value: {self.snippet()}", fix="one file holds one object or list")
        return value

    # ---- helpers ---------------------------------------------------------------------------------------------

    def line(self, at: int | None = None) -> int:
        return self.first_line + bisect_left(self.newlines, self.at if at is None else at)

    def snippet(self) -> str:
        rest = self.text[self.at : self.at + 30].split("\n")[0]
        return repr(rest) if rest else "the end of the line"

    def fail(self, message: str, *, fix: str | None = None, at: int | None = None) -> NoReturn:
        raise ConfigError(message, where=f"{self.name}:{self.line(at)}", fix=fix)

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None  # the pattern matches the empty string
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            self.fail("the comment opened by /* is never closed", fix="close it with */")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    # ---- grammar ---------------------------------------------------------------------------------------------

    def value(self, keys: tuple[str | int, ...], depth: int) -> Any:
        if depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} levels deep")
        char = self.peek()
        if char == "{":
            return self.object(keys, depth)
        if char == "[":
            return self.array(keys, depth)
        if char == '"':
            return self.string()
        return self.number_or_word()

    def object(self, keys: tuple[str | int, ...], depth: int) -> dict[str, Any]:
        start = self.at
        as_set = _SET.match(self.text, start)
        if as_set:
            height, width = as_set.groups()
            fix = f'write {{"height": {height}, "width": {width}}} or [{height}, {width}]'
            self.fail(f"{as_set.group()} is not JSON", fix=fix)
        self.at += 1
        result: dict[str, Any] = {}
        while True:
            self.skip()
            if self.peek() == "}":
                self.at += 1
                return result
            line = self.line()
            key = self.key(start)
            if key in result:
                fix = "keep one of them"
                self.fail(f"key '{key}' is given twice (first on line {self.positions[(*keys, key)]})", fix=fix)
            self.positions[(*keys, key)] = line
            self.skip()
            if self.peek() != ":":
                self.fail(f"':' is missing after the key '{key}'", fix=f'write "{key}": value')
            self.at += 1
            self.skip()
            result[key] = self.value((*keys, key), depth + 1)
            self.separator("}", start, f"the value of '{key}'")

    def array(self, keys: tuple[str | int, ...], depth: int) -> list[Any]:
        start = self.at
        self.at += 1
        result: list[Any] = []
        while True:
            self.skip()
            if self.peek() == "]":
                self.at += 1
                return result
            self.positions[(*keys, len(result))] = self.line()
            result.append(self.value((*keys, len(result)), depth + 1))
            self.separator("]", start, f"item {len(result)}")

    def separator(self, closing: str, start: int, after: str) -> None:
        """Consume a comma, or leave the closing bracket for the caller."""
        end = self.at
        self.skip()
        char = self.peek()
        if char == ",":
            self.at += 1
        elif not char:
            opened = f"'{self.text[start]}' opened on line {self.line(start)} is never closed"
            self.fail(f"the file ends too early: {opened}", fix=f"add '{closing}'")
        elif char != closing:
            self.fail(f"',' or '{closing}' is missing after {after}, before {self.snippet()}", at=end)

    def key(self, start: int) -> str:
        char = self.peek()
        if char == '"':
            return self.string()
        if not char:
            self.fail(f"the file ends too early: '{{' opened on line {self.line(start)} is never closed", fix="add '}'")
        if char == ",":
            self.fail("a comma too many", fix="remove it")
        self.refuse_ellipsis()
        self.refuse_quotes()
        word = _WORD.match(self.text, self.at)
        fix = f'write "{word.group()}": value' if word and not word.group()[0].isdigit() else "write a quoted key"
        self.fail(f"expected a key in double quotes, found {self.snippet()}", fix=fix)

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if not match:
            self.fail(f"the text {self.snippet()} is never closed", fix='end it with " on the same line')
        try:
            value = json.loads(match.group(), strict=False)
        except ValueError:
            fix = "in JSON a backslash is written twice; in paths use / instead"
            self.fail(f"a backslash in {match.group()} starts no known escape", fix=fix)
        self.at = match.end()
        return str(value)

    def number_or_word(self) -> Any:
        self.refuse_ellipsis()
        self.refuse_quotes()
        match = _WORD.match(self.text, self.at)
        if not match:
            self.fail(f"expected a value, found {self.snippet()}")
        word = match.group()
        if _NUMBER.fullmatch(word):
            if not any(c in word for c in ".eE"):
                if len(word) > MAX_DIGITS:
                    self.fail(f"a number of {len(word)} digits")
                self.at = match.end()
                return int(word)
            self.at = match.end()
            return float(word)
        if word in _WORDS:
            self.at = match.end()
            return _WORDS[word]
        self.explain(word)

    def explain(self, word: str) -> NoReturn:
        """Refuse a bare word with the text that would be right."""
        if word in _FOREIGN_WORDS:
            self.fail(f"{word} is Python, not JSON", fix=f"write {_FOREIGN_WORDS[word]}")
        if word.lstrip("+-") in ("NaN", "nan", "Infinity", "inf", "Inf"):
            self.fail(f"{word} is not a number in JSON", fix="write a finite number, or null")
        if re.fullmatch(r"[-+]?\.?\d[\d.eE+_-]*", word):
            self.fail(f"{word} is not a number in JSON", fix="write it like 480, 0.5 or 1e-6")
        if word.startswith("#"):
            self.fail("'#' does not start a comment in JSON", fix="start comments with //")
        self.fail(f"expected a value, found {self.snippet()}", fix=f'text needs double quotes: "{word}"')

    def refuse_ellipsis(self) -> None:
        if self.text.startswith("..", self.at) or self.peek() == "\u2026":
            self.fail("the placeholder '...' was left in", fix="remove it, or put the real values in its place")

    def refuse_quotes(self) -> None:
        char = self.peek()
        if char and (char == "'" or char in _QUOTES):
            match = re.compile(rf"['{_QUOTES}]([^'{_QUOTES}\n]*)").match(self.text, self.at)
            inner = match.group(1) if match else ""
            self.fail(f"{self.snippet()}: JSON text uses straight double quotes", fix=f'write "{inner}"')
