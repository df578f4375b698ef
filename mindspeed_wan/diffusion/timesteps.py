"""Where on the noise axis to train: the flow shift, the experts' sigma ranges, and how sigma is drawn in them.

Wan draws a uniform ``u`` and bends it, ``sigma = s u / (1 + (s - 1) u)``. An expert owns a range of sigma, so a draw
for one expert inverts the bend at the range's ends and draws ``u`` between them: the density stays that of the shifted
uniform, ``p(sigma) = s / (s - (s - 1) sigma)^2`` up to a constant, and no sample is clamped or rejected.

MindSpeed-MM and DiffSynth number 1000 training steps from the noisy end (``u_i = 1 - i / 1000``); ``index_range`` gives
an expert's. Their ``min/max_timestep_boundary``, fractions of that index, are translated in ``config.expert_range``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mindspeed_wan.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000
"""``t = NUM_TRAIN_TIMESTEPS * sigma``, and the number of indices of MM's and DiffSynth's training grid."""

Density = Literal["uniform", "logit_normal"]
Grid = Literal["continuous", "index"]
Number = TypeVar("Number", float, Tensor)


def shift_sigma(u: Number, shift: float) -> Number:
    """Return ``shift u / (1 + (shift - 1) u)``: 0 and 1 stay, ``shift > 1`` moves mass towards noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Number, shift: float) -> Number:
    """Return the ``u`` with ``shift_sigma(u, shift) == sigma``."""
    return sigma / (shift - (shift - 1) * sigma)


