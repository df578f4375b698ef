"""Interpolation, target and loss: shapes, precision, layout invariance."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.diffusion.flow_matching import interpolate, per_sample_loss, velocity_target


def latents(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 3, 16, 2, 4, 4, generator=draw).to(dtype).unbind(0)
    return x0, noise


def test_ends_of_the_path() -> None:
    x0, noise = latents()
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)


def test_one_sigma_per_sample() -> None:
    x0, noise = latents()
    sigma = torch.tensor([0.1, 0.5, 0.9])
    mixed = interpolate(x0, noise, sigma)
    for i in range(3):
        assert torch.equal(mixed[i], (1 - sigma[i]) * x0[i] + sigma[i] * noise[i])


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = (x.double() for x in latents())
    step = 1e-6
    difference = (interpolate(x0, noise, 0.3 + step) - interpolate(x0, noise, 0.3 - step)) / (2 * step)
    assert torch.allclose(difference, velocity_target(x0, noise), atol=1e-8)


def test_bf16_latents_are_mixed_in_fp32() -> None:
    x0, noise = latents(torch.bfloat16)
    sigma = torch.tensor([0.901, 0.902, 0.903])
    assert interpolate(x0, noise, sigma).dtype == torch.float32
    assert torch.equal(interpolate(x0, noise, sigma), interpolate(x0.float(), noise.float(), sigma))
    assert velocity_target(x0, noise).dtype == torch.float32


def test_loss_per_sample() -> None:
    x0, noise = latents()
    loss = per_sample_loss(x0.bfloat16(), noise)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    expected = [((x0[i].bfloat16().float() - noise[i]) ** 2).mean() for i in range(3)]
    assert torch.allclose(loss, torch.stack(expected))


def test_wrong_shapes_are_refused() -> None:
    x0, noise = latents()
    with pytest.raises(ValueError, match="sigma has shape"):
        interpolate(x0, noise, torch.ones(2))
    with pytest.raises(ValueError, match="differ in shape"):
        per_sample_loss(x0, noise[:2])
