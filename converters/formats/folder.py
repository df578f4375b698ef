"""What Diffusers' and Wan-AI's own layout share: safetensors files, an index when there are several, a config.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.fp8_files import common_prefix, split_scales
from mindspeed_wan.checkpoint.manifest import MANIFEST_NAME, confined, hash_file, read_manifest
from mindspeed_wan.checkpoint.safe_load import SafeTensorsFile, read_safetensors_header, read_safetensors_index
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout as Names
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan_converters.checks import infer_config, name_layout, rename_partial, rename_to_mm
from mindspeed_wan_converters.plan import Card, Constant, Layout, OutputFile, Slice, Weights, check_numbers
from mindspeed_wan_converters.tensors import Box, StoredTensor

_STEM = "diffusion_pytorch_model"
_WEIGHTS = (".safetensors", ".distcp", ".pt")
_OTHER = {"hf": ("original Wan layout", "original_to_hf"), "original": ("Diffusers layout", "hf_to_original"),
          "mm": ("MindSpeed-MM's names", "mm_to_hf")}


# ---- reading -------------------------------------------------------------------------------------------------


def read(path: Path, names: Names, expert: str | None = None, hint: WanConfig | None = None) -> Weights:
    """Read the tables of an expert folder, or of one ``.safetensors`` file, in layout ``names``.

    Args:
        path: folder with config.json and safetensors shards, or a single file.
        names: ``hf`` or ``original``.
        expert: what the caller knows it to be; a ``wan.json`` beside the weights has its own say.
        hint: architecture to use where there is no config.json.
    """
    folder = path if path.is_dir() else path.parent
    tables = _tables(path)
    checksums = _known_checksums(folder) if path.is_dir() else {}
    found: dict[str, StoredTensor] = {}
    for table in tables:
        for name, entry in table.tensors.items():
            if name in found:
                raise CheckpointError(f"tensor {name!r} is in two files", where=str(table.path),
                                      fix="keep one set of shards in the folder")
            tensor = StoredTensor(name, entry.code, entry.shape, ())
            found[name] = tensor.single(table.path, entry.start, checksums.get(name))
    found = _with_scales(found, path)
    _check_layout(found, names, path)
    card = Card.read(folder) if path.is_dir() else None
    config = _config(folder if path.is_dir() else None, names, found, path, hint or (card.config if card else None))
    tensors = rename_to_mm(found, config, names, path)
    card = Card(config, card.expert or expert, card.boundary, card.shift) if card else Card(config, expert)
    return Weights(path, names, card, tensors, f"{len(tables)} file{'s' if len(tables) > 1 else ''}")


def _with_scales(found: dict[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a published fp8 file without prefix and markers, each with its scale."""
    prefix = common_prefix(found)
    kept, scales = split_scales({name.removeprefix(prefix): tensor for name, tensor in found.items()}, path)
    return {name: replace(tensor, scale=scales.get(name)) for name, tensor in kept.items()}


def _tables(path: Path) -> list[SafeTensorsFile]:
    if path.is_file():
        return [read_safetensors_header(path)]
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) > 1:
        raise CheckpointError(f"holds {len(indices)} index files: {', '.join(i.name for i in indices)}",
                              where=str(path), fix="keep one variant of the weights in the folder")
    if indices:
        shards = read_safetensors_index(indices[0])
        extra = [file.name for file in files if file.name not in shards]
        if extra:
            raise CheckpointError(f"{extra[0]} is not in the index {indices[0].name}", where=str(path),
                                  fix="remove leftovers of another download or conversion")
        return list(shards.values())
    if not files:
        raise CheckpointError("holds no .safetensors file", where=str(path), fix="download the weights again")
    if len(files) > 1:
        raise CheckpointError(f"holds {len(files)} safetensors files but no index", where=str(path),
                              fix=f"download {_STEM}.safetensors.index.json, or keep one file")
    return [read_safetensors_header(files[0])]


