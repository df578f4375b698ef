"""Velocity fields with known properties for solver tests, and the experts' ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_wan.config.expert_range import from_boundary
from mindspeed_wan.diffusion.timesteps import SigmaRange


def bent(x: Tensor, t: Tensor, step: int) -> Tensor:
    """A smooth nonlinear field: solvers of different order give visibly different results on it."""
    sigma = (t.to(x.dtype) / 1000).reshape(-1, *([1] * (x.ndim - 1)))
    return torch.tanh(x * (1.0 + sigma)) + 0.3 * torch.sin(3 * x) * (1 - sigma) - 0.2 * sigma**2


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed standard normal latents [2, 4, 3, 5]."""
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def expert_range(expert: str, boundary: float | None) -> SigmaRange:
    """Return the sigmas of ``high``, ``low`` or ``full``, as ``config.expert_range`` gives them to training."""
    if boundary is None:
        return SigmaRange(0.0, 1.0)
    found = from_boundary(expert, boundary)
    return SigmaRange(found.low, found.high)
