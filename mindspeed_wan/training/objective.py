"""The training objective of one micro-batch: which sigma, which noise, which target, which weight.

Sigma and noise belong to the sample (seed, index, epoch), not to the rank or the micro-batch, so every layout trains
on the same global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_wan.config.schema import DiffusionSection
from mindspeed_wan.diffusion import randomness
from mindspeed_wan.diffusion.flow_matching import interpolate, per_sample_loss, velocity_target
from mindspeed_wan.diffusion.timesteps import NUM_TRAIN_TIMESTEPS, SigmaDistribution, SigmaRange
from mindspeed_wan.diffusion.weighting import loss_weight

SampleKey = tuple[int, int]
"""(sample index, epoch)."""


@dataclass(frozen=True)
class Noised:
    """A noisy micro-batch: ``x`` and ``target`` [B, C, f, h, w]; ``timestep``, ``sigma`` and ``weight`` [B]; fp32."""

    x: Tensor
    timestep: Tensor
    target: Tensor
    sigma: Tensor
    weight: Tensor

    def losses(self, velocity: Tensor) -> Tensor:
        """Return weight x mean squared error of each sample, [B] fp32."""
        return self.weight * per_sample_loss(velocity, self.target)


class Objective:
    """Flow matching over one expert's sigma range.

    Args:
        section: the ``diffusion`` section of the configuration.
        seed: of the run.
        stream: names the random streams; the validation loss uses another than training.
    """

    def __init__(self, section: DiffusionSection, seed: int, stream: str = "train") -> None:
        self.section, self.seed, self.stream = section, seed, stream
        self.distribution = SigmaDistribution(
            SigmaRange(*section.sigma_range), section.shift, density=section.density, grid=section.grid,
            logit_mean=section.density_mean, logit_std=section.density_std,
        )

    def sigmas(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return the sigma of each sample [B], fp32 on the CPU."""
        uniform = [randomness.uniform(1, seed=self.seed, sample_index=index, epoch=epoch, stream=f"{self.stream}.sigma")
                   for index, epoch in keys]
        return self.distribution.from_uniform(torch.cat(uniform))

    def noise(self, shape: Sequence[int], keys: Sequence[SampleKey]) -> Tensor:
        """Return standard normal noise [B, *shape], fp32 on the CPU."""
        return randomness.normals(shape, keys, seed=self.seed, stream=f"{self.stream}.noise")

    def add_noise(self, latents: Tensor, keys: Sequence[SampleKey], sigmas: Tensor | None = None) -> Noised:
        """Noise clean latents [B, C, f, h, w], each at its own sigma (or at ``sigmas`` [B], for validation)."""
        sigma = self.sigmas(keys) if sigmas is None else sigmas
        noise = self.noise(latents.shape[1:], keys).to(latents.device)
        weight = loss_weight(sigma, self.section.weighting, shift=self.section.shift,
                             normalise_over=self.distribution if self.section.normalize_weighting else None)
        sigma, weight = sigma.to(latents.device), weight.to(latents.device)
        return Noised(
            x=interpolate(latents, noise, sigma),
            timestep=sigma * NUM_TRAIN_TIMESTEPS,
            target=velocity_target(latents, noise),
            sigma=sigma,
            weight=weight,
        )