def _known_checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 per tensor that our own manifest recorded; empty for foreign folders."""
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return {name: int(crc, 16) for name, crc in manifest.get("tensors", {}).items()}


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare all file sizes and the content of small files with the manifest.

    Files of weights are compared tensor by tensor while they are read.
    """
    for name, record in manifest["files"].items():
        file = confined(folder, name)
        size = file.stat().st_size if file.is_file() else None
        if size != record["size"]:
            raise CheckpointError(f"{'is missing' if size is None else f'has {size} bytes'}; the manifest says "
                                  f"{record['size']}", where=str(file), fix="the folder is damaged; copy it again")
        if file.suffix not in _WEIGHTS and hash_file(file, full=False).crc32 != record["crc32"]:
            raise CheckpointError("its content does not match the checksum of the manifest", where=str(file),
                                  fix="the folder is damaged; copy it again")


def _check_layout(found: Mapping[str, StoredTensor], names: Names, path: Path) -> None:
    seen = name_layout(found)
    if seen is not None and seen != names:
        label, verb = _OTHER["hf"] if seen == "original" else _OTHER["original" if seen == "hf" else "mm"]
        raise CheckpointError(f"these weights are in the {label}", where=str(path), fix=f"use mm-convert {verb}")
    if seen is None:
        raise CheckpointError("these are not the weights of a Wan DiT", where=str(path),
                              fix="point at transformer/, transformer_2/, high_noise_model/ or low_noise_model/")


def _config(folder: Path | None, names: Names, found: Mapping[str, StoredTensor], where: Path,
            hint: WanConfig | None) -> WanConfig:
    path = folder / "config.json" if folder else None
    if path is None or not path.is_file():
        return infer_config(rename_partial(found, names), where, hint)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        check_numbers(raw)
        if names == "hf":
            return WanConfig.from_diffusers(raw, where=str(path))
        config = WanConfig.from_original(raw, where=str(path))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ConfigError, OSError) as error:
        raise CheckpointError(f"cannot be used ({error})", where=str(path), fix="download config.json again") from None
    image, position = found.get("img_emb.proj.0.weight"), found.get("img_emb.emb_pos")
    return config.with_changes(image_dim=image.shape[0] if image else None,
                               pos_embed_len=position.shape[1] if position and len(position.shape) == 3 else None)


# ---- writing -------------------------------------------------------------------------------------------------


def lay_out(weights: Weights, names: Names, code: str | None, max_shard: int) -> Layout:
    """Return the files of one expert folder: shards of at most ``max_shard`` bytes, the index, config.json."""
    config = weights.card.config
    slices = [Slice(p.name(names), t := weights.tensors[p.mm], Box.whole(t.shape), code or t.output_code)
              for p in parameter_table(config)]
    shards = _split(slices, max_shard)
    files, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = f"{_STEM}.safetensors" if single else f"{_STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(name, (Constant(_header(shard)), *shard)))
        weight_map.update(dict.fromkeys((s.name for s in shard), name))
    if len(shards) > 1:
        total = sum(s.size for s in slices)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.append(_json(f"{_STEM}.safetensors.index.json", index))
    files.append(_json("config.json", config.to_diffusers() if names == "hf" else config.to_original()))
    return Layout(files, {"": weights.card})


def _json(name: str, value: Any) -> OutputFile:
    return OutputFile(name, (Constant((json.dumps(value, indent=2) + "\n").encode()),))


def _split(slices: Iterable[Slice], limit: int) -> list[list[Slice]]:
    shards: list[list[Slice]] = [[]]
    room = limit
    for item in slices:
        if shards[-1] and item.size > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item.size
    return shards


def _header(shard: list[Slice]) -> bytes:
    """The safetensors header: length, then JSON padded so that tensors start at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in shard:
        table[item.name] = {"dtype": item.code, "shape": list(item.box.sizes), "data_offsets": [at, at + item.size]}
        at += item.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
