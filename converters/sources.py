"""What is this path? One look at file names decides the format; every wrong answer names the right one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import TRACKER_NAME
from mindspeed_wan.checkpoint.safe_load import METADATA_NAME, read_safetensors_header
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.checks import check_expert, check_pair, name_layout
from mindspeed_wan_converters.formats import dcp, hf, mm, original
from mindspeed_wan_converters.formats.root import locate
from mindspeed_wan_converters.plan import Weights

FORMATS = {"hf": "Diffusers", "original": "original Wan", "mm": "MindSpeed-MM", "dcp": "torch DCP"}
READERS: dict[str, Callable[[Path, str | None, WanConfig | None], Weights]] = {
    "hf": hf.read, "original": original.read, "mm": mm.read, "dcp": dcp.read}
_FOLDER_EXPERT = {"transformer": "high", "transformer_2": "low", "high_noise_model": "high", "low_noise_model": "low"}
_VIDEOX_CLASS = "Wan2_2Transformer3DModel"
"""``_class_name`` of VideoX-Fun's A14B weights: original names; in its pipelines ``transformer/`` is the LOW expert."""
_VIDEOX_EXPERT = {"transformer": "low", "transformer_2": "high"}


@dataclass(frozen=True)
class Source:
    """A recognised path: its format, and where each expert lies (key ``None`` for a single, unnamed one)."""

    path: Path
    format: str
    experts: dict[str | None, Path]

    @property
    def is_pipeline(self) -> bool:
        """True when ``path`` holds the experts in subfolders."""
        return any(folder != self.path for folder in self.experts.values())


def recognise(path: Path) -> Source:
    """Return what ``path`` holds.

    Raises:
        CheckpointError: missing, empty, or nothing that is known.
    """
    if "*" in path.name:
        raise ConfigError(f"the pattern {str(path)!r} matches no single folder",
                          fix="name the folder of one expert, or the pipeline folder to convert both")
    if not path.exists():
        raise CheckpointError("does not exist", where=str(path), fix="check the path")
    if path.is_file():
        return _recognise_file(path)
    nested = _experts_below(path)
    if nested is not None:
        return nested
    kind = _folder_format(path)
    if kind is None:
        raise _unknown(path)
    return Source(path, kind, {_own_expert(path): path})


def _recognise_file(path: Path) -> Source:
    if path.suffix != ".safetensors":
        raise CheckpointError("is a single file that is not safetensors", where=str(path),
                              fix="give the folder of the checkpoint; pickled .bin/.pth weights are not read")
    layout = name_layout(read_safetensors_header(path).tensors)
    return Source(path, "original" if layout == "original" else "hf", {None: path})


def _experts_below(path: Path) -> Source | None:
    """Recognise a folder with one subfolder per expert: a pipeline, or what a conversion of one has made."""
    for high, low in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        folders = {name: path / name for name in (high, low) if (path / name).is_dir()}
        if not folders or _folder_format(path) is not None:
            continue
        kinds = {name: _folder_format(folder) for name, folder in folders.items()}
        unknown = next((name for name, kind in kinds.items() if kind is None), None)
        if unknown is not None:
            raise _unknown(folders[unknown])
        if len(set(kinds.values())) > 1:
            raise CheckpointError(f"{' and '.join(f'{n}/ is {FORMATS[str(k)]}' for n, k in kinds.items())}",
                                  where=str(path), fix="both experts must be in one format")
        _require_second_expert(path, high, low)
        if len(folders) == 1:
            (name, folder), = folders.items()
            # Wan2.1 has one DiT in transformer/; a Wan2.2 folder with one expert names it by the folder.
            expert = _FOLDER_EXPERT[name] if name != "transformer" or _is_two_expert_model(path) else None
            return Source(path, str(kinds[name]), {expert: folder})
        if high in _VIDEOX_EXPERT and _class_name(folders[high]) == _VIDEOX_CLASS:
            high, low = low, high
        return Source(path, str(kinds[high]), {"high": folders[high], "low": folders[low]})
    return None


