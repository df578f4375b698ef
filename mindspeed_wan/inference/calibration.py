"""``--calibrate_cache``: measure what step caches need to know about a checkpoint, during ordinary runs of it.

One file holds both: MagCache's residual ratios of every step, and TeaCache's polynomial of each expert, which predicts
the change of the residual from the change of the time embedding. Several videos are averaged, and so are the ranks of a
video, each of which sees its own tokens or guidance branch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mindspeed_wan.diffusion.schedule import SigmaSchedule
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.cache_tables import MagnitudeTable
from mindspeed_wan.inference.step_cache import Modulation, RunBlocks, expert_spans, modulation_changes
from mindspeed_wan.inference.video_io import write_json

_DEGREE = 4
_POINTS_PER_COEFFICIENT = 2
"""A polynomial through as many points as it has coefficients says nothing about the points between them."""
MIN_STEPS = _POINTS_PER_COEFFICIENT + 1
"""Steps of an expert from which TeaCache's polynomial can be fitted; the first one has no step before it."""


class Recorder:
    """Measures how the blocks' residual changes from step to step. Used like a ``StepCache``; nothing is skipped.

    Args:
        schedule: of the runs that are measured.

    Attributes:
        ratios: by step, ``|res_i| / |res_(i-1)|``, norms per token, averaged over tokens; one value for each pass.
        changes: by step, relative L1 change of the residual; one value for each pass.
    """

    computed = True

    def __init__(self, schedule: SigmaSchedule) -> None:
        self.schedule = schedule
        self.ratios: dict[int, list[float]] = {}
        self.changes: dict[int, list[float]] = {}
        self._modulations: dict[int, Tensor] = {}
        self._step, self._expert = 0, ""
        self._residuals: dict[str, Tensor] = {}

    def begin(self, step: int, expert: str, modulation: Modulation) -> None:
        """Tell which step of which expert comes."""
        if expert != self._expert or step == 0:
            self._residuals.clear()
        if step not in self._modulations:
            self._modulations[step] = modulation(step).cpu()
        self._step, self._expert = step, expert

    def around(self, branch: str) -> Callable[[Tensor, RunBlocks], Tensor]:
        """Return what runs around the blocks of this step: them, and a measurement."""

        def blocks(x: Tensor, run: RunBlocks) -> Tensor:
            out = run(x)
            residual = (out - x).float()
            if branch in self._residuals:
                self._measure(self._residuals[branch], residual)
            self._residuals[branch] = residual
            return out

        return blocks

    def _measure(self, before: Tensor, now: Tensor) -> None:
        ratio = (now.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)).mean()
        change = (now - before).abs().mean() / before.abs().mean().clamp_min(1e-12)
        self.ratios.setdefault(self._step, []).append(float(ratio))
        self.changes.setdefault(self._step, []).append(float(change))

    def samples(self) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """Return what this rank measured, to be handed to ``table`` of the rank that writes."""
        return self.ratios, self.changes

    def table(
        self, *, shift: float, boundary: float | None,
        samples: Sequence[tuple[dict[int, list[float]], dict[int, list[float]]]] | None = None,
    ) -> MagnitudeTable:
        """Return the measured table; steps without a predecessor in their expert have ratio 1 (the first) or nan.

        Args:
            shift, boundary: of the runs.
            samples: those of every rank of a video (default: this one's).
        """
        steps = self.schedule.num_steps
        ratios, changes = (_means([each[i] for each in samples or [self.samples()]], steps) for i in range(2))
        spans = expert_spans(self.schedule, boundary)
        inputs = modulation_changes([self._modulations[step] for step in range(steps)], spans)
        polynomials = [fit_polynomial([inputs[step] for step in span[1:]], [changes[step] for step in span[1:]])
                       for span in spans]
        return MagnitudeTable(steps, shift, boundary, (1.0, *ratios[1:]),
                              tuple(polynomials) if all(polynomials) else ())


def _means(samples: list[dict[int, list[float]]], steps: int) -> list[float]:
    joined = [[value for each in samples for value in each.get(step, ())] for step in range(steps)]
    return [sum(values) / len(values) if values else math.nan for values in joined]


def fit_polynomial(inputs: Sequence[float], outputs: Sequence[float]) -> tuple[float, ...]:
    """Return the least-squares polynomial of at most degree 4, highest power first; empty below two points.

    The degree falls with the number of points, so that it never merely interpolates.
    """
    if len(inputs) < _POINTS_PER_COEFFICIENT:
        return ()
    import numpy as np

    degree = min(_DEGREE, len(inputs) // _POINTS_PER_COEFFICIENT - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps with the same change: the fit is not unique, any will do
        return tuple(float(c) for c in np.polyfit(inputs, outputs, degree))


def write_table(table: MagnitudeTable, path: Path) -> None:
    """Write a calibrated table as JSON (nan becomes null)."""
    values: dict[str, Any] = {
        "num_steps": table.num_steps, "shift": table.shift, "boundary": table.boundary,
        "ratios": [None if math.isnan(r) else r for r in table.ratios],
        "polynomials": [list(each) for each in table.polynomials],
    }
    write_json(path, values)


def read_table(path: Path) -> MagnitudeTable:
    """Read what ``write_table`` wrote.

    Raises:
        ConfigError: the file is missing or is not such a table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        ratios = tuple(math.nan if r is None else float(r) for r in values["ratios"])
        polynomials = tuple(tuple(map(float, each)) for each in values.get("polynomials", ()))
        steps, shift = int(values["num_steps"]), float(values["shift"])
        table = MagnitudeTable(steps, shift, values["boundary"], ratios, polynomials)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"is not a MagCache table: {error}", where=str(path)) from None
    if len(ratios) != table.num_steps:
        raise ConfigError(f"has {len(ratios)} ratios for {table.num_steps} steps", where=str(path))
    return table
