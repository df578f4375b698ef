"""Read ``torch.save`` files without running code from them, and without torch.

A ``.pt`` file is a zip of raw storages plus one pickle that says how they make up tensors. The pickle is read by
an unpickler that knows the dozen names tensors need, turns the objects of training programs (``args`` and the
like) into inert ``Opaque`` values, and refuses every other name. Tensors come back as ``TensorRef``: where their
bytes lie in the file. The zip must be uncompressed and its members must fit the file, so no small file can unfold
into a large one. Written by ``torch.save`` of every torch since 1.6; DCP stores one such file per tensor chunk.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mindspeed_wan.errors import CheckpointError

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
}
"""safetensors' dtype code -> (torch dtype name, bytes per element)."""

TORCH_TO_CODE = {torch_name: code for code, (torch_name, _) in DTYPES.items()}

_STORAGE_CODES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}
_MAX_PICKLE = 256 << 20

# Objects of training programs that ride along in a checkpoint (args, enums, RNG state). They become Opaque: nothing
# of these modules is imported or called. Modules not listed here are refused.
_OPAQUE_MODULES = ("argparse", "megatron", "mindspeed", "mindspeed_mm", "mindspeed_llm", "numpy", "types", "enum",
                   "pathlib", "datetime", "omegaconf", "transformers", "dataclasses", "torch")
# Names inside those modules that only an attack would ask for; torch.* is opaque too, but not its loaders.
_NEVER = frozenset({"load", "eval", "exec", "system", "call", "hub", "runstring", "_load", "execfile", "fromfile",
                    "loadtxt", "genfromtxt", "memmap", "FunctionType", "CodeType", "DynamicClassAttribute"})


@dataclass(frozen=True)
class Record:
    """One member of the zip: where its bytes start in the file, how many, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class StorageRef:
    """A storage: dtype code (``None`` when untyped), and its bytes in the file."""

    code: str | None
    key: str
    record: Record


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read: dtype code, shape and strides in elements, and its storage in the file."""

    code: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    storage: StorageRef

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.code][1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when contiguous."""
        return math.prod(self.shape) * self.itemsize

    @property
    def offset(self) -> int:
        """Position in the file of the first element."""
        return self.storage.record.offset + self.storage_offset * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """True when the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class Opaque:
    """Stands for an object whose class is not loaded; keeps its name, arguments and state for display only."""

    name = "object"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.state = args, kwargs, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items that pickle adds to dict-like objects."""

    def append(self, value: Any) -> None:
        """Accept the items that pickle adds to list-like objects."""

    def extend(self, values: Any) -> None:
        """Accept the items that pickle adds to list-like objects."""

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class TorchFile:
    """A parsed ``torch.save`` file: ``root`` is the saved object with ``TensorRef`` in place of tensors."""

    path: Path
    root: Any
    records: Mapping[str, Record]


class _Window(io.RawIOBase):
    """A byte range of a file as a file of its own (a DCP chunk inside a ``.distcp``)."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def read_torch_file(path: str | os.PathLike[str], *, start: int = 0, length: int | None = None,
                    stream: IO[bytes] | None = None) -> TorchFile:
    """Parse a ``torch.save`` file (or the one at ``[start, start + length)`` of ``path``).

    Args:
        path: the file; used in messages when ``stream`` is given.
        start: where the zip begins.
        length: its size in bytes; to the end of the file by default.
        stream: the file opened for binary reading, to save opening it once per chunk.

    Raises:
        CheckpointError: not a torch zip, truncated, compressed, or its pickle asks for a name that is not allowed.
    """
    path = Path(path)
    if stream is None:
        with open(path, "rb") as opened:
            return read_torch_file(path, start=start, length=length, stream=opened)
    if length is None:
        length = stream.seek(0, os.SEEK_END) - start
    window = _Window(stream, start, length)
    records, pickled = _read_zip(path, window, start, length)
    root = _TensorUnpickler(io.BytesIO(pickled), path, records).load_safely()
    return TorchFile(path, root, records)


def _read_zip(path: Path, window: _Window, start: int, length: int) -> tuple[dict[str, Record], bytes]:
    try:
        archive = zipfile.ZipFile(io.BufferedReader(window))  # type: ignore[arg-type]
        members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"not a readable torch file ({error}); truncated, or saved by torch < 1.6",
                              where=str(path), fix="download or save it again") from None
    total = 0
    records: dict[str, Record] = {}
    for member in members:
        total += member.file_size
        name = member.filename.partition("/")[2]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise _hostile(path, f"member {member.filename!r} is compressed, which torch never does")
        if not name or name in records or ".." in name.split("/"):
            raise _hostile(path, f"member name {member.filename!r} is doubled or not allowed")
        if total > length:
            raise _hostile(path, "its members claim more bytes than the file has")
        offset = _data_offset(path, window, member, length)
        records[name] = Record(start + offset, member.file_size, member.CRC)
    _refuse_overlaps(path, records)
    if "data.pkl" not in records or records["data.pkl"].size > _MAX_PICKLE:
        raise CheckpointError("not a torch checkpoint: data.pkl is missing or too large", where=str(path))
    if records.get("byteorder") is not None:
        _refuse_big_endian(path, window, start, records["byteorder"])
    window.seek(records["data.pkl"].offset - start)
    pickled = window.read(records["data.pkl"].size) or b""
    if zlib.crc32(pickled) != records["data.pkl"].crc32:
        raise CheckpointError("data.pkl does not match its checksum: the file is damaged", where=str(path),
                              fix="download or save it again")
    return records, pickled


