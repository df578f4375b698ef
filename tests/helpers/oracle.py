"""diffusers' WanTransformer3DModel as an oracle: every parameter perturbed, because default weights hide bugs.

With norm weights 1 and biases 0, swapped q/k norms or a dropped affine norm change nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

TINY = WanConfig(
    num_layers=2, dim=96, ffn_dim=160, num_heads=4, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, text_len=24
)


@dataclass
class Batch:
    """Inputs of one forward pass and the cotangent of its output."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    image_embeds: Tensor | None
    cotangent: Tensor


def diffusers_model(config: WanConfig, seed: int = 0) -> Any:
    """Return a fp32 WanTransformer3DModel with random norms, biases and modulation tables."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel.from_config(config.to_diffusers())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def mm_state_dict(reference: nn.Module, config: WanConfig) -> dict[str, Tensor]:
    """Return the reference's weights under our names."""
    weights = reference.state_dict()
    return {p.mm: weights[p.hf].detach().clone() for p in parameter_table(config)}


def random_batch(
    config: WanConfig, grid: tuple[int, int, int] = (3, 10, 14), *, timesteps: tuple[float, ...] = (700.0, 31.5),
    text_rows: int | None = None, seed: int = 1,
) -> Batch:  # fmt: skip
    """Return inputs with latent (frames, height, width) ``grid``, one sample per timestep."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = len(timesteps)
    image = normal(size, 257, config.image_dim) if config.image_dim is not None else None
    return Batch(
        latents=normal(size, config.in_channels, *grid),
        timestep=torch.tensor(timesteps),
        text=normal(size, text_rows or config.text_len, config.text_dim),
        image_embeds=image,
        cotangent=normal(size, config.out_channels, *grid),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
