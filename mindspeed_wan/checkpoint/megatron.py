"""MindSpeed-MM's own files: ``mp_rank_TT[_PPP]/model_optim_rng.pt``, one per tensor rank and pipeline stage.

Read as one model whatever the number of shards: the parameter table says on which axis tensor ranks join, and the
blocks of later stages and virtual chunks are numbered on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_VIRTUAL = re.compile(r"model(\d+)")


def open_mp_ranks(path: Path, config: WanConfig) -> TensorFiles:
    """Open ``path``: a folder of ``mp_rank_*`` folders, or one ``.pt`` file with a model in it."""
    stages = [[path]] if path.is_file() else stage_files(path)
    table = by_name(config, "mm")
    tensors: dict[str, StoredTensor] = {}
    first_block = 0
    for files, shards in _slices(stages):
        for name in shards[0]:
            parts = [(file, shard.get(name)) for file, shard in zip(files, shards)]
            absent = [file for file, ref in parts if ref is None]
            if absent:
                raise CheckpointError(f"tensor {name!r} is missing here but present in rank 0's file",
                                      where=str(absent[0]), fix="the shards are not of one checkpoint; convert again")
            whole = _numbered_on(name, first_block)
            if whole in tensors:
                raise CheckpointError(f"tensor {whole!r} is in two pipeline stages", where=str(files[0]))
            tensors[whole] = _join(whole, [(f, r) for f, r in parts if r is not None], table.get(whole))
        blocks = [int(match[1]) for name in shards[0] if (match := _BLOCK.match(name))]
        first_block += max(blocks, default=-1) + 1
    return TensorFiles(tensors, path)


def _numbered_on(name: str, first_block: int) -> str:
    """Return a slice's parameter name with the model's block number."""
    return _BLOCK.sub(lambda match: f"blocks.{int(match[1]) + first_block}.", name)


def stage_files(folder: Path) -> list[list[Path]]:
    """Return the files ``[pipeline stage][tensor rank]``; refuses gaps."""
    ranks: dict[tuple[int, int], Path] = {}
    for entry in folder.glob("mp_rank_*"):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise CheckpointError(f"{entry.name!r} is not an mp_rank folder", where=str(folder))
        ranks[int(match[2] or 0), int(match[1])] = entry / FILE_NAME
    stages, tensor = (1 + max((key[axis] for key in ranks), default=0) for axis in (0, 1))
    if len(ranks) != stages * tensor:
        raise CheckpointError(f"has {len(ranks)} mp_rank folders, not {stages} stages x {tensor} tensor ranks: one is "
                              "missing", where=str(folder))
    return [[ranks[stage, rank] for rank in range(tensor)] for stage in range(stages)]


def _slices(stages: list[list[Path]]) -> Iterator[tuple[list[Path], list[dict[str, TensorRef]]]]:
    """Yield the slices of the model in order, each with its files and tensors by tensor rank.

    Virtual chunk ``v`` of stage ``p`` is slice ``v * stages + p``; block numbers start at 0 in every slice.
    """
    loaded = [[_model_chunks(file) for file in files] for files in stages]
    counts = {len(chunks) for row in loaded for chunks in row}
    if len(counts) != 1:
        raise CheckpointError("ranks hold different numbers of virtual chunks", where=str(stages[0][0]))
    for chunk in range(counts.pop()):
        for files, row in zip(stages, loaded):
            yield files, [chunks[chunk] for chunks in row]


def _model_chunks(path: Path) -> list[dict[str, TensorRef]]:
    """Return the tensors of the file's model (``{"model": sd}``, ``{"model0": .., "model1": ..}`` or a bare dict)."""
    root: Any = open_torch_file(path).root
    chunked = isinstance(root, Mapping) and "model0" in root
    keys = sorted((k for k in root if _VIRTUAL.fullmatch(str(k))), key=lambda k: int(k[5:])) if chunked else []
    return [_tensors(root[key], path) for key in keys] or [
        _tensors(root.get("model", root) if isinstance(root, Mapping) else None, path)]


def _tensors(model: Any, path: Path) -> dict[str, TensorRef]:
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
