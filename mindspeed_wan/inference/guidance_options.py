"""Which steps run the unconditional branch: skipped at the end, limited to an interval, or reused after a gate.

The plan depends on the schedule and the scales alone, so it is known before the first step and the same on every rank.

- *skip*: the last share of the steps is conditional only (VideoX-Fun's ``cfg_skip_ratio``: step >= steps (1 - ratio)).
- *interval*: guidance acts only at noise levels (or steps) inside an interval; high and low noise do without, which
  Kynkaanniemi et al. (arXiv:2404.07724) found to cost nothing or even to help.
- *gate*: from a step on, the difference of the branches at the last guided step is added again instead of computed
  anew (FastVideo's CFG gate). It is dropped when the expert changes: each expert's first guided step computes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mindspeed_wan.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_wan.diffusion.schedule import SigmaSchedule

StepMode = Literal["guided", "reused", "plain"]
_MARKS: dict[StepMode, str] = {"guided": "#", "reused": "=", "plain": "."}


@dataclass(frozen=True)
class GuidancePlan:
    """What every step does: ``guided`` runs both branches, ``reused`` adds the last difference again, ``plain`` is
    the conditional branch alone."""

    modes: tuple[StepMode, ...]
    starts: frozenset[int] = frozenset()
    """Steps where guidance begins although the expert ran before: nothing of the unconditional branch is known."""

    @property
    def num_guided(self) -> int:
        """Steps that run the unconditional branch."""
        return self.modes.count("guided")

    def describe(self) -> str:
        """Return the plan as a line: ``#`` both branches, ``=`` their last difference again, ``.`` conditional only."""
        marks = "".join(_MARKS[mode] for mode in self.modes)
        return f"guidance: {self.num_guided} of {len(self.modes)} steps run the unconditional branch ({marks})"


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Limits of guidance; with the defaults every step is guided.

    Attributes:
        skip_ratio: share of the steps, at the end, without guidance; in [0, 1).
        sigmas: (low, high) noise fractions; guidance acts at ``low < sigma <= high`` only.
        steps: (first, end) steps counted from 0; guidance acts at ``first <= step < end`` only.
        gate: from this step on the last difference is used again.
    """

    skip_ratio: float = 0.0
    sigmas: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None
    gate: int | None = None

    def __bool__(self) -> bool:
        return self != GuidanceOptions()

    def problems(self, scales: tuple[float, float] | None, *, calibrates: bool) -> list[str]:
        """Return everything that cannot be done with guidance ``scales`` (``None``: the task's own, above 1)."""
        if not self:
            return []
        found = []
        if not 0 <= self.skip_ratio < 1:
            found.append(f"--cfg_skip_ratio is {self.skip_ratio:g}, it is a share in [0, 1); 1 would be no guidance at "
                         "all: --sample_guide_scale 1")
        if self.sigmas is not None and not 0 <= self.sigmas[0] < self.sigmas[1] <= 1:
            found.append(f"--cfg_sigmas {self.sigmas[0]:g},{self.sigmas[1]:g} is not LOW,HIGH inside [0, 1]")
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            found.append(f"--cfg_steps {self.steps[0]},{self.steps[1]} is not FIRST,END with FIRST < END, from 0")
        if self.gate is not None and self.gate < 1:
            found.append(f"--cfg_gate is {self.gate}; the first step has no difference to use again, give at least 1")
        if scales is not None and max(scales) == min(scales) == 1:
            found.append(f"{', '.join(self._flags())}: guidance is off (scale 1), so there is no unconditional branch "
                         "to leave out")
        if calibrates:
            found.append(f"--calibrate_cache measures an ordinary run; drop {', '.join(self._flags())}")
        return found

    def plan(self, schedule: SigmaSchedule, boundary: float | None, scales: Mapping[str, float]) -> GuidancePlan:
        """Return what every step of ``schedule`` does.

        Args:
            schedule: noise levels.
            boundary: sigma at which the experts change.
            scales: guidance scale of ``high`` and ``low``; an expert at 1 is never guided.

        Raises:
            ConfigError: limits that leave no guided step, or that leave out none.
        """
        modes: list[StepMode] = []
        starts: set[int] = set()
        before: tuple[str, StepMode] | None = None
        for step in range(schedule.num_steps):
            expert = schedule.expert(step, boundary)
            known = before is not None and before[0] == expert and before[1] != "plain"
            mode: StepMode = "guided"
            if scales[expert] == 1 or not self._covers(step, schedule):
                mode = "plain"
            elif known and self.gate is not None and step >= self.gate:
                mode = "reused"
            if mode == "guided" and before == (expert, "plain"):
                starts.add(step)
            modes.append(mode)
            before = (expert, mode)
        plan = GuidancePlan(tuple(modes), frozenset(starts))
        self._check(plan, schedule, boundary, scales)
        return plan

    def _covers(self, step: int, schedule: SigmaSchedule) -> bool:
        """Tell whether guidance acts at ``step``."""
        if self.skip_ratio and step >= schedule.num_steps * (1 - self.skip_ratio):
            return False
        if self.steps is not None and not self.steps[0] <= step < self.steps[1]:
            return False
        return self.sigmas is None or self.sigmas[0] < schedule.sigmas[step] <= self.sigmas[1]

    def _check(self, plan: GuidancePlan, schedule: SigmaSchedule, boundary: float | None, scales: Mapping[str, float]
               ) -> None:
        if not self:
            return
        flags = ", ".join(self._flags())
        if plan.num_guided == 0:
            raise ConfigError(f"{flags} leaves none of the {schedule.num_steps} steps with guidance",
                              fix="widen it, or say --sample_guide_scale 1")
        could = sum(scales[schedule.expert(step, boundary)] != 1 for step in range(schedule.num_steps))
        if plan.num_guided == could:
            levels = f"sigma {schedule.sigmas[0]:.3g} to {schedule.sigmas[-2]:.3g}"
            raise ConfigError(f"{flags} leaves out none of the {schedule.num_steps} steps ({levels})",
                              fix="drop it, or choose limits inside the run")

    def _flags(self) -> list[str]:
        """Return the flags that were given."""
        given = {"--cfg_skip_ratio": bool(self.skip_ratio), "--cfg_sigmas": self.sigmas is not None,
                 "--cfg_steps": self.steps is not None, "--cfg_gate": self.gate is not None}
        return [flag for flag, present in given.items() if present]


def parse_sigmas(text: str) -> tuple[float, float]:
    """Read ``LOW,HIGH``."""
    low, high = (float(word) for word in text.split(","))
    return low, high


def parse_steps(text: str) -> tuple[int, int]:
    """Read ``FIRST,END``."""
    first, end = (int(word) for word in text.split(","))
    return first, end
