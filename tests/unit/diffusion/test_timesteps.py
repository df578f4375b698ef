"""Sigma ranges of the experts: known index counts, the shifted-uniform density, bounds, MM's index fractions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from mindspeed_wan.diffusion import timesteps as ts
from mindspeed_wan.diffusion.timesteps import SigmaDistribution, SigmaRange
from mindspeed_wan.errors import ConfigError
from tests.unit.diffusion.toy import expert_range

EXPERTS = [("high", 0.875), ("low", 0.875), ("high", 0.900), ("low", 0.900), ("full", None)]


@pytest.mark.parametrize(
    ("shift", "boundary", "count", "last_sigma"),
    [(5.0, 0.900, 358, 0.90006), (5.0, 0.875, 417, 0.87530), (12.0, 0.875, 632, 0.87527), (3.0, 0.900, 251, 0.9)],
)
def test_known_index_counts(shift: float, boundary: float, count: int, last_sigma: float) -> None:
    high = ts.index_range(expert_range("high", boundary), shift)
    low = ts.index_range(expert_range("low", boundary), shift)
    assert (high.start, high.stop, low.start, low.stop) == (0, count, count, 1000)
    assert ts.index_to_sigma(float(high[-1]), shift) == pytest.approx(last_sigma, abs=2e-5)


@given(sigma=st.floats(0, 1), shift=st.floats(0.1, 50))
def test_shift_round_trip(sigma: float, shift: float) -> None:
    assert ts.shift_sigma(ts.unshift_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-12)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("grid", ["continuous", "index"])
@pytest.mark.parametrize(("expert", "boundary"), EXPERTS)
def test_every_draw_is_inside_the_range(expert: str, boundary: float | None, grid: str, density: str) -> None:
    sigma_range = expert_range(expert, boundary)
    distribution = SigmaDistribution(sigma_range, 5.0, density, grid)
    extremes = torch.tensor([0.0, 2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)
    random = distribution.sample(torch.Generator().manual_seed(1), 4000)
    draws = torch.cat([distribution.from_uniform(extremes), random])
    assert draws.dtype == torch.float32
    assert all(sigma_range.contains(s) for s in draws.double().tolist())
    model_timesteps = 1000 * draws  # what inference's rule sees: high iff t >= 1000 boundary
    if expert == "high":
        assert (model_timesteps >= boundary * 1000).all()
    if expert == "low":
        assert (model_timesteps.double() < boundary * 1000).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize(("expert", "boundary"), EXPERTS)
def test_density_is_the_shifted_uniform(expert: str, boundary: float | None, shift: float) -> None:
    """Kolmogorov-Smirnov test of 20,000 draws against p(sigma) = s / (s - (s - 1) sigma)^2 restricted to the range."""
    sigma_range = expert_range(expert, boundary)
    draws = SigmaDistribution(sigma_range, shift).sample(torch.Generator().manual_seed(2), 20_000)

    def cdf(sigma):  # the antiderivative of p is sigma / (s - (s - 1) sigma)
        low, high = (x / (shift - (shift - 1) * x) for x in (sigma_range.low, sigma_range.high))
        return (sigma / (shift - (shift - 1) * sigma) - low) / (high - low)

    assert stats.kstest(draws.double().numpy(), cdf).pvalue > 1e-3


def test_the_density_test_can_fail() -> None:
    """Clamping into the range, or forgetting the shift, is rejected by the same test."""
    draws = SigmaDistribution(SigmaRange(0.0, 1.0), 5.0).sample(torch.Generator().manual_seed(2), 20_000).clamp(0.9, 1)
    low = 0.9 / (5 - 4 * 0.9)
    result = stats.kstest(draws.double().numpy(), lambda s: (s / (5 - 4 * s) - low) / (1 - low))
    assert result.pvalue < 1e-10


@pytest.mark.parametrize(("expert", "boundary"), EXPERTS)
def test_index_grid_is_uniform_over_its_indices(expert: str, boundary: float | None) -> None:
    """Chi-square test: the index grid draws each of MM's indices equally often, and only those."""
    sigma_range = expert_range(expert, boundary)
    indices = ts.index_range(sigma_range, 5.0)
    distribution = SigmaDistribution(sigma_range, 5.0, grid="index")
    draws = distribution.sample(torch.Generator().manual_seed(5), 200 * len(indices))
    legal = {float(torch.tensor(ts.index_to_sigma(float(i), 5.0)).float()): i for i in indices}
    drawn = torch.tensor([legal[s] for s in draws.tolist()])
    counts = torch.bincount(drawn - indices.start, minlength=len(indices))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_known_quantiles_of_the_high_expert() -> None:
    quantiles = SigmaDistribution(SigmaRange(0.9, 1.0), 5.0).from_uniform(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.913, 0.932, 0.958, 0.981, 0.993], abs=1e-3)
    mean = SigmaDistribution(SigmaRange(0.9, 1.0), 5.0).quantiles().mean()
    assert float(mean) == pytest.approx(0.956, abs=1e-3)
    assert float(SigmaDistribution(SigmaRange(0.0, 0.9), 5.0).quantiles().mean()) == pytest.approx(0.632, abs=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9, 1.0), (0.0, 0.875)])
