"""Hold what a folder contains against the model's table: names, shapes, precisions, experts. Strict both ways.

A converter that drops an unknown tensor, fills in a missing one or lets a stray precision through writes a model
that loads and is wrong. So every difference is an error that names up to ten tensors and the nearest known names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mindspeed_wan.errors import CheckpointError, ConfigError, did_you_mean
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout, by_name, parameter_table
from mindspeed_wan_converters import fp8
from mindspeed_wan_converters.plan import Weights
from mindspeed_wan_converters.tensors import FLOAT_CODES, SourceFiles, StoredTensor, check_tiling

_HEAD_DIM = 128
"""Channels per head of every released Wan; used only where neither a config nor ``wan.json`` tells."""

# Parts that Diffusers keeps in fp32 when the rest is bf16 (``_keep_in_fp32_modules``), each uniform in itself.
_FP32_ISLANDS = {
    "time_embedding": re.compile(r"time_embedding\."),
    "modulation": re.compile(r"(blocks\.\d+|head)\.modulation$"),
    "norm": re.compile(r"blocks\.\d+\.norm3\."),
    "image norm": re.compile(r"img_emb\.proj\.[04]\."),
}


def name_layout(names: Iterable[str]) -> Layout | None:
    """Return which layout's names these are, judged by the names that only one layout has."""
    for name in names:
        if ".attn1." in name or name.startswith("condition_embedder."):
            return "hf"
        if ".proj_q." in name or name.startswith("text_embedding.linear_"):
            return "mm"
        if re.search(r"_attn\.(q|k|v|o)\.", name) or name.startswith("text_embedding.0."):
            return "original"
    return None


def infer_config(tensors: Mapping[str, StoredTensor], where: Path, hint: WanConfig | None = None) -> WanConfig:
    """Work out the architecture from MM-named tensors; ``hint`` supplies what shapes cannot tell (heads, eps).

    Raises:
        CheckpointError: a tensor that every Wan DiT has is missing, or the head size cannot be known.
    """
    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != ndim:
            raise CheckpointError(f"not a Wan DiT: tensor {name!r} is missing or has another rank", where=str(where),
                                  fix="point at the weights of one expert")
        return tensors[name].shape

    patch = shape("patch_embedding.weight", 5)
    dim, volume = patch[0], math.prod(patch[2:])
    blocks = {int(m.group(1)) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    image = tensors.get("img_emb.proj.0.weight")
    position = tensors.get("img_emb.emb_pos")
    if hint is not None and hint.dim == dim:
        heads = hint.num_heads
    elif dim % _HEAD_DIM == 0:
        heads = dim // _HEAD_DIM
    else:
        raise CheckpointError(f"hidden size {dim} is no multiple of {_HEAD_DIM}, so the number of heads is not known",
                              where=str(where), fix="give the Diffusers folder of this model with --cfg.hf_dir")
    base = hint or WanConfig()
    return base.with_changes(
        num_layers=len(blocks), dim=dim, num_heads=heads, in_channels=patch[1], patch_size=patch[2:],
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0], out_channels=shape("head.head.weight", 2)[0] // volume,
        text_dim=shape("text_embedding.linear_1.weight", 2)[1], freq_dim=shape("time_embedding.0.weight", 2)[1],
        image_dim=image.shape[0] if image is not None else None,
        pos_embed_len=position.shape[1] if position is not None and len(position.shape) == 3 else None)


def rename_to_mm(found: Mapping[str, StoredTensor], config: WanConfig, layout: Layout,
                 where: Path) -> dict[str, StoredTensor]:
    """Return the tensors keyed by MM names in model order, after checking names, shapes, tiling and precision."""
    if config.num_layers > len(found):
        raise CheckpointError(f"the config says {config.num_layers} blocks, but there are {len(found)} tensors in all",
                              where=str(where), fix="config and weights are not of one model; download both again")
    table = by_name(config, layout)
    _check_names(found, table, where)
    wrong = [f"{name} is {list(found[name].shape)}, the config says {list(param.shape)}"
             for name, param in table.items() if found[name].shape != param.shape]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors have another shape: {_some(wrong)}{_task_hint(found, config)}",
                              where=str(where), fix="config and weights are not of one model; download both again")
    tensors = {param.mm: found[param.name(layout)] for param in parameter_table(config)}
    for tensor in tensors.values():
        check_tiling(tensor)
    if any(tensor.is_fp8 for tensor in tensors.values()):  # published beside fp32, fp16 and bf16, in any mixture
        tensors = {name: replace(tensor, output="BF16") for name, tensor in tensors.items()}
    _check_precision(tensors, where)
    return tensors


def rename_partial(found: Mapping[str, StoredTensor], layout: Layout) -> dict[str, StoredTensor]:
    """Return tensors under MM names as far as known, for a model whose size is still to be worked out."""
    blocks = [int(m.group(1)) for name in found if (m := re.match(r"blocks\.(\d+)\.", name))]
    table = by_name(WanConfig(num_layers=min(max(blocks, default=-1) + 1, 1000), image_dim=1280, pos_embed_len=1),
                    layout)
    return {table[name].mm if name in table else name: tensor for name, tensor in found.items()}


