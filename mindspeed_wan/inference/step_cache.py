"""Step caches: some steps reuse the change that the blocks made at an earlier step instead of running them.

For Wan the decision depends on the timestep alone (TeaCache looks at the time embedding, MagCache at a table,
TaylorSeer at the step number), so a plan is computed before the loop: no host synchronisation, and no rank can differ.
A plan never crosses the switch of experts: the first step of each expert computes, and what was remembered is dropped.

Rules: TeaCache ``acc += poly(|m - m'| / |m'|)``, skip while ``acc < threshold``. MagCache ``r *= ratio``, ``err += |1 -
r|``, skip while ``err < threshold`` and at most ``max_skips`` in a row. TaylorSeer computes every ``interval`` steps
and extrapolates in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mindspeed_wan.diffusion.schedule import SigmaSchedule
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.cache_tables import MagnitudeTable

RunBlocks = Callable[[Tensor], Tensor]
Modulation = Callable[[int], Tensor]
"""Gives the modulation of a step's timestep by the weights of the expert that runs now."""


@dataclass(frozen=True)
class CachePlan:
    """Which steps run the blocks. ``order`` is that of the extrapolation on the others (0: the last change again)."""

    method: str
    compute: tuple[bool, ...]
    order: int = 0

    @property
    def num_skipped(self) -> int:
        """Steps that reuse."""
        return self.compute.count(False)

    @property
    def ideal_speedup(self) -> float:
        """Block evaluations without the cache over those with it."""
        return len(self.compute) / max(1, self.compute.count(True))

    def with_computed(self, steps: Collection[int]) -> CachePlan:
        """Return the plan with ``steps`` computed in any case."""
        return replace(self, compute=tuple(c or step in steps for step, c in enumerate(self.compute)))

    def describe(self) -> str:
        """Return the plan as a line: ``#`` computes, ``.`` reuses."""
        marks = "".join("#" if c else "." for c in self.compute)
        return f"{self.method}: {self.num_skipped} of {len(self.compute)} steps reused ({marks})"


def expert_spans(schedule: SigmaSchedule, boundary: float | None) -> list[range]:
    """Return the steps of each expert in order of use."""
    names = [schedule.expert(step, boundary) for step in range(schedule.num_steps)]
    starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]


# ---- plans ---------------------------------------------------------------------------------------------------------


def teacache_plan(
    changes: Sequence[float], spans: Sequence[range], *, polynomial: Sequence[float],
    threshold: float, num_forced_start: int = 5, num_forced_end: int = 0,
) -> CachePlan:
    """Plan from the relative L1 change of the time embedding at each step (``modulation_changes``).

    Args:
        changes: one value per step; that of an expert's first step is ignored.
        spans: steps of each expert.
        polynomial: coefficients, highest power first.
        threshold: larger skips more and changes the video more.
        num_forced_start: steps at the very start that always compute.
        num_forced_end: steps at the very end that always compute.
    """
    if threshold <= 0:
        raise ConfigError(f"TeaCache threshold {threshold} must be above 0")
    last = spans[-1].stop
    compute = [True] * last
    for span in spans:
        accumulated = 0.0
        for step in span:
            if step == span.start or step < num_forced_start or step >= last - num_forced_end:
                accumulated = 0.0
                continue
            accumulated += polynomial_at(polynomial, changes[step])
            compute[step] = accumulated >= threshold
            if compute[step]:
                accumulated = 0.0
    return CachePlan("teacache", tuple(compute))


def magcache_plan(
    ratios: Sequence[float], spans: Sequence[range], *, threshold: float, max_skips: int, retention: float,
    forced_spans: Sequence[int] = (),
) -> CachePlan:
    """Plan from residual ratios per step (``ratios_for``).

    Args:
        ratios: ``|res_i| / |res_(i-1)|`` per step; those of an expert's first step are not read.
        spans: steps of each expert.
        threshold: largest accumulated error; larger skips more.
        max_skips: most steps reused in a row.
        retention: share of each expert's steps, from its first, that always compute (``_retained``).
        forced_spans: experts (by position) whose steps all compute; the published I2V recipe never skips the high one.
    """
    if threshold <= 0 or max_skips < 1 or not 0 <= retention < 1:
        raise ConfigError(f"MagCache wants threshold > 0, max_skips >= 1, 0 <= retention < 1; got {threshold}, "
                          f"{max_skips}, {retention}")
    compute = [True] * spans[-1].stop
    for number, span in enumerate(spans):
        second = number > 0 and not forced_spans
        forced = len(span) if number in forced_spans else _retained(len(span), retention, second=second)
        ratio, error, skips = 1.0, 0.0, 0
        for step in span[forced:]:
            ratio *= ratios[step]
            error += abs(1 - ratio)
            skips += 1
            compute[step] = not (error < threshold and skips <= max_skips)
            if compute[step]:
                ratio, error, skips = 1.0, 0.0, 0
    return CachePlan("magcache", tuple(compute))


def _retained(steps: int, retention: float, *, second: bool) -> int:
    """Return how many of an expert's first steps always compute, as MagCache's authors count.

    They count passes, two a step, of which the conditional one decides here: those before ``int(2 * steps *
    retention)`` compute, and for the second expert of T2V also the one at that place. A first step always does.
    """
    passes = int(2 * steps * retention)
    return passes // 2 + 1 if second else max(1, (passes + 1) // 2)


