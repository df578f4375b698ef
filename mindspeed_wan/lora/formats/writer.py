"""Writes a :class:`LoraFile` in any format. Alpha is always written, in the place where that format's loaders look."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.manifest import write_text_atomic
from mindspeed_wan.checkpoint.tensor_file import write_tensor_file
from mindspeed_wan.errors import CheckpointError, ConfigError, did_you_mean
from mindspeed_wan.lora.formats import alpha as alphas
from mindspeed_wan.lora.formats.bias import from_difference
from mindspeed_wan.lora.formats.file import Adapter, LoraFile
from mindspeed_wan.lora.formats.grammar import FORMATS, Format
from mindspeed_wan.lora.names import NameTable
from mindspeed_wan.models.wan.config import WanConfig

_REWRITTEN = (alphas.PEFT_KEY, alphas.OWN_KEY, "ss_network_alpha", "ss_network_dim", "format")


def write_lora(
    lora: LoraFile,
    path: str | Path,
    config: WanConfig,
    format_name: str = "diffusers",
    *,
    metadata: Mapping[str, str] | None = None,
    drop_diffs: bool = False,
) -> Path:
    """Write ``lora`` to ``path`` (a file; for ``peft`` a folder) and return the safetensors file's path.

    Args:
        format_name: a key of ``FORMATS``.
        metadata: strings added to the file's own.
        drop_diffs: leave out differences that the format has no words for instead of refusing.

    Raises:
        CheckpointError: differences that the format has no words for.
        ConfigError: ``path`` is a folder, but the format is one file.
        ResourceError: the disk is full; what was at ``path`` is untouched.
    """
    if format_name != "peft" and Path(path).is_dir():
        raise ConfigError(f"{path} is a folder", fix="name the file to write, such as adapter.safetensors")
    tensors, strings = to_tensors(lora, config, format_name, drop_diffs=drop_diffs)
    strings.update(metadata or {})
    file = Path(path) / "adapter_model.safetensors" if format_name == "peft" else Path(path)
    write_tensor_file(file, tensors, strings)
    if format_name == "peft":
        settings = json.dumps(_peft_config(lora, config), indent=2, sort_keys=True)
        write_text_atomic(file.with_name(alphas.PEFT_CONFIG_FILE), settings + "\n")
    return file


def to_tensors(
    lora: LoraFile, config: WanConfig, format_name: str, *, drop_diffs: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of ``lora`` in a format, ready for a safetensors file."""
    spelling = _format(format_name)
    lost = [name for name in lora.diffs if not _carries(name, lora, spelling)]
    if lost and not drop_diffs:
        raise CheckpointError(
            f"{len(lost)} differences (first {lost[0]}) cannot be written as {format_name}: "
            "its loaders do not know them",
            fix="use kohya, comfy or lightx2v, or --drop-diffs to lose them",
        )
    names = NameTable(config)
    tensors: dict[str, Tensor] = {}
    for mm, adapter in lora.adapters.items():
        stem = _stem(mm, spelling, names)
        down, up = _folded(adapter) if spelling.alpha == "folded" else (adapter.down, adapter.up)
        kernel = names.params[f"{mm}.weight"].shape[1:]
        if len(kernel) > 1:  # loaders make a convolution of A and a pointwise one of B
            down, up = down.reshape(-1, *kernel), up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        tensors[stem + spelling.down] = down
        tensors[stem + spelling.up] = up
        if spelling.alpha == "tensor":
            tensors[stem + ".alpha"] = _alpha_tensor(adapter)
    if spelling.up_bias is not None:
        tensors.update(_up_biases(lora, spelling, names))
    if spelling.diffs:
        tensors.update(_diff_tensors(lora, spelling, names))
    return tensors, _metadata(lora, config, spelling)


def _carries(diff: str, lora: LoraFile, spelling: Format) -> bool:
    """Tell whether a format has a place for a difference: PEFT's only for the biases of adapted layers."""
    return spelling.diffs or (spelling.up_bias is not None and _is_up_bias(diff, lora))


def _is_up_bias(diff: str, lora: LoraFile) -> bool:
    module, _, leaf = diff.rpartition(".")
    return leaf == "bias" and module in lora.adapters