def _check_names(found: Mapping[str, StoredTensor], table: Mapping[str, object], where: Path) -> None:
    missing = [name for name in table if name not in found]
    unknown = [name for name in found if name not in table]
    if not missing and not unknown:
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(table)} tensors are missing: {_some(missing)}")
    if unknown:
        hints = [f"{name} ({hint})" if (hint := did_you_mean(name, missing or list(table))) else name
                 for name in unknown[:10]]
        problems.append(f"{len(unknown)} tensors are unknown: {_some(hints, len(unknown))}")
    raise CheckpointError("; ".join(problems), where=str(where),
                          fix="the weights are incomplete or of another model; download them again")


def _some(names: list[str], total: int | None = None) -> str:
    more = (total or len(names)) - 10
    return ", ".join(names[:10]) + (f" ... and {more} more" if more > 0 else "")


def _task_hint(found: Mapping[str, StoredTensor], config: WanConfig) -> str:
    patch = found.get("patch_embedding.weight")
    if patch is None or len(patch.shape) != 5 or patch.shape[1] == config.in_channels:
        return ""
    kind = {16: "T2V", 36: "I2V"}.get(patch.shape[1], f"{patch.shape[1]}-channel")
    return f"; these are {kind} weights, the config is for {config.task.upper()}"


def _check_precision(tensors: Mapping[str, StoredTensor], where: Path) -> None:
    """Require one float precision, but for the parts that Diffusers keeps in fp32; what is mostly fp8 may be mixed."""
    for name, tensor in tensors.items():
        if tensor.code not in FLOAT_CODES and not tensor.is_fp8:
            raise CheckpointError(f"tensor {name!r} is stored as {tensor.code}", where=str(where),
                                  fix="use fp32, bf16, fp16 or fp8 weights")
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        totals[tensor.code] = totals.get(tensor.code, 0) + tensor.nbytes // tensor.itemsize
    base = max(totals, key=totals.__getitem__)
    if base in fp8.VALUES:
        return
    odd = {name for name, tensor in tensors.items() if tensor.code != base}
    for island in _FP32_ISLANDS.values():
        members = {name for name in tensors if island.match(name)}
        if all(tensors[name].code == "F32" for name in members):
            odd -= members
    if odd:
        names = [f"{name} ({tensors[name].code})" for name in tensors if name in odd]
        raise CheckpointError(f"the weights are {base}, but {len(odd)} tensors are not: {_some(names)}",
                              where=str(where), fix="a tensor was cast by mistake; use the weights as published")


# ---- task and experts ----------------------------------------------------------------------------------------


def check_task(weights: Weights, task: str | None, converter: str) -> None:
    """Refuse weights of another task than the named converter is for."""
    found = weights.card.config.task
    if task is not None and found != task:
        raise ConfigError(f"these are {found.upper()} weights ({weights.card.config.in_channels} input channels), but "
                          f"{converter} is for {task.upper()}", where=str(weights.path),
                          fix=f"use Wan2.2{found.upper()}Converter, or WanConverter for any task")


def check_same_model(weights: Weights, config: WanConfig, source: str) -> None:
    """Refuse weights of another architecture than ``config``, in what a Diffusers config tells."""
    found = weights.card.config
    same = found.with_changes(text_len=config.text_len, rope_max_len=config.rope_max_len, eps=config.eps)
    if same != config:
        wrong = [f"{key} {value} against {config.to_dict()[key]}" for key, value in same.to_dict().items()
                 if value != config.to_dict()[key]]
        raise CheckpointError(f"not the model of {source}: {', '.join(wrong)}", where=str(weights.path),
                              fix="give the Diffusers folder of the same model")


def check_expert(weights: Weights, expert: str | None) -> None:
    """Refuse weights whose card names the other expert than the folder or ``--expert`` does."""
    if expert and weights.card.expert and weights.card.expert != expert:
        raise CheckpointError(f"holds the {weights.card.expert} expert where the {expert} one belongs: the experts are "
                              "swapped", where=str(weights.path), fix="exchange the two folders, or drop --expert")


def check_pair(high: Weights, low: Weights) -> None:
    """Refuse two experts that differ in architecture or are the same weights twice (first bytes of every tensor)."""
    if high.card.config != low.card.config:
        raise CheckpointError("the two experts differ in architecture", where=f"{high.path} and {low.path}",
                              fix="take both from one model")
    with SourceFiles() as files:
        for name, tensor in high.tensors.items():
            if _head(tensor, files) != _head(low.tensors[name], files):
                return
    raise CheckpointError("the high and the low expert are the same weights", where=f"{high.path} and {low.path}",
                          fix="download the missing expert; --expert high converts one alone")


def _head(tensor: StoredTensor, files: SourceFiles) -> bytes:
    """Return up to 4 KiB from the tensor's first chunk."""
    chunk = min(tensor.chunks, key=lambda c: c.box.offsets)
    buffer = bytearray(min(4096, chunk.box.numel * tensor.itemsize))
    files.read_into(chunk.path, chunk.offset, memoryview(buffer))
    return bytes(buffer)
