"""A DiT in pipeline stages: what one chunk of blocks does, and the one tensor that travels to the next.

The residual stream is not all that later blocks need: they also read the time modulation and the embedded text. These
travel with it (0.7 % of the rows of a 480p clip), so every parameter lives on one stage and its gradient is complete
there: each block adds its part to the gradient of the modulation and of the text on the way back.

Rows of the wire, each [B, D]: the tokens of this tensor/context rank, then text, image, six of modulation and one of
time. Modulation and time are fp32 whatever the wire's dtype; on a 16-bit wire each of their rows takes two, bit for
bit, in both directions.

Legend: L tokens on this rank, Lt text tokens, Li image tokens, B batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.models.wan.config import IMAGE_CONTEXT_LENGTH, WanConfig
from mindspeed_wan.models.wan.model import BlockRunner, TextContext, WanDiT
from mindspeed_wan.parallel.pipeline import Chunk

TIME_ROWS = 7
"""Six of modulation, one of time."""

Grid = tuple[int, int, int]
"""Tokens of the whole video along (frames, height, width)."""


@dataclass(frozen=True)
class Stream:
    """What flows through the blocks: ``x [L, B, D]``, ``time [B, D]`` and ``modulation [B, 6, D]`` fp32, ``text``
    [Lt, B, D] and ``image`` [Li, B, D] (``text`` is ``None`` where keys and values were computed before)."""

    x: Tensor
    time: Tensor
    modulation: Tensor
    text: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Shape of what travels: how many rows of each kind, and the dtype of tokens."""

    tokens: int
    text: int
    image: int
    batch: int
    dim: int
    dtype: torch.dtype

    @property
    def time_rows(self) -> int:
        """Rows that modulation and time take."""
        return TIME_ROWS * torch.float32.itemsize // self.dtype.itemsize

    @property
    def rows(self) -> int:
        """All rows."""
        return self.tokens + self.text + self.image + self.time_rows

    @property
    def sections(self) -> list[int]:
        """Rows by kind: tokens, text, image, time."""
        return [self.tokens, self.text, self.image, self.time_rows]


def wire_of(model: WanDiT, grid: Grid, batch: int, *, with_text: bool = True) -> Wire:
    """Return the wire's shape for videos of ``grid`` tokens; every stage works it out for itself."""
    frames, height, width = grid
    text, image = (model.config.text_len, image_rows(model.config)) if with_text else (0, 0)
    return Wire(tokens=model.tokens.padded(frames * height * width) // model.tokens.parts, text=text, image=image,
                batch=batch, dim=model.config.dim, dtype=model.residual_dtype or model.dtype)


def image_rows(config: WanConfig) -> int:
    """Return the image tokens of one sample; the first-last-frame variant sees two pictures."""
    if not config.has_image_embedder:
        return 0
    return IMAGE_CONTEXT_LENGTH if config.pos_embed_len is None else config.pos_embed_len


def pack(stream: Stream, wire: Wire) -> Tensor:
    """Return the stream as one tensor ``[rows, B, D]`` of the wire's dtype."""
    empty = stream.x.new_empty((0, wire.batch, wire.dim))
    text = empty if stream.text is None else stream.text
    image = empty if stream.image is None else stream.image
    return _Pack.apply(wire, stream.x, text, image, stream.time, stream.modulation)


def unpack(tensor: Tensor, wire: Wire, text_dtype: torch.dtype) -> Stream:
    """Undo ``pack``; text and image come back in ``text_dtype``."""
    x, text, image, time, modulation = _Unpack.apply(wire, text_dtype, tensor)
    return Stream(x, time, modulation, text if wire.text else None, image if wire.image else None)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Wire, *parts: Tensor) -> Tensor:
        ctx.wire, ctx.dtypes = wire, [part.dtype for part in parts]
        return _join(wire, *parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(part.to(dtype) for part, dtype in zip(_part(ctx.wire, grad), ctx.dtypes))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Wire, text_dtype: torch.dtype, tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.wire = wire
        x, text, image, time, modulation = _part(wire, tensor)
        return x, text.to(text_dtype), image.to(text_dtype), time, modulation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _join(ctx.wire, *grads)


def _join(wire: Wire, x: Tensor, text: Tensor, image: Tensor, time: Tensor, modulation: Tensor) -> Tensor:
    rows = torch.cat((modulation.float(), time.float().unsqueeze(1)), dim=1).transpose(0, 1).contiguous()  # [7, B, D]
    bits = rows.view(wire.dtype).reshape(wire.time_rows, wire.batch, wire.dim)
    return torch.cat((x.to(wire.dtype), text.to(wire.dtype), image.to(wire.dtype), bits))


def _part(wire: Wire, tensor: Tensor) -> tuple[Tensor, ...]:
    x, text, image, bits = tensor.split(wire.sections)
    rows = bits.reshape(TIME_ROWS, wire.batch, -1).contiguous().view(torch.float32).transpose(0, 1)
    return x, text, image, rows[:, 6].clone(), rows[:, :6].clone()


@dataclass(frozen=True)
class Inputs:
    """What the first chunk reads; other stages know only the shapes. As in ``WanDiT.forward``."""

    latents: Tensor
    timestep: Tensor
    text: Tensor | None = None
    image_embeds: Tensor | None = None


def run_chunk(model: WanDiT, chunk: Chunk, wire: Wire, grid: Grid, source: Inputs | Tensor,
              context: TextContext | None = None,
              around_blocks: Callable[[Tensor, BlockRunner], Tensor] | None = None) -> Tensor:
    """Run one chunk of the model on this stage.

    Args:
        model: holds the chunk.
        chunk: one of ``model.chunks``.
        wire, grid: sizes of this micro-batch.
        source: ``Inputs`` for the first chunk, else the tensor received from the chunk before.
        context: cached keys and values of all of this rank's blocks, instead of text on the wire.
        around_blocks: as in ``WanDiT.forward``, around the chunk's blocks.

    Returns:
        the velocity ``[B, C_out, F, H, W]`` of the last chunk, else the tensor ``[rows, B, D]`` to send on.
    """
    if isinstance(source, Inputs):
        time, modulation = model.embed_time(source.timestep)
        stream = Stream(model.embed_video(source.latents), time, modulation)
        if source.text is not None:
            text, image = model.embed_text(source.text, source.image_embeds)
            stream = replace(stream, text=text, image=image)
    else:
        stream = unpack(source, wire, model.dtype)
    held = list(model.blocks.named_children())
    mine = [place for place, (name, _) in enumerate(held) if int(name) in chunk.blocks]
    blocks = [held[place][1] for place in mine]
    texts = [stream.text if context is None else context.blocks[place] for place in mine]

    def run(x: Tensor) -> Tensor:
        return model.run_blocks(blocks, x, stream.modulation, texts, stream.image, grid)  # type: ignore[arg-type]

    x = run(stream.x) if around_blocks is None else around_blocks(stream.x, run)
    return model.project(x, stream.time, grid) if chunk.last else pack(replace(stream, x=x), wire)