def _data_offset(path: Path, window: _Window, member: zipfile.ZipInfo, length: int) -> int:
    window.seek(member.header_offset)
    header = window.read(30) or b""
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"the zip header of {member.filename!r} is damaged", where=str(path),
                              fix="download or save it again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = member.header_offset + 30 + name_length + extra_length
    if offset + member.file_size > length:
        raise CheckpointError(f"member {member.filename!r} runs past the end of the file: truncated",
                              where=str(path), fix="download or save it again")
    return offset


def _refuse_overlaps(path: Path, records: Mapping[str, Record]) -> None:
    end = -1
    for record in sorted((r for r in records.values() if r.size), key=lambda r: r.offset):
        if record.offset < end:
            raise _hostile(path, "its members overlap")
        end = record.offset + record.size


def _refuse_big_endian(path: Path, window: _Window, start: int, record: Record) -> None:
    window.seek(record.offset - start)
    if (window.read(min(record.size, 16)) or b"") != b"little":
        raise CheckpointError("saved on a big-endian machine", where=str(path), fix="save it on a little-endian one")


def _hostile(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"refused: {reason}", where=str(path), fix="do not use this file; get it from its author")


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that resolves only what ``allowed`` names; subclasses decide what the names stand for."""

    def __init__(self, stream: IO[bytes], path: Path, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(stream)
        self._path, self._allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that stands for ``module.name``, or refuse."""
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        return self.missing(module, name)

    def missing(self, module: str, name: str) -> Any:
        """Refuse a name that is not in the list."""
        raise _hostile(self._path, f"its pickle asks for {module}.{name}")

    def get_extension(self, code: int) -> Any:
        """Refuse copyreg extension codes, which name objects by number."""
        raise _hostile(self._path, f"its pickle uses extension code {code}")

    def load_safely(self) -> Any:
        """``load`` with every failure as a ``CheckpointError``."""
        try:
            return self.load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {error})", where=str(self._path),
                                  fix="download or save it again") from None


class _TensorUnpickler(SafeUnpickler):
    def __init__(self, stream: IO[bytes], path: Path, records: Mapping[str, Record]) -> None:
        super().__init__(stream, path, _tensor_names())
        self._records = records

    def missing(self, module: str, name: str) -> Any:
        known = module.partition(".")[0] in _OPAQUE_MODULES and not _NEVER.intersection(name.split("."))
        if not known:
            return super().missing(module, name)
        return type("Opaque", (Opaque,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> StorageRef:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise _hostile(self._path, f"unknown persistent id {str(pid)[:60]!r}")
        _, kind, key, _location, numel = pid
        record = self._records.get(f"data/{key}")
        if record is None:
            raise CheckpointError(f"storage {key!r} is missing", where=str(self._path), fix="save it again")
        code = kind if isinstance(kind, str) or kind is None else None
        item = DTYPES[code][1] if code else 1
        if not isinstance(numel, int) or numel < 0 or numel * item > record.size:
            raise _hostile(self._path, f"storage {key!r} claims {numel} elements in {record.size} bytes")
        return StorageRef(code, str(key), record)


def _tensor_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("builtins", "slice"): slice,
        ("builtins", "complex"): complex, ("builtins", "bytearray"): _bytearray,
        ("__builtin__", "set"): set, ("_codecs", "encode"): _latin1,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _first,
        ("torch._utils", "_rebuild_parameter_with_state"): _first,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch", "Size"): _size, ("torch.storage", "UntypedStorage"): None,
    }
    for storage, code in _STORAGE_CODES.items():
        names["torch", storage] = code
        names["torch.storage", storage] = code
    names.update({("torch", torch_name): code for torch_name, code in TORCH_TO_CODE.items()})
    return names


def _rebuild_tensor(storage: StorageRef, offset: int, shape: Any, stride: Any, *_: Any,
                    code: str | None = None) -> TensorRef:
    """Build a ``TensorRef`` and check that every element it can address lies inside its storage."""
    code = code or storage.code
    if not isinstance(storage, StorageRef) or code not in DTYPES:
        raise ValueError("a tensor without a typed storage")
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or any(not isinstance(n, int) or n < 0 for n in (*shape, *stride, offset)):
        raise ValueError(f"a tensor of shape {shape} and strides {stride}")
    ref = TensorRef(code, shape, stride, offset, storage)
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else offset
    if count and ((last + 1) * ref.itemsize > storage.record.size or ref.nbytes > storage.record.size):
        raise ValueError(f"a tensor of shape {shape} and strides {stride} does not fit its {storage.record.size} bytes")
    return ref


def _rebuild_tensor_v3(*args: Any) -> TensorRef:
    """Arguments as torch stores them: storage, offset, shape, strides, requires_grad, hooks, dtype, metadata."""
    return _rebuild_tensor(*args[:4], code=args[6])


def _rebuild_from_type(function: Any, _kind: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if function not in (_rebuild_tensor, _rebuild_tensor_v3, _first):
        raise ValueError("a tensor subclass that is not a plain tensor")
    return function(*args)


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _bytearray(value: bytes = b"", *_: Any) -> bytearray:
    """``bytearray`` of bytes only: with a number it would allocate whatever the file asks for."""
    if not isinstance(value, bytes):
        raise ValueError("bytearray of something that is not bytes")
    return bytearray(value)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")
