"""Which kind of weights a path holds, and opening them as ``TensorFiles`` under MindSpeed-MM's parameter names.

Understood: a Diffusers expert folder (``transformer/``), Wan-AI's own folder (``high_noise_model/``), a checkpoint
root (tracker, ``release`` or ``iter_*``) or one folder of it, holding DCP or ``mp_rank_*`` files, and single
``.safetensors``, ``.pt`` or ``.pth`` files. What is not weights gets an error that names what it is instead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.fp8_files import common_prefix, split_scales
from mindspeed_wan.checkpoint.manifest import RELEASE, TRACKER_NAME, checkpoint_folder
from mindspeed_wan.checkpoint.safe_load import (
    METADATA_NAME,
    SafeTensorsFile,
    read_dcp_metadata,
    read_safetensors_header,
    read_safetensors_index,
)
from mindspeed_wan.checkpoint.stored import Piece, StoredTensor, TensorFiles
from mindspeed_wan.checkpoint.torch_file import DTYPES, TORCH_TO_CODE
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout, by_name

MODEL_CARD = "wan.json"
"""Written into every checkpoint of ours: architecture, task, expert, boundary, shift."""

EXPERT_FOLDERS = {"transformer": "high", "transformer_2": "low", "high_noise_model": "high", "low_noise_model": "low"}
"""Folder names that say which expert they hold (Wan2.2 in the Diffusers and in the original layout)."""
_VIDEOX_CLASS = "Wan2_2Transformer3DModel"
_VIDEOX_FOLDERS = {"transformer": "low", "transformer_2": "high"}
"""VideoX-Fun's A14B pipelines, known by ``_class_name`` in a ``config.json``, are the other way round."""

_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Found:
    """A recognised weight folder or file.

    ``kind``: ``dcp``, ``mp_rank``, ``safetensors`` or ``torch``. ``iteration`` is a number for a training checkpoint
    and ``None`` for weights alone.
    """

    path: Path
    kind: str
    iteration: int | None = None

    @property
    def card(self) -> dict[str, Any]:
        """The content of ``wan.json`` beside the weights; empty when there is none."""
        path = self.path / MODEL_CARD
        if not path.is_file():
            return {}
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot be read ({error})", where=str(path)) from None
        return card if isinstance(card, dict) else {}

    @property
    def expert(self) -> str | None:
        """The expert this holds, as its card or its folder name says; ``None`` when neither does."""
        folders = {**EXPERT_FOLDERS, **_VIDEOX_FOLDERS} if _is_videox(self.path) else EXPERT_FOLDERS
        return self.card.get("expert") or folders.get(self.path.name)


def _is_videox(folder: Path) -> bool:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("_class_name") == _VIDEOX_CLASS


