"""Floating-point operations of one Wan DiT, counted from its matrix products (a multiply-add is 2). No torch here.

Training logs, planning and benchmarks read this one count, so their TFLOP/s and MFU mean the same thing.
Element-wise work (norms, RoPE, GELU) is left out, as is usual for MFU; so is what a step cache skips.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.models.wan.config import IMAGE_CONTEXT_LENGTH, WanConfig

LATENT_STRIDE = (4, 8, 8)
"""Wan VAE: frames (after the first), height and width per latent voxel."""


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOP of one sample, by where they are spent."""

    linear: float
    self_attention: float
    cross_attention: float
    outside_blocks: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.self_attention + self.cross_attention + self.outside_blocks


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the latent (frames, height, width) of a clip of 4k+1 frames, sizes in pixels."""
    frames, rows, columns = LATENT_STRIDE
    return 1 + (num_frames - 1) // frames, height // rows, width // columns


def forward_flops(config: WanConfig, latent: tuple[int, int, int], *, text_len: int | None = None) -> ForwardFlops:
    """Return the forward FLOP of one sample with latent (frames, height, width).

    Args:
        config: the DiT.
        latent: latent frames, height and width.
        text_len: text tokens attended to; the model pads to ``config.text_len``, which is the default.
    """
    tokens = config.num_tokens(latent)
    text = text_len or config.text_len
    dim, layers = config.dim, config.num_layers
    context = text + (IMAGE_CONTEXT_LENGTH if config.has_image_embedder else 0)
    per_token = 4 * dim * dim + 2 * dim * dim + 2 * dim * config.ffn_dim  # self q,k,v,o; cross q,o; both ffn layers
    linear = 2.0 * layers * (tokens * per_token + context * 2 * dim * dim)
    patch_in, patch_out = config.in_channels * config.patch_volume, config.out_channels * config.patch_volume
    outside = 2.0 * (tokens * dim * (patch_in + patch_out) + text * dim * (config.text_dim + dim)
                     + dim * (config.freq_dim + dim + 6 * dim))
    if config.image_dim is not None:
        outside += 2.0 * IMAGE_CONTEXT_LENGTH * config.image_dim * (config.image_dim + dim)
    return ForwardFlops(
        linear=linear,
        self_attention=4.0 * layers * tokens * tokens * dim,
        cross_attention=4.0 * layers * tokens * context * dim,
        outside_blocks=outside,
    )


def training_flops(config: WanConfig, latent: tuple[int, int, int], *, recompute: bool = False) -> float:
    """Return forward plus backward FLOP of one sample: 3 forwards, 4 when every block is recomputed.

    MFU is defined with ``recompute=False`` whatever the run does; the other count is what the hardware executes.
    """
    forward = forward_flops(config, latent)
    executed_again = forward.total - forward.outside_blocks if recompute else 0.0
    return 3.0 * forward.total + executed_again
