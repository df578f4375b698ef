"""What a rule is: a check over the whole configuration that returns the mistakes it finds."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError

Rule = Callable[[RunConfig, "int | None"], "list[ConfigError]"]
"""(configuration, ranks of the job or None when unknown) -> mistakes."""

RuleRow = tuple[Rule, frozenset[str]]
"""A rule and the sections it reads; it is skipped when one of them has errors already."""


def mistake(message: str, fix: str | None, *, key: str | None = None) -> list[ConfigError]:
    """Return one mistake.

    ``key`` is ``file:key`` (``data:num_frames``); ``load`` puts the file's path and line in its place. Without it the
    mistake is about flags, which the message names.
    """
    return [ConfigError(message, where=key, fix=fix)]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def listed(numbers: list[int]) -> str:
    """Return ``1, 2, 4``."""
    return ", ".join(map(str, numbers))
