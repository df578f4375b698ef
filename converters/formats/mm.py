"""MindSpeed-MM's layout: ``release|iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt`` and the tracker file.

``TT`` is the tensor-parallel rank and ``PPP`` the pipeline stage (absent with one stage). A file holds
``{"model": ...}``, or ``{"model0": ..., "model1": ..., "checkpoint_version": 3.0}`` with virtual stages; virtual chunk
``v`` of stage ``p`` is number ``v * stages + p`` of the model's slices. Block numbers start at 0 in every slice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.safe_load import open_torch_file
from mindspeed_wan.checkpoint.torch_file import TensorRef
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Param, is_head, parameter_table
from mindspeed_wan_converters.checks import infer_config, name_layout, rename_to_mm
from mindspeed_wan_converters.formats.root import locate, read_card
from mindspeed_wan_converters.plan import Card, Layout, OutputFile, Slice, Weights
from mindspeed_wan_converters.tensors import Box, Chunk, StoredTensor
from mindspeed_wan_converters.torch_zip import pickled_dict, pickled_float, pickled_tensor, torch_file_parts

FILE_NAME = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_VIRTUAL = re.compile(r"model(\d+)")


@dataclass(frozen=True)
class Parallel:
    """How an MM checkpoint is cut: ``tp`` ranks, and ``layers[v][p]`` blocks in virtual chunk v of stage p.

    ``layers`` is empty when there is no pipeline; ``blocks`` is then how many blocks the user counted, if any.
    """

    tp: int = 1
    layers: tuple[tuple[int, ...], ...] = ()
    blocks: int | None = field(default=None, compare=False)

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.layers[0]) if self.layers else 1

    @property
    def virtual(self) -> int:
        """Virtual chunks per stage."""
        return len(self.layers) if self.layers else 1

    @classmethod
    def parse(cls, tp: int, pp_layers: Any) -> Parallel:
        """Read MM's ``tp_size`` and ``pp_layers`` (``[]``, ``[10,10]`` or ``[[5,5],[5,5]]``)."""
        where = "--cfg.target_parallel_config.pp_layers"
        if tp < 1:
            raise ConfigError(f"tp_size {tp} is not positive", where="--cfg.target_parallel_config.tp_size")
        if not isinstance(pp_layers, (list, tuple)):
            raise ConfigError(f"{pp_layers!r} is not a list", where=where, fix="write [10,10,10,10] or [[5,5],[5,5]]")
        nested = [list(row) for row in pp_layers if isinstance(row, (list, tuple))]
        rows: list[list[Any]] = nested if len(nested) == len(pp_layers) else [list(pp_layers)]
        counts = [count for row in rows for count in row]
        if any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in counts):
            raise ConfigError(f"{pp_layers!r} must hold positive whole numbers", where=where)
        if len({len(row) for row in rows}) > 1:
            raise ConfigError(f"{pp_layers!r}: every virtual chunk needs the same number of stages", where=where)
        if len(counts) == 1:
            return cls(tp, blocks=counts[0])
        return cls(tp, tuple(tuple(row) for row in rows))

    def check(self, config: WanConfig) -> None:
        """Raise ``ConfigError`` when the layout does not fit the model."""
        total = sum(map(sum, self.layers)) if self.layers else self.blocks
        if total not in (None, config.num_layers):
            raise ConfigError(f"pp_layers adds up to {total} blocks, the model has {config.num_layers}",
                              where="--cfg.target_parallel_config.pp_layers")
        if config.num_heads % self.tp or config.ffn_dim % self.tp:
            legal = [n for n in range(1, config.num_heads + 1) if not config.num_heads % n and not config.ffn_dim % n]
            raise ConfigError(f"tp_size {self.tp} does not divide {config.num_heads} heads and ffn size "
                              f"{config.ffn_dim}; legal: {', '.join(map(str, legal))}",
                              where="--cfg.target_parallel_config.tp_size")

    def describe(self) -> str:
        """Return the layout for people."""
        text = f"TP {self.tp}, PP {self.stages}"
        return f"{text}, VPP {self.virtual}" if self.virtual > 1 else text


# ---- reading -------------------------------------------------------------------------------------------------


def read(path: Path, expert: str | None = None, hint: WanConfig | None = None) -> Weights:
    """Read an MM checkpoint root, one of its ``release``/``iter_*`` folders, or a folder of ``mp_rank_*``."""
    folder = locate(path)
    grid = _rank_grid(folder)
    stages, ranks = len(grid), len(grid[0])
    slices: list[list[dict[str, TensorRef]]] = []  # [slice][tp rank]
    paths: list[list[Path]] = []
    loaded = [[_model_chunks(file) for file in row] for row in grid]
    virtual = {len(chunks) for row in loaded for chunks in row}
    if len(virtual) != 1:
        raise CheckpointError("ranks hold different numbers of virtual chunks", where=str(folder))
    for v in range(virtual.pop()):
        for p in range(stages):
            slices.append([loaded[p][t][v] for t in range(ranks)])
            paths.append([grid[p][t] for t in range(ranks)])
    found, layers = _join_stages(slices, paths, folder)
    joined = {name: _join_ranks(name, parts, folder) for name, parts in found.items()}
    card = read_card(folder)
    config = infer_config(joined, folder, card.config if card else hint)
    if card is not None and card.config != config:
        raise CheckpointError("wan.json describes another architecture than the weights have", where=str(folder))
    tensors = rename_to_mm(joined, config, "mm", folder)
    card = Card(config, card.expert or expert, card.boundary, card.shift) if card else Card(config, expert)
    count = len(layers) // stages
    rows = tuple(tuple(layers[v * stages:(v + 1) * stages]) for v in range(count)) if len(layers) > 1 else ()
    return Weights(path, "mm", card, tensors, Parallel(ranks, rows).describe())