def _require_second_expert(path: Path, high: str, low: str) -> None:
    if _is_two_expert_model(path):
        for name in (high, low):
            if not (path / name).is_dir():
                raise CheckpointError(f"{name}/ is missing, but model_index.json lists it", where=str(path),
                                      fix="download the missing expert, or convert the other folder alone")


def _is_two_expert_model(path: Path) -> bool:
    index = path / "model_index.json"
    if not index.is_file():
        return False
    try:
        entry = json.loads(index.read_text(encoding="utf-8")).get("transformer_2")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _own_expert(path: Path) -> str | None:
    """Return the expert that the folder's own name tells."""
    name = path.resolve().name
    if name == "transformer" and not (path.resolve().parent / "transformer_2").is_dir():
        return None  # Wan2.1, or a lone folder: the name says nothing
    if name in _VIDEOX_EXPERT and _class_name(path) == _VIDEOX_CLASS:
        return _VIDEOX_EXPERT[name]
    return _FOLDER_EXPERT.get(name)


def _folder_format(path: Path) -> str | None:
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return "original" if _has_original_names(path) else "hf"
    folder = path
    if (path / TRACKER_NAME).is_file() or any(path.glob("release")) or any(path.glob("iter_*")):
        folder = locate(path)
    has_dcp, has_mm = (folder / METADATA_NAME).exists(), any(folder.glob("mp_rank_*"))
    if has_dcp and has_mm:
        raise CheckpointError("holds both DCP and mp_rank files, which may differ", where=str(folder),
                              fix="move one of the two away")
    return "dcp" if has_dcp else "mm" if has_mm else "dcp" if any(folder.glob("*.distcp")) else None


def _class_name(folder: Path) -> str | None:
    """Return ``_class_name`` of an expert's ``config.json``, if it has one."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(raw["_class_name"]) if isinstance(raw, dict) and "_class_name" in raw else None


def _has_original_names(path: Path) -> bool:
    name = _class_name(path)
    if name is not None:
        return name in ("WanModel", _VIDEOX_CLASS)
    for file in sorted(path.glob("*.safetensors"))[:1]:
        return name_layout(read_safetensors_header(file).tensors) == "original"
    return False


def _unknown(path: Path) -> CheckpointError:
    inside = sorted(p.name for p in path.iterdir())
    if not inside:
        return CheckpointError("the folder is empty", where=str(path), fix="download or convert the weights again")
    if any(name.endswith((".bin", ".pth", ".gguf")) for name in inside):
        return CheckpointError(f"holds {inside[0]} and no safetensors", where=str(path),
                               fix="use the safetensors release; pickled and quantised weights are not read")
    return CheckpointError(f"holds no weights that are known; it has {', '.join(inside[:6])}", where=str(path),
                           fix="give a Diffusers pipeline or expert folder, a Wan-AI folder, or a checkpoint root")


def read_all(source: Source, wanted: str, expert: str | None, hint: WanConfig | None) -> dict[str | None, Weights]:
    """Read the experts of ``source``, checked against each other.

    Args:
        source: from ``recognise``.
        wanted: the format that the verb reads.
        expert: ``high`` or ``low`` to take one of a pipeline, or to say which one a lone folder holds.
        hint: architecture from ``--cfg.hf_dir``, for what MM and DCP files do not tell.
    """
    if source.format != wanted:
        raise CheckpointError(f"is in the {FORMATS[source.format]} format, but this verb reads {FORMATS[wanted]}",
                              where=str(source.path), fix=f"use mm-convert {source.format}_to_...")
    chosen = _choose(source, expert)
    read = READERS[wanted]
    weights = {name: read(folder, name, hint) for name, folder in chosen.items()}
    for name, found in weights.items():
        check_expert(found, name)
    if len(weights) == 2:
        check_pair(weights["high"], weights["low"])
    return weights


def _choose(source: Source, expert: str | None) -> dict[str | None, Path]:
    if expert is None:
        return source.experts
    if expert in source.experts:
        return {expert: source.experts[expert]}
    if None in source.experts:
        return {expert: source.experts[None]}
    have = ", ".join(str(name) for name in source.experts)
    raise ConfigError(f"has no {expert} expert, only: {have}", where=str(source.path), fix="drop --expert")