def taylorseer_plan(spans: Sequence[range], *, interval: int, order: int = 1, num_forced_start: int = 3) -> CachePlan:
    """Plan that computes every ``interval``-th step of each expert, and its first ``num_forced_start``."""
    if interval < 2 or order < 0 or num_forced_start < order + 1:
        raise ConfigError(f"TaylorSeer wants interval >= 2 and at least order + 1 first steps; got interval {interval}"
                          f", order {order}, first steps {num_forced_start}")
    compute = [True] * spans[-1].stop
    for span in spans:
        for place, step in enumerate(span):
            compute[step] = place < num_forced_start or (place - num_forced_start + 1) % interval == 0
    return CachePlan("taylorseer", tuple(compute), order)


def ratios_for(table: MagnitudeTable, schedule: SigmaSchedule, reference: SigmaSchedule, boundary: float | None
               ) -> list[float]:
    """Carry a table over to another step count of the same shift and boundary.

    The logarithm of the ratios is summed along sigma inside each expert, interpolated, and differenced, so that half
    the steps see the product of two ratios and the table's own schedule gives the table back.

    Raises:
        ConfigError: another boundary, or a table measured at another shift (its jumps lie at other sigmas).
    """
    if table.boundary != boundary:
        raise ConfigError(f"the MagCache table is for boundary {table.boundary}, this run switches at {boundary}",
                          fix="calibrate a table for this setting")
    result = [math.nan] * schedule.num_steps
    own, known = expert_spans(schedule, boundary), expert_spans(reference, boundary)
    if len(own) != len(known):
        raise ConfigError(f"this run uses {len(own)} experts, the MagCache table {len(known)}")
    for span, source in zip(own, known, strict=True):
        levels = [float(reference.sigmas[i]) for i in source]
        sums = [0.0]
        for step in source[1:]:
            sums.append(sums[-1] + math.log(table.ratios[step]))
        at = [_interpolate(float(schedule.sigmas[i]), levels, sums) for i in span]
        for place, step in enumerate(span):
            result[step] = 1.0 if place == 0 else math.exp(at[place] - at[place - 1])
    return result


@torch.no_grad()
def modulation_changes(modulations: Sequence[Tensor], spans: Sequence[range]) -> list[float]:
    """Return the relative L1 change of each step's modulation against the step before, inside each expert.

    Args:
        modulations: [B, 6, D] fp32 of every step, by the expert of that step.
    """
    changes = [0.0] * len(modulations)
    for span in spans:
        for step in span[1:]:
            before = modulations[step - 1]
            changes[step] = float((modulations[step] - before).abs().mean() / before.abs().mean())
    return changes


# ---- in the loop ---------------------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """Finite differences of the residual at the computed steps of one guidance branch."""

    factors: list[Tensor] = field(default_factory=list)
    last_step: int = -1


class StepCache:
    """Follows a plan inside the denoising loop; one memory per guidance branch, dropped when the expert changes.

    Use: ``begin(step, expert, modulation)`` at each step, then pass ``around(branch)`` to the model's
    ``around_blocks``.

    Args:
        plan: what to do at every step.
        replan: called with (first step of the expert, its modulations) when an expert takes over, for plans that
            depend on its weights (TeaCache); returns the plan to follow from there.

    Attributes:
        computed: whether the last call of ``around`` ran the blocks.
    """

    def __init__(self, plan: CachePlan, replan: Callable[[int, Modulation], CachePlan] | None = None) -> None:
        self.plan, self._replan = plan, replan
        self._step, self._expert = 0, ""
        self._memory: dict[str, _Memory] = {}
        self._restarts: frozenset[int] = frozenset()
        self.computed = True

    def restart_at(self, steps: frozenset[int]) -> None:
        """Compute ``steps`` in any case and forget the unconditional branch there: it did not run just before."""
        self._restarts = steps
        self.plan = self.plan.with_computed(steps)

    def begin(self, step: int, expert: str, modulation: Modulation) -> None:
        """Tell which step comes; a new expert (or a new video) starts with nothing remembered."""
        if expert != self._expert or step == 0:
            self._memory.clear()
            if self._replan is not None:
                self.plan = self._replan(step, modulation).with_computed(self._restarts)
        if step in self._restarts:
            self._memory.pop("uncond", None)
        self._step, self._expert = step, expert

    def around(self, branch: str) -> Callable[[Tensor, RunBlocks], Tensor]:
        """Return what runs instead of the blocks for guidance branch ``branch`` ("cond", "uncond") of this step."""

        def blocks(x: Tensor, run: RunBlocks) -> Tensor:
            memory = self._memory.setdefault(branch, _Memory())
            self.computed = self.plan.compute[self._step] or not memory.factors
            if self.computed:
                out = run(x)
                self._remember(memory, out - x)
                return out
            return x + self._extrapolate(memory)

        return blocks

    def _remember(self, memory: _Memory, residual: Tensor) -> None:
        """Update divided differences (Newton's, in step units) up to the plan's order."""
        gap = self._step - memory.last_step
        factors = [residual]
        for older in memory.factors[: self.plan.order]:
            factors.append((factors[-1] - older) / gap)
        memory.factors, memory.last_step = factors, self._step

    def _extrapolate(self, memory: _Memory) -> Tensor:
        """Taylor series around the last computed step."""
        distance = self._step - memory.last_step
        total = memory.factors[0]
        for power, factor in enumerate(memory.factors[1:], 1):
            total = total + factor * (distance**power / math.factorial(power))
        return total


def polynomial_at(coefficients: Sequence[float], x: float) -> float:
    """Return the polynomial's value, highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear over descending ``xs``; outside, the end segments go on."""
    if len(xs) == 1:
        return ys[0]
    place = next((i for i in range(1, len(xs)) if x >= xs[i]), len(xs) - 1)
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])
