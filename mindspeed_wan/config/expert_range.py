"""Which sigmas an expert is trained on, whichever way the user said it.

Two spellings exist. Ours: ``expert`` and ``boundary`` (a sigma). MindSpeed-MM's and DiffSynth's:
``min_timestep_boundary`` and ``max_timestep_boundary``, fractions f of the training index counted from the noisy end,
so that index i has u = 1 - i/N and sigma = s u / (1 + (s - 1) u). At shift s = 5 a boundary of 0.875 is f = 0.41667
(417 indices) and 0.900 is f = 0.35714 (358 indices): the 0.417 and 0.358 of the published files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspeed_wan.errors import ConfigError

OFFICIAL_BOUNDARY: dict[str, float] = {"t2v": 0.875, "i2v": 0.900}
"""Wan2.2's boundary by task; ``models.wan.config.BOUNDARY`` holds the same (a test compares them)."""


@dataclass(frozen=True)
class ExpertRange:
    """An expert and its sigmas [low, high]; ``expert`` is None for a range that is no expert's own."""

    expert: str | None
    boundary: float | None
    low: float = 0.0
    high: float = 1.0

    def section(self) -> dict[str, Any]:
        """Return the keys of ``DiffusionSection``."""
        return {"expert": self.expert, "boundary": self.boundary, "sigma_range": (self.low, self.high)}


def sigma_of_fraction(fraction: float, shift: float) -> float:
    """Return the sigma at an index fraction counted from the noisy end (0 -> 1.0, 1 -> 0.0)."""
    u = 1.0 - fraction
    return shift * u / (1.0 + (shift - 1.0) * u)


def fraction_of_sigma(sigma: float, shift: float) -> float:
    """Return the index fraction, counted from the noisy end, at which the shifted schedule reaches ``sigma``."""
    return 1.0 - sigma / (shift - (shift - 1.0) * sigma)


def from_fractions(start: float, stop: float, shift: float, steps: int) -> ExpertRange:
    """Translate MindSpeed-MM's [min, max) index fractions.

    A fraction within one index of an official boundary means that boundary: 0.417 at shift 5 is 0.875 itself, not
    the 0.87485 that 417 indices end at.

    Raises:
        ConfigError: the range is empty.
    """
    if int(start * steps) >= int(stop * steps):
        message = f"min_timestep_boundary {start:g} and max_timestep_boundary {stop:g} leave no timestep"
        raise ConfigError(message, fix="min must be less than max; high expert: 0 and 0.417, low expert: 0.417 and 1")
    if start == 0.0 and stop == 1.0:
        return ExpertRange(None, None)
    if start == 0.0:
        boundary = _snap(stop, shift, steps)
        return ExpertRange("high", boundary, boundary, 1.0)
    if stop == 1.0:
        boundary = _snap(start, shift, steps)
        return ExpertRange("low", boundary, 0.0, boundary)
    return ExpertRange(None, None, _snap(stop, shift, steps), _snap(start, shift, steps))


def from_boundary(expert: str, boundary: float) -> ExpertRange:
    """Return the range of a named expert: high owns [boundary, 1], low owns [0, boundary)."""
    low, high = (boundary, 1.0) if expert == "high" else (0.0, boundary)
    return ExpertRange(expert, boundary, low, high)


def resolve(
    *,
    expert: str | None,
    boundary: float | None,
    fractions: tuple[float, float] | None,
    task: str,
    shift: float,
    steps: int,
) -> ExpertRange:
    """Return the one range that both spellings describe.

    Args:
        expert, boundary: ours, from the file or the flags; an expert alone takes the task's official boundary.
        fractions: MindSpeed-MM's (min, max) when the file gives either.
        task, shift, steps: of the same file.

    Raises:
        ConfigError: the spellings contradict each other, or a boundary comes without its expert.
    """
    given = from_fractions(*fractions, shift, steps) if fractions else None
    if expert is None and boundary is None:
        return given or ExpertRange(None, None)
    if given is None:
        if expert is None:
            message = f"boundary {boundary:g} is given without the expert"
            raise ConfigError(message, fix="add --expert high or --expert low (key: diffusion.expert)")
        return from_boundary(expert, boundary if boundary is not None else OFFICIAL_BOUNDARY[task])
    return _agree(given, expert, boundary, shift, steps)


def _agree(given: ExpertRange, expert: str | None, boundary: float | None, shift: float, steps: int) -> ExpertRange:
    """Return ``given`` (from index fractions) if the direct spelling says the same."""
    named = f"the {given.expert} expert" if given.expert else "no single expert"
    if expert is not None and expert != given.expert:
        message = f"expert '{expert}' contradicts min/max_timestep_boundary, which select {named}"
        raise ConfigError(message, fix=f"use the model file of the {expert} expert, or remove the two boundaries")
    if boundary is None:
        return given
    if given.boundary is None:
        message = f"boundary {boundary:g} contradicts min/max_timestep_boundary, which select {named}"
        raise ConfigError(message, fix="keep one of the two spellings")
    distance = abs(fraction_of_sigma(boundary, shift) - fraction_of_sigma(given.boundary, shift)) * steps
    if distance > 1.0:
        message = f"boundary {boundary:g} contradicts min/max_timestep_boundary, which mean {given.boundary:g}"
        fraction = fraction_of_sigma(boundary, shift)
        fix = f"at shift {shift:g} a boundary of {boundary:g} is {fraction:.3f}; keep one of the two spellings"
        raise ConfigError(message, fix=fix)
    assert given.expert is not None
    return from_boundary(given.expert, boundary)


def _snap(fraction: float, shift: float, steps: int) -> float:
    for official in OFFICIAL_BOUNDARY.values():
        if abs(fraction - fraction_of_sigma(official, shift)) * steps <= 1.0:
            return official
    return round(sigma_of_fraction(fraction, shift), 6)