def find(path: str | Path, *, step: int | None = None) -> Found:
    """Recognise ``path``.

    Args:
        path: what ``--load`` or ``--load-base-model`` names.
        step: iteration to take from a checkpoint root instead of the tracker's.

    Raises:
        CheckpointError: missing, empty, a pipeline root, a torn tracker, or nothing that is known.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError("does not exist", where=str(root),
                              fix="set --load to existing weights, or pass --from-scratch for random initialisation")
    if root.is_file():
        return _find_file(root)
    if (root / TRACKER_NAME).exists() or step is not None:
        return _find_folder(checkpoint_folder(root, step))
    return _find_folder(root)


def _find_file(path: Path) -> Found:
    if path.suffix == ".safetensors":
        return Found(path, "safetensors")
    if path.suffix in (".pt", ".pth"):
        return Found(path, "torch")
    raise CheckpointError("is not a weight file (.safetensors, .pt, .pth)", where=str(path))


def _find_folder(folder: Path) -> Found:
    match = _ITERATION.fullmatch(folder.name)
    iteration = int(match.group(1)) if match else None
    if (folder / METADATA_NAME).exists():
        return Found(folder, "dcp", iteration)
    if any(folder.glob("mp_rank_*")):
        return Found(folder, "mp_rank", iteration)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return Found(folder, "safetensors")
    raise _unrecognised(folder)


def _unrecognised(folder: Path) -> CheckpointError:
    """Say what a folder without weights is."""
    inside = sorted(p.name for p in folder.iterdir())
    experts = [name for name in EXPERT_FOLDERS if (folder / name).is_dir()]
    if experts:
        choices = ", ".join(f"{name}/ ({EXPERT_FOLDERS[name]} expert)" for name in experts)
        return CheckpointError("is the root of a pipeline, not one expert", where=str(folder),
                               fix=f"load one of {choices}")
    if not inside:
        return CheckpointError("the folder is empty", where=str(folder), fix="download or convert the weights again")
    checkpoints = [name for name in inside if name == RELEASE or _ITERATION.fullmatch(name)]
    if checkpoints:
        return CheckpointError(f"has no {TRACKER_NAME} to say which of {', '.join(checkpoints[:5])} is complete",
                               where=str(folder), fix=f"load {folder / checkpoints[-1]} itself, or write the tracker")
    return CheckpointError(f"holds no weights; it has {', '.join(inside[:8])}", where=str(folder),
                           fix="give a transformer/ folder with safetensors, or a checkpoint root with a tracker")


# ---- opening -------------------------------------------------------------------------------------------------


def open_weights(found: Found, config: WanConfig) -> TensorFiles:
    """Open the model weights of ``found`` under MM names; nothing but the files' tables is read.

    Args:
        found: from :func:`find`.
        config: the architecture that is to be loaded: its table translates the other layouts' names and says how
            ``mp_rank`` shards join.
    """
    if found.kind == "dcp":
        return open_dcp(found.path, prefix="model.")
    if found.kind in ("mp_rank", "torch"):
        from mindspeed_wan.checkpoint.megatron import open_mp_ranks

        return open_mp_ranks(found.path, config)
    return _open_safetensors(found.path, config)


def open_dcp(folder: Path, *, prefix: str = "") -> TensorFiles:
    """Open the tensors of a DCP folder whose keys start with ``prefix``, which is cut from their names."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = read_dcp_metadata(folder)
    chunks = {(name, tuple(chunk.offsets)): tuple(chunk.sizes)
              for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
              for chunk in entry.chunks if name.startswith(prefix)}
    tensors: dict[str, StoredTensor] = {}
    for index, info in metadata.storage_data.items():
        if index.offset is None or (index.fqn, tuple(index.offset)) not in chunks:
            continue  # Megatron's args and versions are bytes entries; other prefixes are not asked for
        entry: Any = metadata.state_dict_metadata[index.fqn]
        origin = tuple(index.offset)
        code = TORCH_TO_CODE.get(str(entry.properties.dtype).removeprefix("torch."))
        if code is None:
            raise CheckpointError(f"tensor {index.fqn!r} has dtype {entry.properties.dtype}", where=str(folder))
        piece = Piece(folder / info.relative_path, info.offset, code, origin, chunks[index.fqn, origin], info.length)
        tensors.setdefault(index.fqn[len(prefix):], StoredTensor(tuple(entry.size))).pieces.append(piece)
    return TensorFiles(tensors, folder)


