"""The straight path between data and noise that Wan is trained on: ``x_t = (1 - sigma) x0 + sigma noise``.

Everything is computed in fp32 at least (fp64 stays fp64), whatever the storage dtype of the inputs, because a bf16
sigma has only 26 distinct values in the whole I2V high-noise range.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_float(x: Tensor) -> Tensor:
    """Return ``x`` in its working precision: fp64 stays, everything else becomes fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_sample(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Shape ``sigma`` (scalar or [B]) so that it broadcasts over ``like`` [B, ...], in ``like``'s dtype."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, like.shape[0])):
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected a scalar or [{like.shape[0]}]")
    return sigma.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the noisy latent ``(1 - sigma) x0 + sigma noise``.

    Args:
        x0: clean latents [B, ...].
        noise: standard normal of the same shape.
        sigma: noise fraction per sample [B], or one scalar.

    Returns:
        [B, ...] in fp32 (fp64 when ``x0`` is fp64).
    """
    x0 = as_float(x0)
    noise = noise.to(x0.dtype)
    weight = _per_sample(sigma, x0)
    return (1 - weight) * x0 + weight * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return ``noise - x0``, the constant velocity d x_t / d sigma that the DiT predicts (fp32 or fp64)."""
    x0 = as_float(x0)
    return noise.to(x0.dtype) - x0


def denoised_from_velocity(sample: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the clean latent that ``velocity`` implies at ``sigma``: ``x0 = x_t - sigma v``."""
    sample = as_float(sample)
    return sample - _per_sample(sigma, sample) * velocity.to(sample.dtype)


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample [B], in fp32, over all dimensions but the first."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    error = as_float(prediction) - as_float(target)
    return error.square().flatten(1).mean(dim=1)
