"""One table of a Wan DiT's parameters: every name in every layout, its shape and how tensor parallelism cuts it.

Converters, LoRA formats and checkpoint readers are all driven by this table, in both directions. No torch here.

Names: ``mm`` is MindSpeed-MM's (and ours, in memory), ``hf`` is Diffusers', ``original`` is Wan-AI's own.
``norm2`` and ``norm3`` swap between ``mm``/``original`` and ``hf``: the affine norm before cross-attention is
``norm3`` there and ``norm2`` in Diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mindspeed_wan.models.wan.config import WanConfig

Layout = Literal["mm", "hf", "original"]


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter. ``tp_axis`` is the dimension that tensor parallelism splits, ``None`` when replicated.

    ``block`` is the transformer block index (``None`` outside the blocks), used for pipeline stages.
    """

    mm: str
    hf: str
    original: str
    shape: tuple[int, ...]
    tp_axis: int | None = None
    block: int | None = None

    def name(self, layout: Layout) -> str:
        """Return this parameter's name in ``layout``."""
        return str(getattr(self, layout))


# (mm, hf, original) module stems of one attention; {a} is self_attn/attn1 or cross_attn/attn2.
_ATTENTION = (
    ("proj_q", "to_q", "q", 0),
    ("proj_k", "to_k", "k", 0),
    ("proj_v", "to_v", "v", 0),
    ("proj_out", "to_out.0", "o", 1),
)


def _linear(mm: str, hf: str, original: str, out_dim: int, in_dim: int, tp: int | None = None,
            block: int | None = None) -> Iterator[Param]:
    """Yield weight and bias; under TP a row-parallel linear (axis 1) keeps its bias whole."""
    yield Param(f"{mm}.weight", f"{hf}.weight", f"{original}.weight", (out_dim, in_dim), tp, block)
    yield Param(f"{mm}.bias", f"{hf}.bias", f"{original}.bias", (out_dim,), 0 if tp == 0 else None, block)


def _norm(mm: str, hf: str, original: str, dim: int, *, bias: bool, tp: int | None = None,
          block: int | None = None) -> Iterator[Param]:
    yield Param(f"{mm}.weight", f"{hf}.weight", f"{original}.weight", (dim,), tp, block)
    if bias:
        yield Param(f"{mm}.bias", f"{hf}.bias", f"{original}.bias", (dim,), tp, block)


def _outside_blocks_before(c: WanConfig) -> Iterator[Param]:
    yield Param("patch_embedding.weight", "patch_embedding.weight", "patch_embedding.weight",
                (c.dim, c.in_channels, *c.patch_size))
    yield Param("patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias", (c.dim,))
    cond = "condition_embedder"
    yield from _linear("text_embedding.linear_1", f"{cond}.text_embedder.linear_1", "text_embedding.0",
                       c.dim, c.text_dim)
    yield from _linear("text_embedding.linear_2", f"{cond}.text_embedder.linear_2", "text_embedding.2", c.dim, c.dim)
    yield from _linear("time_embedding.0", f"{cond}.time_embedder.linear_1", "time_embedding.0", c.dim, c.freq_dim)
    yield from _linear("time_embedding.2", f"{cond}.time_embedder.linear_2", "time_embedding.2", c.dim, c.dim)
    yield from _linear("time_projection.1", f"{cond}.time_proj", "time_projection.1", 6 * c.dim, c.dim)
    if c.image_dim is not None:
        image = f"{cond}.image_embedder"
        if c.pos_embed_len is not None:
            yield Param("img_emb.emb_pos", f"{image}.pos_embed", "img_emb.emb_pos",
                        (1, c.pos_embed_len, c.image_dim))
        yield from _norm("img_emb.proj.0", f"{image}.norm1", "img_emb.proj.0", c.image_dim, bias=True)
        yield from _linear("img_emb.proj.1", f"{image}.ff.net.0.proj", "img_emb.proj.1", c.image_dim, c.image_dim)
        yield from _linear("img_emb.proj.3", f"{image}.ff.net.2", "img_emb.proj.3", c.dim, c.image_dim)
        yield from _norm("img_emb.proj.4", f"{image}.norm2", "img_emb.proj.4", c.dim, bias=True)


def _block(c: WanConfig, i: int) -> Iterator[Param]:
    b = f"blocks.{i}"
    yield Param(f"{b}.modulation", f"{b}.scale_shift_table", f"{b}.modulation", (1, 6, c.dim), None, i)
    for mm_attn, hf_attn in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for mm, hf, original, axis in _ATTENTION:
            yield from _linear(f"{b}.{mm_attn}.{mm}", f"{b}.{hf_attn}.{hf}", f"{b}.{mm_attn}.{original}",
                               c.dim, c.dim, axis, i)
        for letter in ("q", "k"):
            yield from _norm(f"{b}.{mm_attn}.{letter}_norm", f"{b}.{hf_attn}.norm_{letter}",
                             f"{b}.{mm_attn}.norm_{letter}", c.dim, bias=False, tp=0, block=i)
    if c.has_image_embedder:
        for letter in ("k", "v"):
            yield from _linear(f"{b}.cross_attn.{letter}_img", f"{b}.attn2.add_{letter}_proj",
                               f"{b}.cross_attn.{letter}_img", c.dim, c.dim, 0, i)
        yield from _norm(f"{b}.cross_attn.k_norm_img", f"{b}.attn2.norm_added_k", f"{b}.cross_attn.norm_k_img",
                         c.dim, bias=False, tp=0, block=i)
    yield from _norm(f"{b}.norm3", f"{b}.norm2", f"{b}.norm3", c.dim, bias=True, block=i)
    yield from _linear(f"{b}.ffn.0", f"{b}.ffn.net.0.proj", f"{b}.ffn.0", c.ffn_dim, c.dim, 0, i)
    yield from _linear(f"{b}.ffn.2", f"{b}.ffn.net.2", f"{b}.ffn.2", c.dim, c.ffn_dim, 1, i)


def _head(c: WanConfig) -> Iterator[Param]:
    yield Param("head.modulation", "scale_shift_table", "head.modulation", (1, 2, c.dim))
    yield from _linear("head.head", "proj_out", "head.head", c.out_channels * c.patch_volume, c.dim)


def parameter_table(config: WanConfig) -> list[Param]:
    """Return every parameter of the DiT in model order: embeddings, blocks, head (1095 for A14B)."""
    table = list(_outside_blocks_before(config))
    for i in range(config.num_layers):
        table.extend(_block(config, i))
    table.extend(_head(config))
    return table


def by_name(config: WanConfig, layout: Layout) -> dict[str, Param]:
    """Return the table keyed by the names of ``layout``."""
    return {p.name(layout): p for p in parameter_table(config)}


def is_head(param: Param) -> bool:
    """True for parameters that belong to the last pipeline stage."""
    return param.mm.startswith("head.")
