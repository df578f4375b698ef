"""Open weights that came from anywhere: no code runs, no file outside the folder is read, no byte is trusted.

``safe_torch_load`` reads ``.pt``/``.pth`` files, ``read_dcp_metadata`` a DCP folder's ``.metadata`` (a raw pickle
that plain ``dcp.load`` would execute), ``read_safetensors_header`` the table of a safetensors file, and
``read_safetensors_index`` the index of a sharded one. All of them refuse, with one clear line, what is truncated,
what points outside its folder, and the things that stand in for weights after a failed download: empty files, git
LFS pointers and HTML pages. torch is imported only where torch objects are returned.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.checkpoint.manifest import confined
from mindspeed_wan.checkpoint.torch_file import DTYPES, SafeUnpickler, TensorRef, TorchFile, read_torch_file
from mindspeed_wan.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_NAME = ".metadata"
_MAX_HEADER = 100 << 20
_MAX_METADATA = 1 << 30


# ---- stand-ins -----------------------------------------------------------------------------------------------


def refuse_stand_in(path: str | os.PathLike[str]) -> None:
    """Raise ``CheckpointError`` when ``path`` is missing, empty, a git-lfs pointer or a web page."""
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe would be waited for
            raise CheckpointError("is not a regular file", where=str(path))
        size = found.st_size
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if size == 0:
        raise CheckpointError("the file is empty (0 bytes)", where=str(path), fix="download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"a git-lfs pointer ({size} bytes), not the weights", where=str(path),
                              fix="run 'git lfs pull' in its folder, or download it with huggingface-cli/modelscope")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"a web page ({size} bytes), not the weights: a failed download", where=str(path),
                              fix="download it again; the server answered with an error or a login page")


# ---- torch.save files ----------------------------------------------------------------------------------------


def safe_torch_load(path: str | os.PathLike[str], mmap: bool = True) -> Any:
    """Load a ``torch.save`` file on the CPU; stricter than ``torch.load(weights_only=True)``.

    Args:
        path: a zip-format ``.pt``/``.pth`` file (torch >= 1.6).
        mmap: map the file instead of reading it; tensors are then read page by page on first use (copy on write).

    Returns:
        The saved object. Objects of training programs (``args`` and the like) are inert ``torch_file.Opaque``.
    """
    import torch

    path = Path(path)
    refuse_stand_in(path)
    parsed = read_torch_file(path)
    if mmap:
        whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    else:
        whole = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).untyped_storage()
    storages: dict[str, Any] = {}

    def build(ref: TensorRef) -> torch.Tensor:
        record = ref.storage.record
        storage = storages.setdefault(ref.storage.key, whole[record.offset:record.offset + record.size])
        dtype = getattr(torch, DTYPES[ref.code][0])
        return torch.empty(0, dtype=dtype).set_(storage, ref.storage_offset, ref.shape, ref.stride)

    try:
        return _replace_refs(parsed.root, build)
    except RecursionError:
        raise CheckpointError("refused: its objects are nested without end", where=str(path)) from None


def _replace_refs(value: Any, build: Any) -> Any:
    """Return ``value`` with every ``TensorRef`` inside dicts, lists and tuples replaced by ``build(ref)``."""
    if isinstance(value, TensorRef):
        return build(value)
    if isinstance(value, dict):
        return {key: _replace_refs(item, build) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace_refs(item, build) for item in value)
    return value


def open_torch_file(path: str | os.PathLike[str]) -> TorchFile:
    """``read_torch_file`` after the stand-in check; tensors stay unread ``TensorRef`` values."""
    refuse_stand_in(path)
    return read_torch_file(path)


# ---- DCP metadata --------------------------------------------------------------------------------------------

_DCP_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", *(name for name, _ in DTYPES.values())),
}
_PATH_NAMES = [(module, name) for module in ("pathlib", "pathlib._local")
               for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")]


class _MetadataUnpickler(SafeUnpickler):
    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream, path, _dcp_names())

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError("refused: its pickle holds a persistent id", where=str(self._path))


def _dcp_names() -> dict[tuple[str, str], Any]:
    import collections
    import importlib

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch.serialization", "_get_layout"): _layout,
        ("builtins", "set"): set, ("builtins", "frozenset"): frozenset,
    }
    for module, members in _DCP_NAMES.items():
        loaded = importlib.import_module(module)
        names.update({(module, member): getattr(loaded, member) for member in members if hasattr(loaded, member)})
    names.update({key: _plain_path for key in _PATH_NAMES})
    return names


def _layout(name: str) -> Any:
    import torch

    if name != "torch.strided":
        raise ValueError(f"layout {name!r}")
    return torch.strided


def _plain_path(*parts: str) -> str:
    """A path in the metadata is a note about where it was saved; a string is enough and works on every system."""
    return "/".join(str(part) for part in parts)


def read_dcp_metadata(folder: str | os.PathLike[str]) -> Metadata:
    """Return the ``Metadata`` of a DCP folder, unpickled through an allowlist and checked.

    Checked: every storage file lies inside the folder and is long enough for the chunks in it (so a truncated or
    missing file is found before anything is read), and chunks lie inside their tensors.

    Args:
        folder: the folder that holds ``.metadata``, or the path of that file.

    Raises:
        CheckpointError: missing, damaged, or asking for a class that DCP metadata does not need.
    """
    folder = Path(folder)
    path = folder if folder.name == METADATA_NAME else folder / METADATA_NAME
    folder = path.parent
    if not path.is_file():
        raise CheckpointError("the DCP metadata file is missing: not a complete DCP checkpoint", where=str(path),
                              fix="point at the folder that holds .metadata (release/ or iter_*/)")
    refuse_stand_in(path)
    if path.stat().st_size > _MAX_METADATA:
        raise CheckpointError("larger than any real DCP metadata", where=str(path))
    with open(path, "rb") as stream:
        metadata = _MetadataUnpickler(stream, path).load_safely()
    try:
        _check_metadata(metadata, folder, path)
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"damaged DCP metadata ({error})", where=str(path)) from None
    return metadata  # type: ignore[no-any-return]


def _check_metadata(metadata: Any, folder: Path, path: Path) -> None:
    from torch import dtype
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("not a Metadata object with storage data")
    sizes: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if name not in sizes:
            file = confined(folder, name)
            if not file.is_file():
                raise CheckpointError("a storage file of this checkpoint is missing", where=str(file),
                                      fix="copy the whole folder again")
            sizes[name] = file.stat().st_size
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise CheckpointError(f"truncated: {sizes[name]} bytes, but {index.fqn!r} ends at "
                                  f"{info.offset + info.length}", where=str(folder / name), fix="copy it again")
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(name, str) or not isinstance(entry.properties.dtype, dtype):
                raise ValueError(f"the entry of {name!r} is not a tensor's")
            _check_chunks(name, entry)


def _check_chunks(name: str, entry: Any) -> None:
    for chunk in entry.chunks:
        fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
            offset >= 0 and size >= 0 and offset + size <= whole
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
        if not fits:
            raise ValueError(f"a chunk of {name!r} lies outside the tensor")


# ---- safetensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafeTensor:
    """One tensor of a safetensors file: dtype code, shape, and its first and last-plus-one byte in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafeTensorsFile:
    """The checked table of a safetensors file."""

    path: Path
    tensors: Mapping[str, SafeTensor]
    metadata: Mapping[str, str]


