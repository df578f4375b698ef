"""The objective: samples keep their noise whatever micro-batch they are in, and sigma stays in the expert's range."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.config.schema import DiffusionSection
from mindspeed_wan.training.objective import Objective

HIGH = DiffusionSection(expert="high", boundary=0.875, sigma_range=(0.875, 1.0), shift=5.0)


def test_a_sample_has_the_same_noise_in_every_batch() -> None:
    latents = torch.randn(4, 16, 2, 4, 6)
    keys = [(7, 0), (3, 0), (5, 1), (5, 0)]
    objective = Objective(HIGH, seed=1)
    whole = objective.add_noise(latents, keys)
    for i, key in enumerate(keys):
        alone = objective.add_noise(latents[i : i + 1], [key])
        assert torch.equal(alone.x[0], whole.x[i])
        assert torch.equal(alone.sigma[0], whole.sigma[i])
    assert whole.sigma.unique().numel() == 4  # epochs and samples differ


def test_sigmas_lie_in_the_range_and_the_timestep_is_a_thousandfold() -> None:
    objective = Objective(HIGH, seed=1)
    sigma = objective.sigmas([(i, 0) for i in range(2000)])
    assert sigma.min() >= 0.875 and sigma.max() <= 1.0
    # density s / (s - (s-1) sigma)^2 over the range: the median of u lies midway between u(0.875) and u(1)
    u_low = 0.875 / (5 - 4 * 0.875)
    median_u = (u_low + 1) / 2
    assert sigma.median().item() == pytest.approx(5 * median_u / (1 + 4 * median_u), abs=4e-3)
    noised = objective.add_noise(torch.zeros(2, 16, 1, 2, 2), [(0, 0), (1, 0)])
    torch.testing.assert_close(noised.timestep, 1000 * noised.sigma)


def test_a_perfect_prediction_has_no_loss_and_weights_scale_the_rest() -> None:
    objective = Objective(HIGH.model_copy(update={"weighting": "mm"}), seed=1)
    latents = torch.randn(3, 16, 1, 4, 4)
    noised = objective.add_noise(latents, [(0, 0), (1, 0), (2, 0)])
    assert torch.equal(noised.losses(noised.target), torch.zeros(3))
    torch.testing.assert_close(noised.losses(noised.target + 2.0), 4.0 * noised.weight)
    torch.testing.assert_close(noised.x - noised.sigma.view(-1, 1, 1, 1, 1) * noised.target, latents,
                               rtol=1e-5, atol=1e-5)


def test_seed_and_stream_change_everything() -> None:
    keys = [(0, 0)]
    one = Objective(HIGH, seed=1).noise((4,), keys)
    assert not torch.equal(one, Objective(HIGH, seed=2).noise((4,), keys))
    assert not torch.equal(one, Objective(HIGH, seed=1, stream="validation").noise((4,), keys))
