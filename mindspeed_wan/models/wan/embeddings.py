"""What enters the transformer: video patches, the timestep, the text, and Wan2.1's image tokens.

Legend: B batch, C latent channels, F H W latent frames/height/width, L tokens, D hidden size.
Time embedding and projection are fp32 islands: their maths is fp32 whatever dtype the weights are held in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.platforms import ops

IMAGE_NORM_EPS = 1e-5
"""Wan2.1's image projection uses LayerNorm's default, not the model's eps."""


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 and returns fp32, for inputs and weights of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` fp32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[B, C, F, H, W] -> [L, B, C * pf * ph * pw]``, tokens in (f, h, w) order, channels in conv-weight order."""
    B, C, frames, height, width = latents.shape
    pf, ph, pw = patch
    x = latents.reshape(B, C, frames // pf, pf, height // ph, ph, width // pw, pw)
    return x.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(-1, B, C * pf * ph * pw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """``[L, B, pf * ph * pw * C] -> [B, C, F, H, W]``; the channel is the fastest axis of a token, as in Wan's head."""
    (f, h, w), (pf, ph, pw), B = grid, patch, tokens.shape[1]
    x = tokens.reshape(f, h, w, B, pf, ph, pw, -1)
    return x.permute(3, 7, 0, 4, 1, 5, 2, 6).reshape(B, -1, f * pf, h * ph, w * pw)


class PatchEmbedding(nn.Module):
    """A Conv3d with kernel = stride, done as one matrix product on patches; the weight keeps the conv's shape."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim, config.in_channels, *config.patch_size))
        self.bias = nn.Parameter(torch.empty(config.dim))

    def forward(self, patches: Tensor) -> Tensor:
        """``[L, B, C * patch] -> [L, B, D]``."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """``[B] -> [B, dim]`` fp32: cos then sin of t * 10000^(-i / (dim/2)), computed in fp64.

    fp32 products at t near 1000 would lose five digits of the angle. The NPU has no fp64 and does it on the host.
    """
    half = dim // 2
    device = timestep.device if timestep.device.type in ("cpu", "cuda") else torch.device("cpu")
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.outer(timestep.detach().to(device, torch.float64), frequencies)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(timestep.device, torch.float32)


class TextEmbedding(nn.Module):
    """Two linear layers with tanh GELU from the text encoder's width to the model's."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.text_dim, config.dim)
        self.linear_2 = nn.Linear(config.dim, config.dim)

    def forward(self, text: Tensor) -> Tensor:
        """``[Lt, B, text_dim] -> [Lt, B, D]``."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class _AffineNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class ImageEmbedding(nn.Module):
    """Wan2.1 I2V: CLIP tokens to the model's width (norm, linear, exact GELU, linear, norm).

    The first-last-frame variant sees two images per sample as ``[2B, 257, C]`` and adds learned positions.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim
        assert width is not None
        self.proj = nn.Sequential(
            _AffineNorm(width, IMAGE_NORM_EPS),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            _AffineNorm(config.dim, IMAGE_NORM_EPS),
        )
        if config.pos_embed_len is not None:
            self.emb_pos = nn.Parameter(torch.empty(1, config.pos_embed_len, width))
        else:
            self.register_parameter("emb_pos", None)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, Li, C]`` (first-last: ``[2B, Li, C]``) -> ``[Li', B, D]`` sequence first."""
        if self.emb_pos is not None:
            image = image.reshape(-1, self.emb_pos.shape[1], image.shape[-1]) + self.emb_pos.to(image.dtype)
        return self.proj(image).transpose(0, 1)
