"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """What was looked at, the verdict, what was found and what to do about it."""

    name: str
    verdict: str
    detail: str
    fix: str | None = None