@dataclass(frozen=True)
class SigmaRange:
    """The sigmas one expert owns: ``low <= sigma < high``, and ``sigma == 1`` too when ``high`` is 1."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ConfigError(
                f"sigma range [{self.low}, {self.high}] is not inside [0, 1] with low < high",
                fix="give the range as noise fractions, for example 0.875 to 1 for the T2V high-noise expert",
            )

    def contains(self, sigma: float) -> bool:
        """Tell whether ``sigma`` belongs to this range."""
        return self.low <= sigma < self.high or (sigma == self.high == 1.0)


# ---- MindSpeed-MM's and DiffSynth's index grid ------------------------------------------------------------------


def index_to_sigma(index: Number, shift: float, num_indices: int = NUM_TRAIN_TIMESTEPS) -> Number:
    """Return the sigma of training index ``index`` (0 is pure noise): ``shift_sigma(1 - index / num_indices)``."""
    return shift_sigma(1 - index / num_indices, shift)


def index_range(sigma_range: SigmaRange, shift: float, num_indices: int = NUM_TRAIN_TIMESTEPS) -> range:
    """Return the training indices whose sigma lies in ``sigma_range``.

    Shift 5: [0.9, 1] is 0..357 (358 indices, last sigma 0.90006), [0.875, 1] is 0..416 (417, last 0.87530);
    shift 12: [0.875, 1] has 632.
    """
    inside = [i for i in range(num_indices) if sigma_range.contains(index_to_sigma(float(i), shift, num_indices))]
    if not inside:
        raise ConfigError(f"no training index has a sigma in [{sigma_range.low}, {sigma_range.high}] at shift {shift}")
    return range(inside[0], inside[-1] + 1)


# ---- drawing sigma ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SigmaDistribution:
    """How sigma is drawn for training, as a map from a uniform number in [0, 1) (the inverse CDF).

    Attributes:
        sigma_range: the expert's range; every draw lies in it.
        shift: flow shift of the training schedule (5 in MM's and DiffSynth's recipes).
        density: ``uniform`` in u before the shift, or ``logit_normal`` in u (SD3), both restricted to the range.
        grid: ``continuous``, or ``index`` for the 1000 discrete sigmas of MM and DiffSynth.
        logit_mean, logit_std: of the logit-normal density.
    """

    sigma_range: SigmaRange
    shift: float
    density: Density = "uniform"
    grid: Grid = "continuous"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ConfigError(f"flow shift {self.shift} is not positive")
        if self.density not in ("uniform", "logit_normal"):
            raise ConfigError(f"density is {self.density!r}", fix="use uniform or logit_normal")
        if self.grid not in ("continuous", "index"):
            raise ConfigError(f"timestep grid is {self.grid!r}", fix="use continuous or index")
        if not self.logit_std > 0:
            raise ConfigError(f"logit_std {self.logit_std} is not positive")

    def from_uniform(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1), any shape, to sigmas in fp32 inside the range."""
        u = self._draw_u(uniform.double())
        if self.grid == "index":
            indices = index_range(self.sigma_range, self.shift)
            # Index i owns the cell (1 - (i + 1) / N, 1 - i / N] of u; the range's ends are cell borders.
            index = torch.floor((1 - u) * NUM_TRAIN_TIMESTEPS).clamp(indices.start, indices.stop - 1)
            u = 1 - index / NUM_TRAIN_TIMESTEPS
        return self._to_fp32(shift_sigma(u, self.shift))

    def sample(self, generator: torch.Generator | None = None, count: int = 1) -> Tensor:
        """Draw ``count`` sigmas [count] in fp32 from ``generator`` (CPU)."""
        return self.from_uniform(torch.rand(count, generator=generator, dtype=torch.float64))

    def quantiles(self, count: int = 4096) -> Tensor:
        """Return ``count`` equally probable sigmas [count], for means over the distribution and for plots."""
        return self.from_uniform((torch.arange(count, dtype=torch.float64) + 0.5) / count)

    def _u_bounds(self) -> tuple[float, float]:
        if self.grid == "index":
            indices = index_range(self.sigma_range, self.shift)
            return 1 - indices.stop / NUM_TRAIN_TIMESTEPS, 1 - indices.start / NUM_TRAIN_TIMESTEPS
        return unshift_sigma(self.sigma_range.low, self.shift), unshift_sigma(self.sigma_range.high, self.shift)

    def _draw_u(self, uniform: Tensor) -> Tensor:
        low, high = self._u_bounds()
        if self.density == "uniform":
            return low + (high - low) * uniform
        cdf_low, cdf_high = self._logit_normal_cdf(low), self._logit_normal_cdf(high)
        if cdf_high - cdf_low < 1e-12:
            raise ConfigError(
                f"logit-normal density (mean {self.logit_mean}, std {self.logit_std}) has no mass in sigma "
                f"[{self.sigma_range.low}, {self.sigma_range.high}] at shift {self.shift}",
                fix="move the mean towards the range or use density uniform",
            )
        normal = torch.special.ndtri(cdf_low + (cdf_high - cdf_low) * uniform)
        return torch.sigmoid(self.logit_mean + self.logit_std * normal).clamp(low, high)

    def _logit_normal_cdf(self, u: float) -> float:
        if u <= 0.0 or u >= 1.0:
            return float(u >= 1.0)
        z = (math.log(u / (1 - u)) - self.logit_mean) / self.logit_std
        return 0.5 * math.erfc(-z / math.sqrt(2.0))

    def _to_fp32(self, sigma: Tensor) -> Tensor:
        """Round to fp32 without leaving the range, neither as sigma nor as the model's ``t = 1000 sigma`` in fp32.

        fp32(0.9) is below 0.9, so it is not the high expert's; 1000 times it rounds to 900, so not the low one's.
        """
        rounded = sigma.float()
        low, high = self.sigma_range.low, self.sigma_range.high
        up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        timestep = (NUM_TRAIN_TIMESTEPS * rounded).double()
        rounded = torch.where((rounded.double() < low) | (timestep < NUM_TRAIN_TIMESTEPS * low), up, rounded)
        if high < 1.0:
            down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
            timestep = (NUM_TRAIN_TIMESTEPS * rounded).double()
            outside = (rounded.double() >= high) | (timestep >= NUM_TRAIN_TIMESTEPS * high)
            rounded = torch.where(outside, down, rounded)
        return rounded
