"""The Wan DiT: from a noisy latent, a timestep and a text to the velocity (noise - x0).

Written for one device in sequence-first layout; ``Layers``, ``TokenSharding`` and ``ContextAttention`` make it run on
many. Parameter names are MindSpeed-MM's (``param_map``).

Legend: B batch, C latent channels, F H W latent frames/height/width, L video tokens, Lt text tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_wan.errors import ConfigError, DataError
from mindspeed_wan.models.wan.attention import TextKV
from mindspeed_wan.models.wan.block import WanBlock
from mindspeed_wan.models.wan.config import IMAGE_CONTEXT_LENGTH, WanConfig
from mindspeed_wan.models.wan.embeddings import (
    Fp32Linear,
    ImageEmbedding,
    PatchEmbedding,
    TextEmbedding,
    patchify,
    timestep_sinusoid,
    unpatchify,
)
from mindspeed_wan.models.wan.layers import Layers, LocalLayers
from mindspeed_wan.models.wan.param_map import Param, parameter_table
from mindspeed_wan.models.wan.rope import rotary_tables
from mindspeed_wan.parallel.layout import ParamLayout
from mindspeed_wan.parallel.pipeline import Chunk
from mindspeed_wan.parallel.tokens import TokenSharding
from mindspeed_wan.parallel.ulysses import ContextAttention, LocalAttention
from mindspeed_wan.platforms import ops

BlockRunner = Callable[[Tensor], Tensor]
"""Runs all blocks: ``[L, B, D] -> [L, B, D]``."""

ROTARY_CACHE_SIZE = 4
"""Grids (resolutions) whose rotary tables are kept."""


@dataclass(frozen=True)
class TextContext:
    """A prompt as every block sees it: computed once per prompt and reused over all steps and both guidance passes.

    ``blocks`` holds one ``TextKV`` per block, ``[Lt, B, N, d]`` each in the compute dtype.
    """

    blocks: tuple[TextKV, ...]


class Head(nn.Module):
    """Two-way modulated norm and the projection to patches, all in fp32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = Fp32Linear(config.dim, config.out_channels * config.patch_volume)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x [L, B, D]``, ``time [B, D]`` fp32 ``-> [L, B, patch * C_out]`` fp32."""
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).unbind(1)
        return self.head(ops.modulated_layer_norm(x, scale, shift, self.eps, out_dtype=torch.float32))


class WanDiT(nn.Module):
    """One expert of Wan2.2 (or Wan2.1's only one).

    Args:
        config: sizes.
        layers: ``LocalLayers`` (default) or ``MegatronLayers``.
        tokens: how the token axis is spread over ranks.
        attend: self-attention over those tokens.
        residual_dtype: dtype of the residual stream, ``torch.float32`` as in the official model; ``None`` is the
            compute dtype (less memory, 2.5 times the rounding error in bf16).
        compute_dtype: dtype of the matrix products; ``None`` is that of the weights as the forward pass sees them
            (FSDP2 gathers them in its own ``param_dtype``).
        chunks: the parts of the model that this rank holds under pipeline parallelism; ``None`` is all of it. Blocks
            keep their global numbers (``blocks.17...``); ``models.wan.stages`` runs the parts.

    Attributes:
        chunks: the same; one chunk with all blocks and both ends for a whole model.
        param_layout: how tensor parallelism treats each parameter, by name. Whoever adds a parameter adds it here.
    """

    forward_methods = ("encode_text", "time_modulation")
    """Methods besides ``forward`` that use parameters (FSDP2 gathers for them too)."""

    def __init__(
        self,
        config: WanConfig,
        *,
        layers: Layers | None = None,
        tokens: TokenSharding | None = None,
        attend: ContextAttention | None = None,
        residual_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        chunks: Sequence[Chunk] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.chunks = tuple(chunks or (Chunk(blocks=range(config.num_layers)),))
        self.layers = layers or LocalLayers()
        self.tokens = tokens or TokenSharding()
        self.residual_dtype, self.compute_dtype = residual_dtype, compute_dtype
        attend = attend or LocalAttention()
        if self.chunks[0].first:
            self.patch_embedding = PatchEmbedding(config)
            self.text_embedding = TextEmbedding(config)
            self.time_embedding = nn.Sequential(
                Fp32Linear(config.freq_dim, config.dim), nn.SiLU(), Fp32Linear(config.dim, config.dim)
            )
            self.time_projection = nn.Sequential(nn.SiLU(), Fp32Linear(config.dim, 6 * config.dim))
            self.img_emb = ImageEmbedding(config) if config.has_image_embedder else None
        self.blocks = nn.ModuleList()
        for index in (index for chunk in self.chunks for index in chunk.blocks):
            self.blocks.add_module(str(index), WanBlock(config, self.layers, attend))
        if self.chunks[-1].last:
            self.head = Head(config)
        held = {name for name, _ in self.named_parameters()}
        self.param_layout = {
            p.mm: ParamLayout(tp_axis=p.tp_axis, tp_partial=self.layers.sequence_parallel and _sees_token_shard(p))
            for p in parameter_table(config)
            if p.mm in held
        }
        self._rotary_cache: dict[tuple[tuple[int, int, int], torch.device], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        image_embeds: Tensor | None = None,
        *,
        text_context: TextContext | None = None,
        around_blocks: Callable[[Tensor, BlockRunner], Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            latents: ``[B, C_in, F, H, W]``, conditioning channels already concatenated; equal on all TP/CP ranks.
            timestep: ``[B]`` fp32, 1000 * sigma.
            text: ``[B, Lt, text_dim]`` states of the text encoder; zero rows are added up to ``text_len``.
            image_embeds: ``[B, 257, 1280]`` CLIP states (Wan2.1 I2V only; first-last-frame ``[2B, 257, 1280]``).
            text_context: what ``encode_text`` returned, instead of ``text`` and ``image_embeds``.
            around_blocks: called as ``around_blocks(x, run)`` in place of ``run(x)``; a step cache returns ``x`` plus
                a remembered change instead of running the blocks.

        Returns:
            ``[B, C_out, F, H, W]`` fp32, whole on every tensor and context rank.

        Raises:
            DataError: shapes that do not fit the model; neither or both of ``text`` and ``text_context``.
        """
        grid = self.grid(latents)
        x = self.embed_video(latents)
        time, modulation = self.embed_time(timestep)
        texts, image = self._block_texts(text, image_embeds, text_context)

        def run(x: Tensor) -> Tensor:
            return self.run_blocks(self.blocks, x, modulation, texts, image, grid)

        x = run(x) if around_blocks is None else around_blocks(x, run)
        return self.project(x, time, grid)

    def encode_text(self, text: Tensor, image_embeds: Tensor | None = None) -> TextContext:
        """Compute every block's cross-attention keys and values once, for many ``forward`` calls.

        Shapes as in ``forward``. About 420 MB per prompt for A14B in bf16 (divided by the tensor ranks).
        """
        return self.project_text(*self.embed_text(text, image_embeds))

    def time_modulation(self, timestep: Tensor) -> Tensor:
        """Return the modulation ``[B, 6, D]`` fp32 of ``timestep [B]``, as ``forward`` hands it to the blocks."""
        return self.embed_time(timestep)[1]

    # ---- the parts of a forward pass, in order; pipeline stages run them apart ------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.compute_dtype or self.patch_embedding.weight.dtype

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Return tokens along (frames, height, width)."""
        config = self.config
        if latents.dim() != 5 or latents.shape[1] != config.in_channels:
            raise DataError(
                f"latents have shape {tuple(latents.shape)}; this model takes [B, {config.in_channels}, F, H, W]",
                fix="36 channels are I2V (16 noisy + 4 mask + 16 conditioning), 16 are T2V: check task and weights",
            )
        sizes = latents.shape[2:]
        if any(size % patch for size, patch in zip(sizes, config.patch_size)):
            raise DataError(
                f"latent size {tuple(sizes)} is not a multiple of the patch {config.patch_size}",
                fix="use a height and width divisible by 16 pixels",
            )
        frames, height, width = (size // patch for size, patch in zip(sizes, config.patch_size))
        if max(frames, height, width) > config.rope_max_len:
            raise ConfigError(f"token grid {(frames, height, width)} exceeds rope_max_len {config.rope_max_len}")
        return frames, height, width

    def embed_video(self, latents: Tensor) -> Tensor:
        """``[B, C_in, F, H, W] -> [L, B, D]``: this rank's tokens as the residual stream."""
        patches = self.tokens.split(patchify(latents, self.config.patch_size))
        x = self.patch_embedding(patches.to(self.dtype))
        return x if self.residual_dtype is None else x.to(self.residual_dtype)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """``[B] -> ([B, D], [B, 6, D])`` fp32, once per sample."""
        time = self.time_embedding(timestep_sinusoid(timestep, self.config.freq_dim))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        return self.layers.share_with_tokens(time), self.layers.share_with_tokens(modulation)

    def _rotary(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of cos and sin."""
        key = (grid, device)
        if key not in self._rotary_cache:
            if len(self._rotary_cache) >= ROTARY_CACHE_SIZE:
                self._rotary_cache.pop(next(iter(self._rotary_cache)))
            cos, sin = rotary_tables(self.config.head_dim, grid, device)
            self._rotary_cache[key] = (self.tokens.split_context(cos), self.tokens.split_context(sin))
        return self._rotary_cache[key]

    def run_blocks(
        self, blocks: Iterable[nn.Module], x: Tensor, modulation: Tensor, texts: Sequence[Tensor | TextKV],
        image: Tensor | None, grid: tuple[int, int, int], rows: slice = slice(None),
    ) -> Tensor:  # fmt: skip
        """Run ``blocks`` on the residual stream ``x [L, B, D]``; ``texts`` has one entry per block.

        Args:
            blocks: some or all of ``self.blocks``, in order.
            modulation: ``[B, 6, D]`` fp32, from ``embed_time``.
            texts: embedded text ``[Lt, B, D]`` or a block's cached keys and values.
            image: embedded image tokens ``[Li, B, D]`` of Wan2.1 I2V.
            grid: tokens of the whole video along (frames, height, width).
            rows: which of this rank's tokens ``x`` holds, when it is a patch of them.
        """
        cos, sin = (table[rows] for table in self._rotary(grid, x.device))
        length, dtype = grid[0] * grid[1] * grid[2], self.dtype
        for block, text in zip(blocks, texts):
            x = block(x, modulation, cos, sin, text, image=image, length=length, compute_dtype=dtype)
        return x

    def project(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return the velocity ``[B, C_out, F, H, W]`` fp32, whole, of the last block's ``x`` and ``time [B, D]``."""
        tokens = self.tokens.gather(self.head(x, time), grid[0] * grid[1] * grid[2])
        return unpatchify(tokens, grid, self.config.patch_size)

    def project_text(self, hidden: Tensor, image: Tensor | None) -> TextContext:
        """Return the cross-attention keys and values of this rank's blocks for what ``embed_text`` gave."""
        return TextContext(tuple(block.project_text(hidden, image) for block in self.blocks))  # type: ignore[operator]

    def _block_texts(
        self, text: Tensor | None, image_embeds: Tensor | None, context: TextContext | None
    ) -> tuple[Sequence[Tensor | TextKV], Tensor | None]:
        if (text is None) == (context is None):
            raise DataError("give either text or text_context, not both and not neither")
        if context is not None:
            return context.blocks, None
        assert text is not None
        hidden, image = self.embed_text(text, image_embeds)
        return [hidden] * len(self.blocks), image

    def embed_text(self, text: Tensor, image_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``[Lt, B, D]`` and ``[Li, B, D]``; rows past the prompt are zero before the embedding, not after."""
        config = self.config
        if text.dim() != 3 or text.shape[1] > config.text_len or text.shape[2] != config.text_dim:
            raise DataError(
                f"text states have shape {tuple(text.shape)}; this model takes"
                f" [B, at most {config.text_len}, {config.text_dim}]"
            )
        if (image_embeds is not None) != config.has_image_embedder:
            state = "needs" if config.has_image_embedder else "does not take"
            raise DataError(f"this model {state} image_embeds [B, {IMAGE_CONTEXT_LENGTH}, {config.image_dim}]")
        dtype = self.dtype
        padded = F.pad(text.to(dtype), (0, 0, 0, config.text_len - text.shape[1]))
        hidden = self.layers.share(self.text_embedding(padded.transpose(0, 1)))
        if self.img_emb is None or image_embeds is None:
            return hidden, None
        return hidden, self.layers.share(self.img_emb(image_embeds.to(dtype)))


def _sees_token_shard(param: Param) -> bool:
    """True for replicated parameters applied to tokens, which sequence parallelism splits over the tensor ranks.

    Time and text branches are not among them: their gradients come through ``share`` and ``share_with_tokens``.
    """
    if param.tp_axis is not None:
        return False
    if param.block is None:
        return param.mm.startswith(("patch_embedding.", "head."))
    return True  # modulation, norm3 and the biases of row-parallel layers
