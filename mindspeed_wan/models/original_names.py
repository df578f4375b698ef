"""Names of the frozen encoders' weights: Wan-AI's own files against Diffusers and transformers. No torch here.

The official release stores the VAE (``Wan2.1_VAE.pth``), UMT5 (``models_t5_umt5-xxl-enc-bf16.pth``) and CLIP as
pickled state dicts with names of their own; no tensor differs in shape or order, only the names do. Each function
returns one table ``{original: library}`` for a model of a given depth; a superset where a layer is optional (a
residual block has a shortcut only where its width changes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mindspeed_wan.errors import CheckpointError

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"

# Stems of one residual block: the original is a Sequential (norm, act, conv, norm, act, dropout, conv).
_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.weight", "conv1.weight"),
    ("residual.2.bias", "conv1.bias"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.weight", "conv2.weight"),
    ("residual.6.bias", "conv2.bias"),
    ("shortcut.weight", "conv_shortcut.weight"),
    ("shortcut.bias", "conv_shortcut.bias"),
)
_RESAMPLE = tuple(2 * (f"{stem}.{leaf}",) for stem in ("resample.1", "time_conv") for leaf in ("weight", "bias"))
_ATTENTION = tuple(2 * (name,) for name in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"))


def _under(original: str, library: str, leaves: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for left, right in leaves:
        yield f"{original}.{left}", f"{library}.{right}"


def _linear(original: str, library: str, *, bias: bool = True) -> Iterator[tuple[str, str]]:
    for leaf in ("weight", "bias") if bias else ("weight",):
        yield f"{original}.{leaf}", f"{library}.{leaf}"


def vae_names(*, num_stages: int = 4, num_res_blocks: int = 2) -> dict[str, str]:
    """Return ``{original: AutoencoderKLWan}`` for the 16-channel Wan2.1 VAE."""
    pairs: list[tuple[str, str]] = [*_linear("conv1", "quant_conv"), *_linear("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += _linear(f"{side}.conv1", f"{side}.conv_in")
        pairs += _under(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESIDUAL)
        pairs += _under(f"{side}.middle.1", f"{side}.mid_block.attentions.0", _ATTENTION)
        pairs += _under(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESIDUAL)
        pairs.append((f"{side}.head.0.gamma", f"{side}.norm_out.gamma"))
        pairs += _linear(f"{side}.head.2", f"{side}.conv_out")
    for stage in range(num_stages):
        # Downwards both number layers flat (blocks, then a resample); upwards Diffusers nests them by stage.
        down, up = stage * (num_res_blocks + 1), stage * (num_res_blocks + 2)
        for block in range(num_res_blocks):
            pairs += _under(f"encoder.downsamples.{down + block}", f"encoder.down_blocks.{down + block}", _RESIDUAL)
        for block in range(num_res_blocks + 1):
            pairs += _under(f"decoder.upsamples.{up + block}", f"decoder.up_blocks.{stage}.resnets.{block}", _RESIDUAL)
        if stage < num_stages - 1:
            last = down + num_res_blocks
            pairs += _under(f"encoder.downsamples.{last}", f"encoder.down_blocks.{last}", _RESAMPLE)
            pairs += _under(f"decoder.upsamples.{up + num_res_blocks + 1}",
                            f"decoder.up_blocks.{stage}.upsamplers.0", _RESAMPLE)
    return dict(pairs)


def umt5_names(*, num_layers: int = 24) -> dict[str, str]:
    """Return ``{original: UMT5EncoderModel}`` (the token embedding is transformers' ``shared``)."""
    pairs = [("token_embedding.weight", "shared.weight"), ("norm.weight", "encoder.final_layer_norm.weight")]
    for layer in range(num_layers):
        block, attention = f"blocks.{layer}", f"encoder.block.{layer}.layer.0"
        feed_forward = f"encoder.block.{layer}.layer.1"
        pairs += _linear(f"{block}.norm1", f"{attention}.layer_norm", bias=False)
        for letter in "qkvo":
            pairs += _linear(f"{block}.attn.{letter}", f"{attention}.SelfAttention.{letter}", bias=False)
        pairs += _linear(f"{block}.pos_embedding.embedding", f"{attention}.SelfAttention.relative_attention_bias",
                         bias=False)
        pairs += _linear(f"{block}.norm2", f"{feed_forward}.layer_norm", bias=False)
        for left, right in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            pairs += _linear(f"{block}.ffn.{left}", f"{feed_forward}.DenseReluDense.{right}", bias=False)
    return dict(pairs)


def clip_names(*, num_layers: int = 32) -> dict[str, tuple[str, ...]]:
    """Return ``{original: CLIPVisionModel names}`` of the vision tower, without transformers' ``vision_model.``.

    The original keeps q, k and v of a layer in one matrix, so three library names are concatenated on dim 0. Its
    class and position embeddings carry a leading dimension of size 1 more.
    """
    table: dict[str, tuple[str, ...]] = {
        "visual.cls_embedding": ("embeddings.class_embedding",),
        "visual.patch_embedding.weight": ("embeddings.patch_embedding.weight",),
        "visual.pos_embedding": ("embeddings.position_embedding.weight",),
    }
    pairs = [*_linear("visual.pre_norm", "pre_layrnorm"), *_linear("visual.post_norm", "post_layernorm")]
    for layer in range(num_layers):
        block, library = f"visual.transformer.{layer}", f"encoder.layers.{layer}"
        for left, right in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"),
                            ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):
            pairs += _linear(f"{block}.{left}", f"{library}.{right}")
        for leaf in ("weight", "bias"):
            table[f"{block}.attn.to_qkv.{leaf}"] = tuple(f"{library}.self_attn.{x}_proj.{leaf}" for x in "qkv")
    return {**table, **{left: (right,) for left, right in pairs}}


