"""Loss weights: DiffSynth's published values, normalisation per expert."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_wan.diffusion.timesteps import SigmaDistribution, index_range, index_to_sigma
from mindspeed_wan.diffusion.weighting import SCHEMES, loss_weight
from mindspeed_wan.errors import ConfigError
from tests.unit.diffusion.toy import expert_range


def diffsynth_weights() -> tuple[torch.Tensor, torch.Tensor]:
    """MM's and DiffSynth's table, written with their loop: (sigmas, weights) over the 1000 indices at shift 5."""
    sigmas = torch.tensor([5 * (1 - i / 1000) / (1 + 4 * (1 - i / 1000)) for i in range(1000)], dtype=torch.float64)
    bell = torch.tensor([math.exp(-2 * ((1000 * s - 500) / 1000) ** 2) for s in sigmas.tolist()], dtype=torch.float64)
    bell = bell - bell.min()
    return sigmas, bell * (1000 / bell.sum())


def test_mm_bell_is_theirs() -> None:
    sigmas, expected = diffsynth_weights()
    assert torch.allclose(loss_weight(sigmas, "mm", shift=5.0).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("timestep", "weight"), [(1000, 0.0), (975, 0.16), (950, 0.32), (900, 0.63), (800, 1.21), (500, 2.08), (4.98, 0.03)]
)
def test_mm_bell_known_values(timestep: float, weight: float) -> None:
    assert float(loss_weight(torch.tensor(timestep / 1000), "mm")) == pytest.approx(weight, abs=6e-3)


@pytest.mark.parametrize(
    ("expert", "boundary", "mean"),
    [("high", 0.9, 0.282), ("low", 0.9, 1.400), ("high", 0.875, 0.342), ("low", 0.875, 1.470)],
)
def test_mm_mean_weight_differs_between_experts(expert: str, boundary: float, mean: float) -> None:
    indices = torch.tensor(list(index_range(expert_range(expert, boundary), 5.0)), dtype=torch.float64)
    weights = loss_weight(index_to_sigma(indices, 5.0), "mm")
    assert float(weights.mean()) == pytest.approx(mean, abs=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("expert", "boundary"), [("high", 0.9), ("low", 0.875), ("full", None)])
@pytest.mark.parametrize("grid", ["continuous", "index"])
def test_normalised_weights_have_mean_one(scheme: str, expert: str, boundary: float | None, grid: str) -> None:
    distribution = SigmaDistribution(expert_range(expert, boundary), 5.0, "uniform", grid)
    weights = loss_weight(distribution.quantiles(7000), scheme, normalise_over=distribution)
    assert float(weights.double().mean()) == pytest.approx(1.0, abs=5e-3)
    assert weights.dtype == torch.float32


def test_known_forms() -> None:
    sigma = torch.tensor([0.25, 0.5, 1.0])
    assert torch.equal(loss_weight(sigma), torch.ones(3))
    assert loss_weight(sigma, "sigma_sqrt").tolist() == pytest.approx([16.0, 4.0, 1.0])
    assert loss_weight(sigma, "cosmap").tolist() == pytest.approx([2 / (math.pi * b) for b in (0.625, 0.5, 1.0)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_finite_and_not_negative_at_the_ends(scheme: str) -> None:
    weights = loss_weight(torch.tensor([0.0, 1e-6, 1.0]), scheme)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


def test_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match="bsmntw"):
        loss_weight(torch.tensor([0.5]), "bsmntw")
