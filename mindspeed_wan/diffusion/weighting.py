"""Loss weights as a function of sigma: none, mm (MindSpeed-MM's and DiffSynth's bell), sigma_sqrt, cosmap.

The bell is normalised over all 1000 training steps, whichever expert trains: its mean is 0.28 for the I2V high-noise
expert and 1.40 for the low one, and exactly 0 at pure noise. That reproduces those trainers; pass ``normalise_over``
to divide by the mean over the expert's own distribution instead, so that losses and clipping of both experts compare.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from mindspeed_wan.diffusion.timesteps import NUM_TRAIN_TIMESTEPS, SigmaDistribution, index_to_sigma, shift_sigma
from mindspeed_wan.errors import ConfigError

Scheme = Literal["none", "mm", "sigma_sqrt", "cosmap"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


def loss_weight(
    sigma: Tensor, scheme: Scheme = "none", *, shift: float = 5.0, normalise_over: SigmaDistribution | None = None
) -> Tensor:
    """Return the loss weight of each sigma, fp32, same shape.

    Args:
        sigma: noise fractions in [0, 1].
        scheme: ``none`` is 1; ``mm`` the bell ``exp(-2 ((t - 500) / 1000)^2) - min``, mean 1 over MM's 1000 indices;
            ``sigma_sqrt`` is ``sigma^-2`` (SD3's name for it); ``cosmap`` is ``2 / (pi (1 - 2 sigma + 2 sigma^2))``.
        shift: flow shift of the training schedule: it places the 1000 indices that ``mm`` averages over, and the
            smallest of them bounds ``sigma_sqrt``, which diverges at 0.
        normalise_over: when given, the weight's mean over this distribution is 1.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"loss weighting is {scheme!r}", fix=f"use one of {', '.join(SCHEMES)}")
    weight = _raw(sigma.double(), scheme, shift)
    if normalise_over is not None:
        weight = weight / _mean(scheme, shift, normalise_over)
    return weight.float()


def _raw(sigma: Tensor, scheme: Scheme, shift: float) -> Tensor:
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "mm":
        floor, scale = _bell_constants(shift)
        return (_bell(sigma) - floor).clamp_min(0) * scale
    if scheme == "sigma_sqrt":
        return sigma.clamp_min(shift_sigma(1 / NUM_TRAIN_TIMESTEPS, shift)) ** -2
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2)


@lru_cache(maxsize=64)
def _bell_constants(shift: float) -> tuple[float, float]:
    """Return (minimum, scale) of the bell over the 1000 training indices: the scaled bell has mean 1 over them."""
    index = torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    bell = _bell(index_to_sigma(index, shift))
    floor = bell.min()
    return float(floor), float(1 / (bell - floor).mean())


@lru_cache(maxsize=64)
def _mean(scheme: Scheme, shift: float, distribution: SigmaDistribution) -> float:
    return float(_raw(distribution.quantiles(20_000).double(), scheme, shift).mean())