def _open_safetensors(path: Path, config: WanConfig) -> TensorFiles:
    stored = _stored_tensors(path)
    kept, scales = split_scales(stored, path)
    for name, scale in scales.items():
        kept[name].scale = scale
    layout = recognise_layout(kept)
    known = by_name(config, layout)
    return TensorFiles({known[name].mm if name in known else name: tensor for name, tensor in kept.items()}, path)


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file or folder by its own name, without the prefix that all carry."""
    tables = list(_safetensors_tables(path))
    prefix = common_prefix(name for table in tables for name in table.tensors)
    tensors: dict[str, StoredTensor] = {}
    for table in tables:
        for full_name, entry in table.tensors.items():
            name = full_name.removeprefix(prefix)
            if name in tensors:
                raise CheckpointError(f"tensor {full_name!r} is in two files", where=str(path),
                                      fix="keep one set of shards in the folder")
            piece = Piece(table.path, entry.start, entry.code, (0,) * len(entry.shape), entry.shape)
            tensors[name] = StoredTensor(entry.shape, [piece])
    return tensors


def _safetensors_tables(path: Path) -> Iterable[SafeTensorsFile]:
    if path.is_file():
        return [read_safetensors_header(path)]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"holds {len(indices)} index files", where=str(path), fix="keep one set of shards")
    if indices:
        return read_safetensors_index(indices[0]).values()
    return [read_safetensors_header(file) for file in sorted(path.glob("*.safetensors"))]


def recognise_layout(names: Iterable[str]) -> Layout:
    """Return the layout that a file's tensor names are written in."""
    seen = set(names)
    if any(name.startswith("condition_embedder.") or ".attn1." in name for name in seen):
        return "hf"
    if any(".proj_q." in name for name in seen):
        return "mm"
    return "original"


# ---- checking ------------------------------------------------------------------------------------------------


def check_names_and_shapes(files: TensorFiles, wanted: Mapping[str, tuple[int, ...]], config: WanConfig) -> None:
    """Require exactly the wanted tensors with the wanted shapes.

    Raises:
        CheckpointError: naming the task when it is the wrong one, else up to ten names that miss, are too many or
            have another shape.
    """
    _check_task(files, config)
    missing = [name for name in wanted if name not in files.tensors]
    unknown = [name for name in files.tensors if name not in wanted]
    wrong = [f"{name} is {list(files.tensors[name].shape)}, the model needs {list(shape)}"
             for name, shape in wanted.items() if name in files.tensors and files.tensors[name].shape != shape]
    problems = [f"{len(found)} {label}: {', '.join(found[:10])}{' ...' if len(found) > 10 else ''}"
                for label, found in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)) if found]
    if problems:
        raise CheckpointError("does not hold this model: " + "; ".join(problems), where=str(files.where),
                              fix="check that --mm-model describes these weights (layers, sizes, task)")
    values = {name: math.prod(shape) for name, shape in wanted.items()}
    fp8 = {name for name in wanted if files.tensors[name].is_fp8}
    # fp8 is a way to publish a whole expert; a few such tensors among others are damage.
    published = 2 * sum(values[name] for name in fp8) > sum(values.values())
    bad = [name for name in wanted if not (published and name in fp8)
           and DTYPES[files.tensors[name].code][0] not in ("float32", "bfloat16", "float16")]
    if bad:
        raise CheckpointError(f"tensor {bad[0]!r} is {files.tensors[bad[0]].code}; weights are fp32, bf16 or fp16, or "
                              "fp8 as a whole", where=str(files.where),
                              fix="use the bf16 or fp8 release of these weights")


def _check_task(files: TensorFiles, config: WanConfig) -> None:
    patch = files.tensors.get("patch_embedding.weight")
    if patch is None or len(patch.shape) != 5 or patch.shape[1] == config.in_channels:
        return
    names = {16: "T2V", 36: "I2V"}
    raise CheckpointError(
        f"these are {names.get(patch.shape[1], 'other')} weights ({patch.shape[1]} input channels), but the model "
        f"configuration is {names.get(config.in_channels, 'for')} ({config.in_channels} input channels)",
        where=str(files.where), fix="load weights of the same task, or use that task's model.json",
    )


def check_expert(found: Found, expert: str | None) -> None:
    """Refuse weights of the other expert than the one that is to be trained."""
    if expert and found.expert and found.expert != expert:
        raise CheckpointError(f"holds the {found.expert}-noise expert, but the {expert}-noise expert is to be trained",
                              where=str(found.path),
                              fix=f"load the {expert} expert, or train with the {found.expert} expert's model.json")
