"""MindSpeed-MM's own files: ``mp_rank_TT/model_optim_rng.pt``, one per tensor rank, holding ``{"model": ...}``.

Read as one model whatever the number of shards (the parameter table says on which axis they join); pipeline splits
are refused with the converter's command, which joins them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.safe_load import open_torch_file
from mindspeed_wan.checkpoint.stored import Piece, StoredTensor, TensorFiles
from mindspeed_wan.checkpoint.torch_file import TensorRef
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Param, by_name

FILE_NAME = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")


def open_mp_ranks(path: Path, config: WanConfig) -> TensorFiles:
    """Open ``path``: a folder of ``mp_rank_*`` folders, or one ``.pt`` file with a model in it."""
    files = [path] if path.is_file() else rank_files(path)
    shards = [_model_tensors(file) for file in files]
    table = by_name(config, "mm")
    tensors: dict[str, StoredTensor] = {}
    for name in shards[0]:
        parts = [(file, shard.get(name)) for file, shard in zip(files, shards)]
        absent = [file for file, ref in parts if ref is None]
        if absent:
            raise CheckpointError(f"tensor {name!r} is missing here but present in rank 0's file",
                                  where=str(absent[0]), fix="the shards are not of one checkpoint; convert again")
        tensors[name] = _join(name, [(f, r) for f, r in parts if r is not None], table.get(name))
    return TensorFiles(tensors, path)


def rank_files(folder: Path) -> list[Path]:
    """Return the file of every tensor-parallel rank, in rank order; refuses gaps and pipeline splits."""
    ranks: dict[int, Path] = {}
    for entry in folder.glob("mp_rank_*"):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise CheckpointError(f"{entry.name!r} is not an mp_rank folder", where=str(folder))
        if match.group(2) is not None:
            raise CheckpointError("is split for pipeline parallelism", where=str(entry),
                                  fix="join the stages first: mm-convert WanConverter resplit")
        ranks[int(match.group(1))] = entry / FILE_NAME
    if sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"has mp_rank folders {sorted(ranks)}: one is missing", where=str(folder))
    return [ranks[i] for i in range(len(ranks))]


def _model_tensors(path: Path) -> dict[str, TensorRef]:
    """Return name -> tensor reference of the file's model (``{"model": sd}``, or a bare state dict)."""
    root: Any = open_torch_file(path).root
    if isinstance(root, Mapping) and "model0" in root:
        raise CheckpointError("is split into virtual pipeline chunks (model0, model1 ...)", where=str(path),
                              fix="join them first: mm-convert WanConverter resplit")
    model = root.get("model", root) if isinstance(root, Mapping) else None
    if not isinstance(model, Mapping):
        raise CheckpointError("holds no state dict", where=str(path))
    tensors = {str(k): v for k, v in model.items() if isinstance(v, TensorRef)}
    if not tensors:
        raise CheckpointError("holds no tensors", where=str(path))
    strided = next((k for k, v in tensors.items() if not v.is_contiguous), None)
    if strided is not None:
        raise CheckpointError(f"tensor {strided!r} is not contiguous", where=str(path),
                              fix="save it again with .contiguous()")
    return tensors


def _join(name: str, parts: list[tuple[Path, TensorRef]], param: Param | None) -> StoredTensor:
    """Lay the shards of one tensor side by side on its tensor-parallel axis; replicated ones are read from rank 0."""
    axis = param.tp_axis if param is not None else None
    if axis is None or len(parts) == 1:
        parts = parts[:1]
    shape = list(parts[0][1].shape)
    pieces, start = [], 0
    for path, ref in parts:
        origin = [0] * len(ref.shape)
        if axis is not None and len(parts) > 1:
            origin[axis] = start
            start += ref.shape[axis]
        pieces.append(Piece(path, ref.offset, ref.code, tuple(origin), ref.shape))
    if axis is not None and len(parts) > 1:
        shape[axis] = start
    return StoredTensor(tuple(shape), pieces)
