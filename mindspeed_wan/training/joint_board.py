"""What two experts in one job tell each other: how far each one is, and how it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mindspeed_wan.parallel.parts import Link, Part
from mindspeed_wan.training.stop import StopRequest

LOOK_SECONDS = 0.02
"""Between two looks at the board while waiting."""
IDLE_SECONDS = 0.2
"""The same where a wait may last hours."""


@dataclass(frozen=True)
class Standing:
    """``event``: the one the expert is at (``joint_order``); ``ended``: how it ended, empty while it goes on.

    ``done`` needs no answer; after ``stopped`` (on request) and ``failed`` the other expert saves and stops too, and
    ``reason`` says why.
    """

    event: int = 0
    ended: Literal["", "done", "stopped", "failed"] = ""
    reason: str = ""


class Board:
    """The notes of one expert (written by its first rank) and of the other one (read by any rank).

    Args:
        link: between the two.
        own: this rank's expert.
        other: the other one.
    """

    def __init__(self, link: Link, own: Part, other: Part) -> None:
        self.link, self.own, self.other = link, own, other
        self.first = link.rank == own.ranks.start
        self._standing = Standing()
        self.tell()

    def tell(self, **changes: Any) -> None:
        """Change this expert's standing."""
        self._standing = Standing(**{**asdict(self._standing), **changes})
        if self.first:
            self.link.write(f"standing/{self.own.name}", json.dumps(asdict(self._standing)))

    def look(self) -> Standing:
        """Return the other expert's standing."""
        return Standing(**json.loads(self.link.read(f"standing/{self.other.name}")))

    def exchange(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Tell the other expert ``values`` and return what it tells under the same name; waits for it."""
        if self.first:
            self.link.write(f"{name}/{self.own.name}", json.dumps(dict(values)))
        return dict(json.loads(self.link.read(f"{name}/{self.other.name}")))

    def wait_for_end(self) -> Standing:
        """Wait, however long it takes, until the other expert has ended."""
        while not (standing := self.look()).ended:
            time.sleep(IDLE_SECONDS)
        return standing


class JointStop(StopRequest):
    """Also asks for a stop when the other expert was stopped or has failed."""

    def __init__(self, board: Board, after_minutes: float | None = None) -> None:
        super().__init__(after_minutes)
        self._board, self._because = board, ""

    @property
    def wanted(self) -> bool:
        """True once this rank was asked to stop, or the other expert is gone."""
        return super().wanted or self._other_is_gone()

    @property
    def reason(self) -> str:
        """What asked for the stop, for the message."""
        return self._because if self._because and not super().wanted else super().reason

    def _other_is_gone(self) -> bool:
        if self._board.first and not self._because:  # one rank asks for all: the step's reduction tells the others
            standing = self._board.look()
            if standing.ended in ("stopped", "failed"):
                told = f" ({standing.reason})" if standing.ended == "stopped" else ""  # a failure is told on its own
                self._because = f"the end of the {self._board.other.name}-noise expert{told}"
        return bool(self._because)
