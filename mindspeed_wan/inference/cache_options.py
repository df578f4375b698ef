"""What the command line says about step caches, checked, and turned into what the denoising loop follows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_wan.diffusion.schedule import SigmaSchedule
    from mindspeed_wan.inference.calibration import Recorder
    from mindspeed_wan.inference.step_cache import CachePlan, Modulation, StepCache

METHODS = ("none", "teacache", "magcache", "taylorseer")
_MAGCACHE_RETENTION = {"t2v-A14B": 0.4, "i2v-A14B": 0.1}
_DEFAULT_THRESHOLD = {"magcache": 0.06, "teacache": 0.15}


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """A step cache's settings; ``None`` takes the published value of the task.

    Attributes:
        method: one of ``METHODS``.
        threshold: TeaCache's or MagCache's largest accumulated change; larger is faster and worse.
        max_skips: MagCache's most steps reused in a row.
        retention: MagCache's share of each expert's first steps that always compute.
        interval: TaylorSeer computes every so many steps.
        order: TaylorSeer's order of extrapolation.
        table: what ``calibrate`` wrote: MagCache's ratios and TeaCache's polynomials.
        coefficients: TeaCache polynomial, highest power first: one set, or one for each expert (high, then low).
        calibrate: measure such a table during this run and write it here; nothing is skipped.
    """

    method: str = "none"
    threshold: float | None = None
    max_skips: int = 2
    retention: float | None = None
    interval: int = 4
    order: int = 1
    table: Path | None = None
    coefficients: tuple[tuple[float, ...], ...] = ()
    calibrate: Path | None = None

    def problems(self, task: str | None) -> list[str]:
        """Return everything that cannot be done, each with what would be legal."""
        from mindspeed_wan.inference.cache_tables import MAGNITUDES, POLYNOMIALS

        found = []
        if self.method not in METHODS:
            return [f"--step_cache is {self.method!r}; use one of {', '.join(METHODS)}"]
        if self.calibrate is not None and self.method != "none":
            found.append("--calibrate_cache measures an uncached run; drop --step_cache")
        if self.threshold is not None and self.threshold <= 0:
            found.append(f"--cache_threshold is {self.threshold}, it must be above 0")
        if self.retention is not None and not 0 <= self.retention < 1:
            found.append(f"--cache_retention is {self.retention}, it is a share in [0, 1)")
        if self.max_skips < 1 or self.interval < 2 or not 0 <= self.order <= 3:
            found.append(f"--cache_max_skips {self.max_skips} (from 1), --cache_interval {self.interval} (from 2) or "
                         f"--cache_order {self.order} (0 to 3) is out of range")
        if self.table is not None and not self.table.is_file():
            found.append(f"--cache_table {self.table} does not exist")
        if len(self.coefficients) > 2:
            found.append(f"--cache_coefficients has {len(self.coefficients)} sets; give one, or HIGH/LOW")
        if self.method == "magcache" and task and self.table is None and task not in MAGNITUDES:
            found.append(f"no MagCache table is published for {task} (there is one for {', '.join(MAGNITUDES)}); "
                         "measure one with --calibrate_cache TABLE.json, then give --cache_table")
        if self.coefficients and self.table is not None and self.method == "teacache":
            found.append("--cache_coefficients and --cache_table both give TeaCache's polynomials; drop one")
        given = self.coefficients or self.table is not None
        if self.method == "teacache" and task and not given and task not in POLYNOMIALS:
            found.append(f"no TeaCache polynomial is published for {task} (there is one for {', '.join(POLYNOMIALS)}); "
                         "measure one with --calibrate_cache TABLE.json and give --cache_table, or give "
                         "--cache_coefficients a,b,c,d,e")
        return found

    def settings(self) -> dict[str, Any]:
        """Return what decides a video's content, JSON-ready: of a table what is in it, wherever it lies."""
        digest = None if self.table is None else hashlib.sha256(self.table.read_bytes()).hexdigest()[:16]
        return {**asdict(self), "table": digest}

    def build(self, task: str, schedule: SigmaSchedule, *, shift: float, boundary: float | None, grid: str,
              solver: str) -> StepCache | Recorder | None:
        """Return what the loop follows on ``schedule``; ``None`` runs every block at every step.

        Raises:
            ConfigError: a table of another shift, boundary or number of experts.
        """
        from mindspeed_wan.inference.cache_tables import POLYNOMIALS
        from mindspeed_wan.inference.calibration import Recorder
        from mindspeed_wan.inference.step_cache import StepCache, expert_spans, taylorseer_plan

        if self.calibrate is not None:
            return Recorder(schedule)
        if self.method == "none":
            return None
        spans = expert_spans(schedule, boundary)
        if self.method == "taylorseer":
            return StepCache(taylorseer_plan(spans, interval=self.interval, order=self.order,
                                             num_forced_start=max(3, self.order + 1)))
        if self.method == "teacache":
            measured = self._measured_polynomials(schedule.num_steps, shift, boundary, len(spans))
            return self._teacache(self.coefficients or measured or (POLYNOMIALS[task],), schedule, spans)
        return StepCache(self._magcache(task, schedule, spans, shift, boundary, grid, solver))

    def _magcache(self, task: str, schedule: SigmaSchedule, spans: list[range], shift: float, boundary: float | None,
                  grid: str, solver: str) -> CachePlan:
        from mindspeed_wan.diffusion.schedule import sigmas
        from mindspeed_wan.errors import ConfigError
        from mindspeed_wan.inference.cache_tables import MAGNITUDES
        from mindspeed_wan.inference.calibration import read_table
        from mindspeed_wan.inference.step_cache import magcache_plan, ratios_for

        table = read_table(self.table) if self.table else MAGNITUDES[task]
        if table.shift != shift:
            raise ConfigError(f"the MagCache table was measured at shift {table.shift:g}, this run uses {shift:g}",
                              fix="measure one with --calibrate_cache TABLE.json, then give --cache_table")
        reference = sigmas(table.num_steps, table.shift, grid, solver)  # type: ignore[arg-type]
        retention = _MAGCACHE_RETENTION.get(task, 0.2) if self.retention is None else self.retention
        # The published I2V recipe computes every step of the high expert.
        forced = (0,) if task == "i2v-A14B" and self.table is None else ()
        return magcache_plan(ratios_for(table, schedule, reference, boundary), spans, max_skips=self.max_skips,
                             threshold=self._threshold(), retention=retention, forced_spans=forced)

    def _teacache(self, sets: Sequence[tuple[float, ...]], schedule: SigmaSchedule, spans: list[range]) -> StepCache:
        from mindspeed_wan.inference.step_cache import CachePlan, StepCache, modulation_changes, teacache_plan

        compute = [True] * schedule.num_steps

        def replan(first: int, modulation: Modulation) -> CachePlan:
            span = next(s for s in spans if s.start == first)
            changes = [0.0] * first + modulation_changes([modulation(step) for step in span], [range(len(span))])
            part = teacache_plan(changes, [span], polynomial=sets[min(spans.index(span), len(sets) - 1)],
                                 threshold=self._threshold())
            compute[span.start : span.stop] = part.compute[span.start : span.stop]
            return CachePlan("teacache", tuple(compute))

        return StepCache(CachePlan("teacache", tuple(compute)), replan)

    def _measured_polynomials(self, steps: int, shift: float, boundary: float | None, experts: int
                              ) -> tuple[tuple[float, ...], ...]:
        """Return the table's polynomials, empty without a table.

        They were fitted to the changes between the steps of one schedule. Fewer steps change more, and a polynomial
        says nothing outside the points it was fitted to.
        """
        from mindspeed_wan.errors import ConfigError
        from mindspeed_wan.inference.calibration import read_table

        if self.table is None:
            return ()
        table, fix = read_table(self.table), "measure with --calibrate_cache in this setting, 3 steps or more an expert"
        if (table.num_steps, table.shift, table.boundary) != (steps, shift, boundary):
            raise ConfigError(
                f"TeaCache's polynomials were measured at {table.num_steps} steps, shift {table.shift:g}, boundary "
                f"{table.boundary}; this run has {steps}, {shift:g} and {boundary}", where=str(self.table), fix=fix)
        if len(table.polynomials) != experts:
            raise ConfigError(f"has TeaCache polynomials of {len(table.polynomials)} experts, this run uses {experts}",
                              where=str(self.table), fix=fix)
        return table.polynomials

    def _threshold(self) -> float:
        return self.threshold if self.threshold is not None else _DEFAULT_THRESHOLD[self.method]


def parse_coefficients(text: str) -> tuple[tuple[float, ...], ...]:
    """Read ``a,b,c,d,e`` or ``a,b,c,d,e/a,b,c,d,e`` (high/low)."""
    return tuple(tuple(float(word) for word in part.split(",")) for part in text.split("/"))