def renamed(state: dict[str, Any], names: dict[str, str], *, where: str) -> dict[str, Any]:
    """Return ``state`` under the names on the table's right side.

    Raises:
        CheckpointError: a name that the table does not know (up to five are listed).
    """
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state)} tensor names are unknown, e.g. {', '.join(unknown[:5])}", where=where
        )
    return {names[name]: tensor for name, tensor in state.items()}


def vae_structure(shapes: dict[str, tuple[int, ...]], *, where: str) -> dict[str, Any]:
    """Read the VAE's sizes off an original state dict: ``base_dim``, ``z_dim``, ``num_res_blocks``, ``dim_mult``.

    Raises:
        CheckpointError: not a Wan VAE, or the 48-channel VAE of TI2V-5B.
    """
    first, latent = shapes.get("encoder.conv1.weight"), shapes.get("conv2.weight")
    if first is None or latent is None:
        raise CheckpointError(f"not a Wan VAE: no encoder.conv1.weight among {len(shapes)} tensors", where=where)
    check_latent_channels(latent[0], where=where)
    numbers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("encoder.downsamples.")})
    resamples = [n for n in numbers if f"encoder.downsamples.{n}.resample.1.weight" in shapes]
    widths = [shapes[f"encoder.downsamples.{n}.resample.1.weight"][0] for n in resamples]
    last = shapes["encoder.head.0.gamma"][0]
    return {
        "base_dim": first[0],
        "z_dim": latent[0],
        "num_res_blocks": resamples[0],
        "dim_mult": [width // first[0] for width in (*widths, last)],
        "temperal_downsample": [f"encoder.downsamples.{n}.time_conv.weight" in shapes for n in resamples],
    }


def check_latent_channels(channels: int, *, where: str) -> None:
    """Refuse every VAE but the 16-channel one.

    Raises:
        CheckpointError: names the VAE that the A14B models need.
    """
    if channels != 16:
        raise CheckpointError(
            f"this VAE has {channels} latent channels; the A14B models use the 16-channel Wan2.1 VAE",
            where=where,
            fix=f"use {VAE_FILE} (or the vae/ folder of Wan2.2-T2V-A14B-Diffusers), not the VAE of TI2V-5B",
        )


def umt5_structure(shapes: dict[str, tuple[int, ...]], *, where: str) -> dict[str, int]:
    """Read UMT5's sizes off an original state dict, as ``UMT5Config`` fields.

    Raises:
        CheckpointError: not a Wan text encoder file.
    """
    needed = ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "blocks.0.attn.q.weight",
              "blocks.0.ffn.fc1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise CheckpointError(f"not a UMT5 encoder in Wan's own layout: no {missing[0]}", where=where)
    vocab, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