def test_logit_normal_density(low: float, high: float) -> None:
    distribution = SigmaDistribution(SigmaRange(low, high), 5.0, "logit_normal", logit_mean=0.3, logit_std=0.8)
    u = ts.unshift_sigma(distribution.sample(torch.Generator().manual_seed(4), 20_000).double(), 5.0)
    truncated = [stats.norm.cdf((math.log(x / (1 - x)) - 0.3) / 0.8) if 0 < x < 1 else float(x)
                 for x in (ts.unshift_sigma(low, 5.0), ts.unshift_sigma(high, 5.0))]

    def cdf(x):
        z = (torch.logit(torch.as_tensor(x)).numpy() - 0.3) / 0.8
        return (stats.norm.cdf(z) - truncated[0]) / (truncated[1] - truncated[0])

    assert stats.kstest(u.numpy(), cdf).pvalue > 1e-3


def test_share_of_the_high_expert_under_logit_normal() -> None:
    """The unrestricted logit-normal puts 0.278 of its draws (shift 5) and 0.705 (shift 12) above the boundary."""
    for shift, boundary, share in ((5.0, 0.9, 0.278), (12.0, 0.875, 0.705)):
        draws = SigmaDistribution(SigmaRange(0.0, 1.0), shift, "logit_normal").quantiles(10_000)
        assert float((draws >= boundary).double().mean()) == pytest.approx(share, abs=2e-3)


@settings(max_examples=200, deadline=None)
@given(boundary=st.floats(0.01, 0.99), shift=st.floats(0.2, 20), uniform=st.floats(0, 1, exclude_max=True),
       density=st.sampled_from(["uniform", "logit_normal"]))
@example(boundary=0.8168449954718418, shift=1.0, uniform=1 - 2.0**-52, density="uniform")
def test_no_draw_leaves_its_expert(boundary: float, shift: float, uniform: float, density: str) -> None:
    for expert in ("high", "low"):
        sigma_range = expert_range(expert, boundary)
        try:
            sigma = SigmaDistribution(sigma_range, shift, density).from_uniform(torch.tensor([uniform]))
        except ConfigError as error:
            assert "no mass" in str(error)
            continue
        assert sigma_range.contains(float(sigma.double()))


@pytest.mark.parametrize(
    "make",
    [lambda: SigmaRange(0.9, 0.1), lambda: SigmaRange(-0.1, 0.5), lambda: SigmaRange(0.5, 1.1),
     lambda: SigmaDistribution(SigmaRange(0, 1), 0.0), lambda: SigmaDistribution(SigmaRange(0, 1), 5.0, "beta"),
     lambda: SigmaDistribution(SigmaRange(0, 1), 5.0, grid="lattice"),
     lambda: SigmaDistribution(SigmaRange(0, 1), 5.0, "logit_normal", logit_std=0.0),
     lambda: ts.index_range(SigmaRange(0.9, 0.90001), 5.0),
     lambda: SigmaDistribution(SigmaRange(0.99, 1), 1.0, "logit_normal", logit_mean=-20).quantiles()],
)
def test_bad_settings_are_config_errors(make) -> None:
    with pytest.raises(ConfigError):
        make()