def _rank_grid(folder: Path) -> list[list[Path]]:
    """Return ``[stage][tp rank]`` -> file, after checking that the grid is complete."""
    ranks: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(entry.name)
        if match is None or not entry.is_dir():
            raise CheckpointError(f"{entry.name!r} is not a folder named mp_rank_TT or mp_rank_TT_PPP",
                                  where=str(folder))
        key = (int(match.group(2) or 0), int(match.group(1)))
        if key in ranks:
            raise CheckpointError(f"{entry.name!r} and {ranks[key].parent.name!r} are the same rank", where=str(folder))
        ranks[key] = entry / FILE_NAME
    if not ranks:
        raise CheckpointError("holds no mp_rank_* folder", where=str(folder), fix="point at a MindSpeed-MM checkpoint")
    stages, tp = max(p for p, _ in ranks) + 1, max(t for _, t in ranks) + 1
    absent = [f"TP rank {t}, stage {p}" for p in range(stages) for t in range(tp) if (p, t) not in ranks]
    if absent:
        raise CheckpointError(f"the file of {absent[0]} is missing ({len(absent)} in all)", where=str(folder),
                              fix="copy the whole checkpoint")
    return [[ranks[p, t] for t in range(tp)] for p in range(stages)]


def _model_chunks(path: Path) -> list[dict[str, TensorRef]]:
    """Return the tensors of each virtual chunk in one file (one chunk without VPP)."""
    root = open_torch_file(path).root
    if not isinstance(root, Mapping):
        raise CheckpointError("holds no dict with a model", where=str(path))
    virtual = sorted(int(m.group(1)) for key in root if isinstance(key, str) and (m := _VIRTUAL.fullmatch(key)))
    if "model" in root:
        models: list[Any] = [root["model"]]
    elif virtual and virtual == list(range(len(virtual))):
        models = [root[f"model{i}"] for i in virtual]
    else:
        raise CheckpointError(f"holds no 'model'; it has {', '.join(map(str, list(root)[:6]))}", where=str(path),
                              fix="point at a MindSpeed-MM checkpoint")
    return [_tensors_of(model, path) for model in models]


def _tensors_of(model: Any, path: Path) -> dict[str, TensorRef]:
    if not isinstance(model, Mapping):
        raise CheckpointError("its model is not a state dict", where=str(path))
    tensors = {str(name): value for name, value in model.items() if isinstance(value, TensorRef)}
    for prefix in ("module.", "predictor."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix):]: value for name, value in tensors.items()}
    if not tensors:
        raise CheckpointError("holds no tensors", where=str(path))
    layout = name_layout(tensors)
    if layout not in (None, "mm"):
        raise CheckpointError(f"its tensors have {'Diffusers' if layout == 'hf' else 'original Wan'} names",
                              where=str(path), fix="MindSpeed-MM did not write this file; convert the source again")
    strided = next((name for name, ref in tensors.items() if not ref.is_contiguous), None)
    if strided is not None:
        raise CheckpointError(f"tensor {strided!r} is not contiguous", where=str(path),
                              fix="save it again with .contiguous()")
    return tensors


_Part = tuple[Path, TensorRef]


def _join_stages(slices: Sequence[Sequence[Mapping[str, TensorRef]]], paths: Sequence[Sequence[Path]],
                 folder: Path) -> tuple[dict[str, list[_Part]], list[int]]:
    """Return global name -> (file, tensor) per TP rank, and how many blocks each slice holds."""
    found: dict[str, list[_Part]] = {}
    layers: list[int] = []
    start = 0
    for ranks, files in zip(slices, paths, strict=True):
        names = list(ranks[0])
        if any(set(names) != set(other) for other in ranks):
            odd = next(n for other in ranks for n in set(names) ^ set(other))
            raise CheckpointError(f"TP ranks hold different tensors, e.g. {odd!r}", where=str(folder))
        blocks = {int(n.split(".")[1]) for n in names if re.match(r"blocks\.\d+\.", n)}
        if blocks and blocks != set(range(len(blocks))):
            raise CheckpointError(f"block numbers {sorted(blocks)[:8]} do not start at 0 or have gaps",
                                  where=str(files[0]))
        for name in names:
            pieces = name.split(".")
            whole = ".".join(["blocks", str(int(pieces[1]) + start), *pieces[2:]]) if pieces[0] == "blocks" else name
            if whole in found:
                raise CheckpointError(f"tensor {whole!r} is in two pipeline stages", where=str(files[0]))
            found[whole] = [(file, rank[name]) for file, rank in zip(files, ranks, strict=True)]
        layers.append(len(blocks))
        start += len(blocks)
    return found, layers