def read_safetensors_header(path: str | os.PathLike[str]) -> SafeTensorsFile:
    """Return the table of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: a stand-in, truncated, a header larger than the file, a name given twice, an unknown dtype,
            or byte ranges that overlap, leave gaps or disagree with the shapes.
    """
    path = Path(path)
    refuse_stand_in(path)
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _MAX_HEADER) or length < 2:
            raise CheckpointError(f"not a safetensors file, or truncated: header of {length} bytes in {size}",
                                  where=str(path), fix="download it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_doubled)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _safe_tensor(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"damaged safetensors header ({error})", where=str(path),
                              fix="download it again") from None
    _check_coverage(path, tensors, 8 + length, size)
    return SafeTensorsFile(path, tensors, metadata)


def _safe_tensor(entry: Mapping[str, Any], base: int) -> SafeTensor:
    code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in DTYPES:
        raise ValueError(f"unknown dtype {code!r}")
    if any(not isinstance(n, int) or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape}, offsets {start, stop}")
    if math.prod(shape) * DTYPES[code][1] != stop - start:
        raise ValueError(f"shape {list(shape)} of {code} does not take {stop - start} bytes")
    return SafeTensor(code, shape, base + start, base + stop)


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return result


def _check_coverage(path: Path, tensors: Mapping[str, SafeTensor], base: int, size: int) -> None:
    end = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise CheckpointError("damaged safetensors header: byte ranges overlap or leave gaps", where=str(path))
        end = tensor.stop
    if end != size:
        state = "truncated" if end > size else "too long"
        raise CheckpointError(f"{state}: has {size} bytes, its header describes {end}", where=str(path),
                              fix="download it again")


def read_safetensors_index(path: str | os.PathLike[str]) -> dict[str, SafeTensorsFile]:
    """Read ``*.safetensors.index.json`` and every shard's table; return shard file name -> table.

    Each shard must be a plain file name inside the folder; the tensors of the shards and of the index must agree.
    """
    path = Path(path)
    refuse_stand_in(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_doubled)["weight_map"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items()):
            raise ValueError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"damaged index ({error})", where=str(path), fix="download it again") from None
    shards: dict[str, SafeTensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name) or "\\" in name or ":" in name:
            raise CheckpointError(f"shard name {name!r} leads outside the folder", where=str(path))
        file = confined(path.parent, name)
        if not file.is_file():
            raise CheckpointError(f"shard {name!r} is missing", where=str(path), fix="download the missing shard")
        shards[name] = read_safetensors_header(file)
    _check_index(path, weight_map, shards)
    return shards


def _check_index(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, SafeTensorsFile]) -> None:
    holders: dict[str, str] = {}
    for shard, table in shards.items():
        for name in table.tensors:
            if name in holders:
                raise CheckpointError(f"tensor {name!r} is in both {holders[name]} and {shard}", where=str(path))
            holders[name] = shard
    wrong = [n for n in sorted({*holders, *weight_map}) if holders.get(n) != weight_map.get(n)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"the index puts {len(wrong)} tensors elsewhere than the shards do; {name!r}: index says "
                              f"{weight_map.get(name)}, found in {holders.get(name)}", where=str(path),
                              fix="download index and shards of one revision")


