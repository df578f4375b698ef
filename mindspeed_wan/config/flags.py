"""The Megatron-style command line: ``parse(argv)`` gives the checked ``RunConfig``.

Meanings are Megatron's: the last of repeated flags wins, ``--flag=value`` works, names are never abbreviated. All
mistakes of the line, of the files it names and of their combination are reported together. Nothing slow is imported
before it is needed, so ``--help`` and a typo answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from mindspeed_wan.config.flag_table import Flag
from mindspeed_wan.config.flag_table_inert import ALL_FLAGS
from mindspeed_wan.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mindspeed_wan.config.schema import RunConfig

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass
class CommandLine:
    """What the flags say, before any file is read.

    ``values``: value by target; ``flag_of``: the flag that set each target; ``suspects``: first parts of targets
    that cannot be trusted because of an error.
    """

    values: dict[str, Any] = field(default_factory=dict)
    flag_of: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[ConfigError] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)

    def fail(self, message: str, *, fix: str | None = None, flag: Flag | None = None) -> None:
        """Record an error; the section its flag belongs to is not checked further."""
        self.errors.append(ConfigError(message, where="command line", fix=fix))
        if flag is not None and flag.target:
            self.suspects.add(flag.target.split(".")[0])


def parse(argv: Sequence[str], env: Mapping[str, str] | None = None) -> RunConfig:
    """Return the checked configuration of a training run.

    Args:
        argv: the words after the program's name.
        env: environment; WORLD_SIZE gives the ranks of the job. Default: the process's own.

    Raises:
        ConfigError: every mistake of the flags, the files and their combination, in one error.
        SystemExit: with code 0 after ``--help``.
    """
    if any(word in ("-h", "--help") for word in argv):
        _print_help()
    line = read_words(argv)
    from mindspeed_wan.config.load import build

    return build(line, os.environ if env is None else env)


def read_words(argv: Sequence[str], table: Mapping[str, Flag] = ALL_FLAGS) -> CommandLine:
    """Read the words of a command line by a flag table; mistakes are collected in ``errors``."""
    line = CommandLine()
    words = list(argv)
    at, last = 0, ""
    while at < len(words):
        name, has_value, inline = words[at].partition("=")
        at += 1
        if not name.startswith("--"):
            _stray(words[at - 1], last, line)
            continue
        last = name
        flag = table.get(name)
        stop = at
        while stop < len(words) and not _is_flag(words[stop]):
            stop += 1
        if flag is None:
            _unknown(name, table, line)
            at = stop
            continue
        values = [inline] if has_value else words[at:stop] if flag.kind == "texts" else words[at : min(at + 1, stop)]
        if flag.kind == "switch":
            if has_value:
                line.fail(f"{name} takes no value", fix=f"write {name} alone, or leave it out", flag=flag)
                continue
            values = []
        at += 0 if has_value else len(values)
        _apply(flag, values, line)
    return line


def _is_flag(word: str) -> bool:
    return word.startswith("--") and not _NUMBER.fullmatch(word)


def _apply(flag: Flag, words: list[str], line: CommandLine) -> None:
    """Store, note or refuse one flag."""
    if flag.kind != "switch" and not words:
        line.fail(f"{flag.name} needs a value", fix=f"{flag.name}: {flag.help}", flag=flag)
        return
    if flag.effect == "refused":
        if not words or any(word not in flag.accepts for word in words):
            shown = " ".join([flag.name, *words])
            line.fail(f"{shown} is not supported", fix=flag.reason, flag=flag)
        return
    if flag.effect == "noted":
        note = f"{flag.name} has no effect: {flag.reason}"
        if note not in line.notes:
            line.notes.append(note)
        return
    value = flag.value if flag.kind == "switch" else _convert(flag, words, line)
    if value is not None:
        line.values[flag.target] = value
        line.flag_of[flag.target] = flag.name


def _convert(flag: Flag, words: list[str], line: CommandLine) -> Any:
    """Return the typed value, or None after recording an error."""
    word = words[0]
    if flag.kind == "texts":
        return [part for entry in words for part in entry.split(",") if part]
    if flag.choices and word not in flag.choices:
        close = nearest(word, flag.choices, limit=1)
        choose = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(flag.choices)}"
        fix = flag.reason or choose
        line.fail(f"{flag.name} does not know {word!r}", fix=fix, flag=flag)
        return None
    if flag.kind == "text":
        return word
    if not _NUMBER.fullmatch(word):
        line.fail(f"{flag.name} needs a number, got {word!r}", flag=flag)
        return None
    if flag.kind == "int":
        if not re.fullmatch(r"[-+]?\d+", word):
            line.fail(f"{flag.name} needs a whole number, got {word!r}", flag=flag)
            return None
        return int(word)
    return float(word)


def _stray(word: str, last: str, line: CommandLine) -> None:
    """Record a word that belongs to no flag; several in a row after one flag are one mistake."""
    where = f" after {last}" if last else ""
    before = line.errors[-1].message if line.errors else ""
    if before.startswith("unexpected word") and before.endswith(where):
        return
    fix = "a path with spaces needs quotes; a placeholder needs the real path" if last else "flags start with --"
    if word.startswith("-") and len(word) > 1:
        close = nearest("--" + word.lstrip("-"), list(ALL_FLAGS), limit=1)
        fix = f"did you mean '{close[0]}'?" if close else "flags start with two dashes"
    line.fail(f"unexpected word {word!r}{where}", fix=fix, flag=ALL_FLAGS.get(last))


def _unknown(name: str, table: Mapping[str, Flag], line: CommandLine) -> None:
    close = nearest(name, list(table), limit=1) or nearest(name.lower().replace("_", "-"), list(table), limit=1)
    longer = [known for known in table if known.startswith(name)]
    if len(longer) == 1 and not close:
        close = longer
    fix = f"did you mean '{close[0]}'?" if close else "--help lists all flags"
    line.fail(f"unknown flag {name}", fix=fix, flag=table[close[0]] if close else None)


def _print_help() -> NoReturn:
    from mindspeed_wan.config.help import help_text

    print(help_text())
    sys.exit(0)
