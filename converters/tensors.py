"""A tensor that lies in files, and reading a slice of it: the one currency between all formats.

A ``StoredTensor`` is a shape, a dtype and the chunks that tile it: one chunk in a safetensors file, one per rank in
tensor-parallel ``mp_rank`` files, any number of boxes in a DCP folder. Reading never touches more than a block of
rows, so memory does not grow with the model. numpy only: torch would cost two seconds of every start.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_wan.checkpoint.torch_file import DTYPES
from mindspeed_wan.errors import CheckpointError, NumericsError
from mindspeed_wan_converters import fp8

_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1")}
FLOAT_CODES = ("F32", "BF16", "F16")
"""Precisions a DiT may be stored in."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: first index and extent per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.sizes)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor stored row-major from byte ``offset`` of ``path``; ``crc32`` is of its bytes when known."""

    path: Path
    offset: int
    box: Box
    crc32: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its name in the source file (for messages), dtype code, shape, and the chunks that tile it.

    ``scale`` is what the values of an fp8 tensor are multiplied by (one number, or one per row); ``output`` the dtype
    code that a conversion writes unless it is told another one, when it is not ``code``.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    scale: StoredTensor | None = None
    output: str | None = None

    @property
    def is_fp8(self) -> bool:
        """Published in 8 bits: read as fp32 values."""
        return self.code in fp8.VALUES

    @property
    def output_code(self) -> str:
        """What it becomes when nothing is said."""
        return self.output or self.code

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.code][1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    def single(self, path: Path, offset: int, crc32: int | None = None) -> StoredTensor:
        """Return this tensor as one chunk at ``offset`` of ``path``."""
        return replace(self, chunks=(Chunk(path, offset, Box.whole(self.shape), crc32),))


def check_tiling(tensor: StoredTensor) -> None:
    """Raise ``CheckpointError`` unless the chunks cover the tensor exactly once."""
    boxes = [chunk.box for chunk in tensor.chunks]
    covered = sum(box.numel for box in boxes)
    if covered != math.prod(tensor.shape) or _overlap(boxes):
        raise CheckpointError(f"the {len(boxes)} parts of tensor {tensor.name!r} cover {covered} of "
                              f"{math.prod(tensor.shape)} elements, or overlap: a shard is missing or doubled",
                              where=str(tensor.chunks[0].path.parent) if boxes else None,
                              fix="copy the whole checkpoint again")


def _overlap(boxes: list[Box]) -> bool:
    if len(boxes) < 2:
        return False
    start = np.array([box.offsets for box in boxes])
    stop = start + np.array([box.sizes for box in boxes])
    for i in range(len(boxes) - 1):
        apart = (stop[i + 1:] <= start[i]) | (stop[i] <= start[i + 1:])
        if not apart.any(axis=1).all():
            return True
    return False


# ---- files ---------------------------------------------------------------------------------------------------


class SourceFiles:
    """Open files of the source, shared by worker threads; the least recently used are closed beyond ``limit``."""

    def __init__(self, limit: int = 128) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def read_into(self, path: Path, offset: int, view: memoryview, *, once: bool = False) -> None:
        """Fill ``view`` from ``path`` at ``offset``; ``CheckpointError`` when the file ends before.

        ``once`` tells that nobody reads these bytes again, so they need not stay in memory.
        """
        descriptor = self._acquire(path)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"ends at byte {offset + done}, {len(view) - done} bytes short",
                                          where=str(path), fix="the file changed or is truncated; copy it again")
                done += count
            if once and hasattr(os, "posix_fadvise"):  # else a 30 GB source pushes everything out of the page cache
                os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"cannot be read at byte {offset}: {error.strerror}", where=str(path)) from None
        finally:
            self._release(descriptor)

    def _acquire(self, path: Path) -> int:
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is None:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"cannot be opened: {error.strerror}", where=str(path)) from None
            self._open[path] = descriptor
            self._users[descriptor] = self._users.get(descriptor, 0) + 1
            idle = [p for p, d in self._open.items() if not self._users.get(d)]
            for old in idle[: max(0, len(self._open) - self._limit)]:
                os.close(self._open.pop(old))
            return descriptor

    def _release(self, descriptor: int) -> None:
        with self._lock:
            self._users[descriptor] -= 1

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRange:
    """Bytes that can go from the source file to the target file as they are."""

    path: Path
    offset: int
    length: int
    crc32: int | None


def as_file_range(tensor: StoredTensor, box: Box, code: str) -> FileRange | None:
    """Return where ``box`` lies as one run of bytes, or ``None`` when it must be gathered or cast."""
    if code != tensor.code:
        return None
    for chunk in tensor.chunks:
        whole = chunk.box == box
        rows_only = (chunk.box.sizes[1:] == box.sizes[1:] and chunk.box.offsets[1:] == box.offsets[1:]
                     and chunk.box.offsets[0] <= box.offsets[0]
                     and box.offsets[0] + box.sizes[0] <= chunk.box.offsets[0] + chunk.box.sizes[0])
        if whole or rows_only:
            row = math.prod(box.sizes[1:]) * tensor.itemsize
            start = chunk.offset + (box.offsets[0] - chunk.box.offsets[0]) * row
            return FileRange(chunk.path, start, box.sizes[0] * row, chunk.crc32 if whole else None)
    return None


