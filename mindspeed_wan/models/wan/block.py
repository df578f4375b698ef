"""One transformer block: modulated self-attention, cross-attention, modulated feed-forward.

Legend: L tokens on this rank, B batch, D hidden size. Modulation, norms and gated additions are computed in fp32; the
residual stream ``x`` keeps the dtype it came in with (fp32 in the official model, or the compute dtype).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindspeed_wan.models.wan.attention import CrossAttention, SelfAttention, TextKV
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.layers import Layers
from mindspeed_wan.parallel.ulysses import ContextAttention
from mindspeed_wan.platforms import ops


class WanBlock(nn.Module):
    """A block of the DiT. ``modulation`` is a learned table added to the time projection."""

    forward_methods = ("project_text",)
    """Methods besides ``forward`` that use parameters (FSDP2 gathers for them too)."""

    def __init__(self, config: WanConfig, layers: Layers, attend: ContextAttention) -> None:
        super().__init__()
        self.layers, self.eps = layers, config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config, layers, attend)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)  # parameters only; the operator is chosen in forward
        self.cross_attn = CrossAttention(config, layers)
        self.ffn = nn.Sequential(
            layers.column(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            layers.row(config.ffn_dim, config.dim),
        )

    def project_text(self, text: Tensor, image: Tensor | None = None) -> TextKV:
        """Return this block's cross-attention keys and values of ``text [Lt, B, D]`` (and ``image [Li, B, D]``)."""
        return self.cross_attn.project(text, image)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        text: Tensor | TextKV,
        *,
        image: Tensor | None,
        length: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        """Return the next residual stream.

        Args:
            x: ``[L, B, D]`` residual stream.
            modulation: ``[B, 6, D]`` fp32 time projection: (shift, scale, gate) for attention, then for the FFN.
            cos, sin: rotary tables of this rank's tokens.
            text: ``[Lt, B, D]`` embedded text, or this block's cached keys and values.
            image: ``[Li, B, D]`` embedded image tokens of Wan2.1 I2V.
            length: tokens of the whole video without padding.
            compute_dtype: dtype of the matrix products.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unbind(1)  # [B, D] each
        h = ops.modulated_layer_norm(x, scale1, shift1, self.eps, out_dtype=compute_dtype)
        x = _add_gated(x, self.self_attn(h, cos, sin, length), gate1)
        h = ops.layer_norm(x, self.norm3.weight, self.norm3.bias, self.eps, out_dtype=compute_dtype)
        context = text if isinstance(text, TextKV) else self.cross_attn.project(text, image)
        x = x + self.cross_attn(h, context)
        h = ops.modulated_layer_norm(x, scale2, shift2, self.eps, out_dtype=compute_dtype)
        return _add_gated(x, self.ffn(self.layers.enter(h)), gate2)


def _add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + update * gate``: the gate is fp32, so the sum is, and only then rounded to ``x``'s dtype."""
    return torch.addcmul(x, update, gate).to(x.dtype)
