"""torch.distributed.checkpoint folders: ``release|iter_*/{.metadata,__*_0.distcp}`` with keys ``model.<mm name>``.

Written here without torch's planner: every tensor is a chunk of its own, a ``torch.save`` container inside a
``.distcp`` file, as ``FileSystemWriter`` stores it, and ``.metadata`` is pickled from torch's own classes; plain
``dcp.load`` and MindSpeed-MM's ``--ckpt-format torch_dcp`` read it in any parallel layout. Read are folders of any
writer and sharding, model weights only, training state left aside.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from mindspeed_wan.checkpoint.safe_load import METADATA_NAME, read_dcp_metadata
from mindspeed_wan.checkpoint.torch_file import TORCH_TO_CODE, TensorRef, read_torch_file
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan_converters.checks import infer_config, name_layout, rename_partial, rename_to_mm
from mindspeed_wan_converters.formats.root import locate, read_card
from mindspeed_wan_converters.plan import Card, Constant, Layout, OutputFile, Part, Slice, Weights
from mindspeed_wan_converters.tensors import Box, Chunk, StoredTensor
from mindspeed_wan_converters.torch_zip import pickled_float, pickled_tensor, torch_file_parts, total_size

_NOT_MODEL = ("optimizer", "optim", "ema", "lr_scheduler", "rng_state", "opt_param_scheduler")


# ---- reading -------------------------------------------------------------------------------------------------


def read(path: Path, expert: str | None = None, hint: WanConfig | None = None) -> Weights:
    """Read the model weights of a DCP checkpoint root or folder; optimizer and other state is not touched."""
    folder = locate(path)
    metadata = read_dcp_metadata(folder)
    prefix = _model_prefix([k for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")], folder)
    found = _chunks(metadata, folder, prefix)
    names = name_layout(found) or "mm"
    card = read_card(folder)
    base = card.config if card else hint
    config = infer_config(found if names == "mm" else rename_partial(found, names), folder, base)
    if card is not None and card.config != config:
        raise CheckpointError("wan.json describes another architecture than the weights have", where=str(folder))
    tensors = rename_to_mm(found, config, names, folder)
    card = Card(config, card.expert or expert, card.boundary, card.shift) if card else Card(config, expert)
    files = {chunk.path for tensor in tensors.values() for chunk in tensor.chunks}
    return Weights(path, "dcp", card, tensors, f"{len(files)} file{'s' if len(files) > 1 else ''}")


def _model_prefix(keys: list[str], folder: Path) -> str:
    """Return what stands before the parameter names: ``model.`` in training checkpoints, perhaps nothing in others."""
    marker = "patch_embedding.weight"
    prefixes = [k[: -len(marker)] for k in keys if k.endswith(marker)]
    prefixes = [p for p in prefixes if p.split(".")[0] not in _NOT_MODEL]
    if "model." in prefixes:
        return "model."
    if len(prefixes) == 1:
        return prefixes[0]
    state = f"several models: {', '.join(prefixes)}" if prefixes else "no Wan DiT"
    raise CheckpointError(f"holds {state}", where=str(folder), fix="point at a DCP checkpoint of one expert")


def _chunks(metadata: Any, folder: Path, prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors below ``prefix`` with every chunk located inside its ``.distcp`` file."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    found: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        streams: dict[Path, IO[bytes]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not key.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
                continue
            code = TORCH_TO_CODE.get(str(entry.properties.dtype).removeprefix("torch."), str(entry.properties.dtype))
            chunks = []
            for chunk in entry.chunks:
                box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
                info = stored.get((key, box.offsets))
                if info is None:
                    raise CheckpointError(f"a part of tensor {key!r} is missing", where=str(folder),
                                          fix="the checkpoint is incomplete; use another iteration")
                path = folder / info.relative_path
                if path not in streams:
                    streams[path] = stack.enter_context(open(path, "rb"))
                chunks.append(_locate_chunk(key, code, box, path, info, streams[path]))
            name = key[len(prefix):]
            found[name] = StoredTensor(name, code, tuple(entry.size), tuple(chunks))
    return found


def _locate_chunk(key: str, code: str, box: Box, path: Path, info: Any, stream: IO[bytes]) -> Chunk:
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"tensor {key!r} is stored with {info.transform_descriptors}", where=str(path),
                              fix="save the checkpoint without stream extensions")
    ref = read_torch_file(path, start=info.offset, length=info.length, stream=stream).root
    if not isinstance(ref, TensorRef) or ref.code != code or ref.shape != box.sizes:
        found = f"{ref.code} {list(ref.shape)}" if isinstance(ref, TensorRef) else type(ref).__name__
        raise CheckpointError(f"tensor {key!r} should be {code} {list(box.sizes)} here, found {found}", where=str(path),
                              fix="files and metadata are not of one checkpoint")
    if not ref.is_contiguous:
        raise CheckpointError(f"tensor {key!r} is not stored contiguously", where=str(path),
                              fix="save it again with .contiguous()")
    record = ref.storage.record
    whole = ref.storage_offset == 0 and ref.nbytes == record.size
    return Chunk(path, ref.offset, box, record.crc32 if whole else None)


# ---- writing -------------------------------------------------------------------------------------------------


def lay_out(weights: Weights, code: str | None, max_file: int) -> Layout:
    """Return the files of a DCP checkpoint root: ``release/`` with files of at most ``max_file`` bytes, the tracker."""
    slices = [Slice(f"model.{p.mm}", t := weights.tensors[p.mm], Box.whole(t.shape), code or t.output_code)
              for p in parameter_table(weights.card.config)]
    groups: list[list[Part]] = [[]]
    counts, sizes = [0], [0]
    places: dict[str, tuple[int, int, int]] = {}
    for item in slices:
        if counts[-1] and sizes[-1] + item.size > max_file:
            groups.append([])
            counts.append(0)
            sizes.append(0)
        parts = torch_file_parts(pickled_tensor(item, 0), [item], first_slice=counts[-1])
        length = total_size(parts)
        places[item.name] = (len(groups) - 1, sizes[-1], length)
        groups[-1] += parts
        counts[-1] += 1
        sizes[-1] += length
    version = torch_file_parts(pickled_float(3.0), [])
    places["checkpoint_version"] = (len(groups) - 1, sizes[-1], total_size(version))
    groups[-1] += version
    files = [OutputFile(f"release/{_file_name(i)}", tuple(parts)) for i, parts in enumerate(groups)]
    files.append(OutputFile(f"release/{METADATA_NAME}", (Constant(_metadata(slices, places)),)))
    return Layout(files, {"release": weights.card}, [""])


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"


def _metadata(slices: list[Slice], places: Mapping[str, tuple[int, int, int]]) -> bytes:
    """Pickle torch's ``Metadata`` for the files laid out."""
    import torch
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as m

    dtypes = {code: getattr(torch, name) for name, code in TORCH_TO_CODE.items() if hasattr(torch, name)}
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for item in slices:
        origin, sizes = torch.Size([0] * len(item.box.sizes)), torch.Size(item.box.sizes)
        entries[item.name] = m.TensorStorageMetadata(
            m.TensorProperties(dtype=dtypes[item.code]), sizes, [m.ChunkStorageMetadata(origin, sizes)])
        storage[m.MetadataIndex(item.name, origin, 0)] = _place(filesystem, places[item.name])
    entries["checkpoint_version"] = m.BytesStorageMetadata()
    storage[m.MetadataIndex("checkpoint_version")] = _place(filesystem, places["checkpoint_version"])
    planner = {item.name: ("model", item.name.removeprefix("model.")) for item in slices}
    planner["checkpoint_version"] = ("checkpoint_version",)  # type: ignore[assignment]
    return pickle.dumps(m.Metadata(entries, planner_data=planner, storage_data=storage), protocol=4)


def _place(filesystem: Any, place: tuple[int, int, int]) -> Any:
    number, offset, length = place
    return filesystem._StorageInfo(_file_name(number), offset, length)