def iter_blocks(tensor: StoredTensor, box: Box, code: str, files: SourceFiles, budget: int) -> Iterator[Any]:
    """Yield ``box`` of ``tensor`` in row-major order as contiguous numpy blocks in dtype ``code``.

    Args:
        tensor: read from disk, about ``budget`` bytes at a time.
        box: the part wanted.
        code: target dtype code; a cast rounds to nearest even.
        files: the open source files.
        budget: bytes of source rows to hold at once (at least one row is).

    Raises:
        CheckpointError: a chunk whose bytes do not match its CRC-32 (checked when the box covers all its rows).
        NumericsError: a finite value that overflows in ``code``.
    """
    row_bytes = math.prod(tensor.shape[1:]) * tensor.itemsize
    step = max(1, budget // max(1, row_bytes))
    first, last = box.offsets[0], box.offsets[0] + box.sizes[0]
    crcs: dict[Chunk, int] = {}
    columns = tuple(slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True))
    for start in range(first, last, step):
        stop = min(last, start + step)
        rows, stored = _read_rows(tensor, start, stop, columns, files, crcs), tensor.code
        if tensor.is_fp8 and code != stored:
            rows, stored = fp8.decode(rows, stored, _scales(tensor, start, stop, files)), "F32"
        yield np.ascontiguousarray(cast(rows[(slice(None), *columns)], stored, code, tensor.name))
    for chunk, crc in crcs.items():
        begin, end = chunk.box.offsets[0], chunk.box.offsets[0] + chunk.box.sizes[0]
        if chunk.crc32 is not None and first <= begin and end <= last and crc != chunk.crc32:
            raise damaged(tensor.name, chunk.path)


def _scales(tensor: StoredTensor, start: int, stop: int, files: SourceFiles) -> Callable[[], Any] | None:
    """Return what reads the fp32 scales of an fp8 tensor's rows ``[start, stop)``."""
    scale = tensor.scale
    if scale is None:
        return None

    def read() -> Any:
        values = np.empty(math.prod(scale.shape), dtype=_NUMPY[scale.code])
        files.read_into(scale.chunks[0].path, scale.chunks[0].offset, values.data.cast("B"))
        wide = cast(values, scale.code, "F32", scale.name)
        return wide if wide.size == 1 else wide[start:stop]

    return read


def damaged(name: str, path: Path) -> CheckpointError:
    """The error for bytes that do not match their checksum."""
    return CheckpointError(f"the bytes of tensor {name!r} do not match their checksum", where=str(path),
                           fix="the file is damaged; copy or download it again")


def _read_rows(tensor: StoredTensor, start: int, stop: int, columns: tuple[slice, ...], files: SourceFiles,
               crcs: dict[Chunk, int]) -> Any:
    """Return rows ``[start, stop)`` at full width; chunks that touch none of ``columns`` are left unread."""
    dtype = _NUMPY[tensor.code]
    rows = np.empty((stop - start, *tensor.shape[1:]), dtype=dtype)
    for chunk in tensor.chunks:
        box = chunk.box
        begin, end = max(start, box.offsets[0]), min(stop, box.offsets[0] + box.sizes[0])
        outside = any(o >= c.stop or o + s <= c.start
                      for o, s, c in zip(box.offsets[1:], box.sizes[1:], columns, strict=True))
        if begin >= end or outside or box.numel == 0:
            continue
        width = math.prod(box.sizes[1:]) * dtype.itemsize
        whole_rows = box.sizes[1:] == tensor.shape[1:]
        part = rows[begin - start:end - start] if whole_rows else np.empty((end - begin, *box.sizes[1:]), dtype=dtype)
        raw = part.data.cast("B")
        files.read_into(chunk.path, chunk.offset + (begin - box.offsets[0]) * width, raw)
        if chunk.crc32 is not None:
            crcs[chunk] = zlib.crc32(raw, crcs.get(chunk, 0))
        if not whole_rows:
            place = (slice(begin - start, end - start),
                     *(slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True)))
            rows[place] = part
    return rows


def cast(values: Any, source: str, target: str, name: str = "?") -> Any:
    """Return ``values`` in another float precision, rounded to nearest even as torch does.

    bfloat16 is held as uint16 bit patterns. ``NumericsError`` when a finite value overflows to infinity.
    """
    if source == target:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        wide = (values.astype("<u4") << 16).view("<f4") if source == "BF16" else values.astype("<f4", copy=False)
        result = _to_bf16(wide) if target == "BF16" else wide.astype(_NUMPY[target], copy=False)
    if target == "F16" and (np.isinf(result) & np.isfinite(wide)).any():
        raise NumericsError(f"tensor {name!r} has values beyond the range of fp16 (65504)",
                            fix="convert to bf16 instead: --dtype bf16")
    return result


def _to_bf16(wide: Any) -> Any:
    bits = np.ascontiguousarray(wide).view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    nan = np.isnan(wide)
    if nan.any():  # rounding may carry a NaN into infinity
        rounded[nan] = 0x7FC0
    return rounded