def _up_biases(lora: LoraFile, spelling: Format, names: NameTable) -> dict[str, Tensor]:
    """Return a bias of B for every module if one has it: PEFT knows only all or none."""
    if not _has_up_bias(lora):
        return {}
    tensors = {}
    for mm, adapter in lora.adapters.items():
        diff, up = lora.diffs.get(f"{mm}.bias"), adapter.up
        zero = torch.zeros(up.shape[0], dtype=up.dtype, device=up.device)
        bias = zero if diff is None else from_difference(diff, adapter.scale, up.dtype)
        tensors[_stem(mm, spelling, names) + str(spelling.up_bias)] = bias
    return tensors


def _has_up_bias(lora: LoraFile) -> bool:
    return any(_is_up_bias(diff, lora) for diff in lora.diffs)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"adapter format {name!r} is not known. {did_you_mean(name, list(FORMATS))}",
                          fix=f"use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _stem(mm: str, spelling: Format, names: NameTable) -> str:
    name = names.name_in(mm, spelling.layout)
    return spelling.prefix + (name.replace(".", "_") if spelling.squash else name)


def _folded(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return (A, scale * B) in the first dtype, the file's or a wider one, that gives B back to the reader bit for bit.

    fp32 times an odd scale needs fp64.
    """
    up, scale = adapter.up, adapter.scale

    def comes_back(dtype: torch.dtype) -> bool:
        return torch.equal((up.to(dtype) * scale / scale).to(up.dtype), up)

    dtype = next(filter(comes_back, (up.dtype, torch.float32)), torch.float64)
    return adapter.down.to(dtype), up.to(dtype) * scale


def _alpha_tensor(adapter: Adapter) -> Tensor:
    """Alpha in the file's dtype when it survives the rounding, as its producers write it, else in fp32."""
    value = torch.tensor(adapter.alpha, dtype=torch.float64)
    exact = next((d for d in (adapter.up.dtype, torch.float32) if value.to(d).double() == value), torch.float64)
    return value.to(exact)


def _diff_tensors(lora: LoraFile, spelling: Format, names: NameTable) -> dict[str, Tensor]:
    endings = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}
    tensors = {}
    for name, diff in lora.diffs.items():
        module, _, leaf = name.rpartition(".")
        if leaf in endings:
            tensors[_stem(module, spelling, names) + endings[leaf]] = diff
        else:
            tensors[_stem(name, spelling, names) + ".diff"] = diff
    return tensors


def _metadata(lora: LoraFile, config: WanConfig, spelling: Format) -> dict[str, str]:
    kept = {key: value for key, value in lora.metadata.items() if key not in _REWRITTEN}
    kept["format"] = "pt"
    if not lora.adapters:
        return kept
    effective = {name: adapter.alpha for name, adapter in lora.adapters.items()}
    if spelling.alpha == "peft":
        prefix = spelling.prefix if spelling.prefix == "transformer." else ""
        values = {prefix + key: value for key, value in _peft_config(lora, config).items()}
        kept[alphas.PEFT_KEY] = json.dumps(values, indent=2, sort_keys=True)
    elif spelling.alpha == "tensor":
        if spelling.squash:
            kept["ss_network_module"] = "networks.lora_wan"
            kept["ss_network_dim"] = str(max(lora.ranks))
            kept["ss_network_alpha"] = repr(max(effective.values()))
    else:
        dtypes = {name: str(adapter.up.dtype).removeprefix("torch.") for name, adapter in lora.adapters.items()}
        kept[alphas.OWN_KEY] = alphas.own_metadata(effective, dtypes if spelling.alpha == "folded" else None)
    return kept


def _peft_config(lora: LoraFile, config: WanConfig) -> dict[str, Any]:
    """Return a LoraConfig as JSON values: every module by its full Diffusers name, exceptions as patterns."""
    names = NameTable(config)
    hf = {mm: names.name_in(mm, "hf") for mm in lora.adapters}
    rank = max(lora.ranks)
    values = [adapter.alpha for adapter in lora.adapters.values()]
    alpha = max(set(values), key=values.count)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == math.floor(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        **({"lora_bias": True} if _has_up_bias(lora) else {}),
        "target_modules": sorted(hf.values()),
        "rank_pattern": {hf[mm]: a.rank for mm, a in lora.adapters.items() if a.rank != rank},
        "alpha_pattern": {hf[mm]: a.alpha for mm, a in lora.adapters.items() if a.alpha != alpha},
    }