_AXES: dict[str, int | None] = {re.sub(r"\d+", "*", p.mm, count=1) if p.block is not None else p.mm: p.tp_axis
                                for p in parameter_table(WanConfig(num_layers=1, image_dim=1280, pos_embed_len=1))}


def _join_ranks(name: str, parts: Sequence[_Part], folder: Path) -> StoredTensor:
    """Lay the shards of one tensor side by side on its TP axis; replicated tensors must agree over the ranks."""
    kind = re.sub(r"\d+", "*", name, count=1) if name.startswith("blocks.") else name
    axis = _AXES.get(kind)
    first = parts[0][1]
    if any(ref.code != first.code or len(ref.shape) != len(first.shape) for _, ref in parts):
        raise CheckpointError(f"tensor {name!r} differs in dtype or rank over the TP ranks", where=str(folder))
    if axis is None or len(parts) == 1:
        if any(ref.shape != first.shape or _crc(ref) != _crc(first) for _, ref in parts):
            raise CheckpointError(f"tensor {name!r} is replicated over TP but its copies differ", where=str(folder),
                                  fix="the ranks are not of one checkpoint; use another iteration")
        parts = parts[:1]
    shape, chunks, at = list(first.shape), [], 0
    for path, ref in parts:
        offsets = [0] * len(ref.shape)
        if axis is not None and len(parts) > 1 and axis < len(offsets):
            offsets[axis] = at
            at += ref.shape[axis]
        chunks.append(Chunk(path, ref.offset, Box(tuple(offsets), ref.shape), _crc(ref)))
    if axis is not None and len(parts) > 1 and axis < len(shape):
        shape[axis] = at
    return StoredTensor(name, first.code, tuple(shape), tuple(chunks))


def _crc(ref: TensorRef) -> int | None:
    """The CRC-32 of the tensor's bytes, when it fills its storage."""
    record = ref.storage.record
    return record.crc32 if ref.storage_offset == 0 and ref.nbytes == record.size else None


# ---- writing -------------------------------------------------------------------------------------------------


def lay_out(weights: Weights, code: str | None, parallel: Parallel) -> Layout:
    """Return the files of an MM checkpoint root: ``release/mp_rank_TT[_PPP]/model_optim_rng.pt`` and the tracker."""
    config = weights.card.config
    parallel.check(config)
    counts = [count for row in parallel.layers for count in row] or [config.num_layers]
    table = parameter_table(config)
    files = []
    for rank in range(parallel.tp):
        for stage in range(parallel.stages):
            models = []
            for v in range(parallel.virtual):
                number = v * parallel.stages + stage
                mine = [p for p in table if _stage_of(p, counts) == number]
                models.append(_model_slices(weights, mine, rank, parallel.tp, code))
            folder = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if parallel.stages > 1 else "")
            files.append(_model_file(f"release/{folder}/{FILE_NAME}", models))
    return Layout(files, {"release": weights.card}, [""])


def _stage_of(param: Param, counts: Sequence[int]) -> int:
    """Return the pipeline slice that holds ``param``: embeddings go first, the head goes last."""
    if param.block is None:
        return len(counts) - 1 if is_head(param) else 0
    return next(n for n in range(len(counts)) if param.block < sum(counts[:n + 1]))


def _model_slices(weights: Weights, params: Sequence[Param], rank: int, tp: int, code: str | None) -> list[Slice]:
    """Return the slices of one TP rank and pipeline slice; blocks are numbered from 0."""
    first = min((p.block for p in params if p.block is not None), default=0)
    result = []
    for param in params:
        name = param.mm
        if param.block is not None:
            name = name.replace(f"blocks.{param.block}.", f"blocks.{param.block - first}.", 1)
        tensor = weights.tensors[param.mm]
        result.append(Slice(name, tensor, _rank_box(param, tensor.shape, rank, tp), code or tensor.output_code))
    return result


def _rank_box(param: Param, shape: tuple[int, ...], rank: int, tp: int) -> Box:
    if param.tp_axis is None or tp == 1:
        return Box.whole(shape)
    sizes, offsets = list(shape), [0] * len(shape)
    sizes[param.tp_axis] //= tp
    offsets[param.tp_axis] = rank * sizes[param.tp_axis]
    return Box(tuple(offsets), tuple(sizes))


def _model_file(name: str, models: Sequence[Sequence[Slice]]) -> OutputFile:
    slices = [item for model in models for item in model]
    keys = iter(range(len(slices)))
    pickled = [pickled_dict({item.name: pickled_tensor(item, next(keys)) for item in model}) for model in models]
    if len(pickled) == 1:
        root = pickled_dict({"model": pickled[0]})
    else:
        root = pickled_dict({**{f"model{v}": value for v, value in enumerate(pickled)},
                             "checkpoint_version": pickled_float(3.0)})
    return OutputFile(name, tuple(torch_file_parts(root, slices, archive=Path(FILE_NAME).stem)))
