"""Self-attention over video tokens and cross-attention to text (and, in Wan2.1 I2V, image tokens).

Legend: L tokens on this context rank, Lt text tokens, B batch, D hidden size, N heads on this tensor rank, d channels
of a head. q and k are normalised over all heads before the split into heads.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.layers import Layers
from mindspeed_wan.parallel.ulysses import ContextAttention
from mindspeed_wan.platforms import ops


class TextKV(NamedTuple):
    """One block's cross-attention keys and values; they do not change over the steps of a generation.

    ``key`` and ``value`` are ``[Lt, B, N, d]``; the image pair is ``None`` but for Wan2.1 I2V.
    """

    key: Tensor
    value: Tensor
    image_key: Tensor | None = None
    image_value: Tensor | None = None


class SelfAttention(nn.Module):
    """Attention of every video token to every video token, wherever they live."""

    def __init__(self, config: WanConfig, layers: Layers, attend: ContextAttention) -> None:
        super().__init__()
        dim = config.dim
        self.layers, self.attend, self.head_dim = layers, attend, config.head_dim
        self.proj_q, self.proj_k, self.proj_v = (layers.column(dim, dim) for _ in range(3))
        self.proj_out = layers.row(dim, dim)
        self.q_norm, self.k_norm = layers.head_norm(dim, config.eps), layers.head_norm(dim, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, length: int) -> Tensor:
        """Attend.

        Args:
            x: ``[L, B, D]`` (under sequence parallelism ``[L/tp, B, D]``), compute dtype.
            cos, sin: ``[L, 1, 1, d]`` fp32, this rank's tokens.
            length: tokens of the whole video without padding.
        """
        x = self.layers.enter(x)
        q, k = self.layers.normalize_and_turn(
            (self.q_norm, self.k_norm), (self.proj_q(x), self.proj_k(x)), cos, sin
        )
        out = self.attend(q, k, self.proj_v(x).unflatten(-1, (-1, self.head_dim)), length=length)
        return self.proj_out(out.flatten(2))


class CrossAttention(nn.Module):
    """Attention of every video token to all 512 text tokens, padding included, as the official model does."""

    def __init__(self, config: WanConfig, layers: Layers) -> None:
        super().__init__()
        dim = config.dim
        self.layers, self.head_dim = layers, config.head_dim
        self.proj_q, self.proj_k, self.proj_v = (layers.column(dim, dim) for _ in range(3))
        self.proj_out = layers.row(dim, dim)
        self.q_norm, self.k_norm = layers.head_norm(dim, config.eps), layers.head_norm(dim, config.eps)
        self.has_image = config.has_image_embedder
        if self.has_image:
            self.k_img, self.v_img = layers.column(dim, dim), layers.column(dim, dim)
            self.k_norm_img = layers.head_norm(dim, config.eps)

    def project(self, text: Tensor, image: Tensor | None) -> TextKV:
        """Return keys and values of ``text [Lt, B, D]`` and ``image [Li, B, D]``."""
        if not self.has_image or image is None:
            (key,) = self.layers.normalize((self.k_norm,), (self.proj_k(text),))
            return TextKV(self._heads(key), self._heads(self.proj_v(text)))
        key, image_key = self.layers.normalize(
            (self.k_norm, self.k_norm_img), (self.proj_k(text), self.k_img(image))
        )
        values = self.proj_v(text), self.v_img(image)
        return TextKV(*map(self._heads, (key, values[0], image_key, values[1])))

    def forward(self, x: Tensor, context: TextKV) -> Tensor:
        """Attend from ``x [L, B, D]`` (under sequence parallelism ``[L/tp, B, D]``)."""
        (q,) = self.layers.normalize((self.q_norm,), (self.proj_q(self.layers.enter(x)),))
        q = self._heads(q)
        out = ops.attention(q, context.key, context.value)
        if context.image_key is not None and context.image_value is not None:
            out = out + ops.attention(q, context.image_key, context.image_value)
        return self.proj_out(out.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
