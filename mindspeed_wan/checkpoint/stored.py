"""Tensors that lie in files, read slice by slice: the one reader behind every weight and checkpoint format.

Whatever the format, a tensor is a set of row-major pieces at known byte offsets (one piece in safetensors and mp_rank
files, many in a DCP folder). A rank asks for the box it owns and only the bytes of that box are read; nothing is
unpickled here, the tables come from ``safe_load``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from mindspeed_wan.checkpoint.torch_file import DTYPES, TensorRef, read_torch_file
from mindspeed_wan.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Box = Sequence[slice]
"""One ``slice(start, stop)`` per dimension, in elements of the whole tensor."""


class QuantizedTarget(Protocol):
    """A weight that is rounded to 8 bits while it is read (``models.quantization.QuantizedView``)."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole weight."""

    @property
    def codes(self) -> Tensor:
        """Global view of the codes: which box this rank holds."""

    @property
    def format(self) -> str:
        """``fp8`` or ``int8``."""

    @property
    def change(self) -> Any:
        """What is added before rounding, or ``None``."""

    @property
    def device(self) -> torch.device:
        """Where to round."""

    def encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's codes and fp32 scales of its ``rows``, of which all columns are given."""

    def store(self, codes: Tensor, scales: Tensor) -> None:
        """Put them in place."""


@dataclass(frozen=True)
class Piece:
    """A row-major part of a tensor: where it lies in the tensor and in which bytes of which file.

    ``zipped`` is the length of the ``torch.save`` container at ``offset`` (DCP writes one per piece); its table is
    parsed only when the piece is read, because a rank reads few of the pieces of a large job. ``None`` when
    ``offset`` is the first element itself.
    """

    path: Path
    offset: int
    code: str
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    zipped: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * DTYPES[self.code][1]


@dataclass
class StoredTensor:
    """One tensor on disk: its whole shape and the pieces that cover it.

    ``scale``: what the stored values are multiplied by, of published fp8 files: one number, or one per row.
    """

    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)
    scale: StoredTensor | None = None

    @property
    def code(self) -> str:
        """The dtype code (``F32``, ``BF16``, ...)."""
        return self.pieces[0].code

    @property
    def is_fp8(self) -> bool:
        """Stored in 8 bits of floating point, with or without a scale."""
        return self.code.startswith("F8_")


class TensorFiles:
    """The tensors of one checkpoint by name, with its files kept open while slices are read.

    Use as a context manager. ``bytes_read`` counts what was really read (tests hold it to the slice).
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], where: Path) -> None:
        self.tensors, self.where = dict(tensors), where
        self.bytes_read = 0
        self._stack, self._open = ExitStack(), dict[Path, IO[bytes]]()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return the box of tensor ``name`` as a CPU tensor (the whole tensor by default).

        Its dtype is the stored one; fp8 values come multiplied by their scale, in fp32.
        """
        stored = self.tensors[name]
        values = self.read_raw(name, box)
        if not stored.is_fp8:
            return values
        rows = box[0] if box else slice(0, stored.shape[0] if stored.shape else 1)
        scales = self.read_scales(name, rows)
        return values.float().mul_(scales.view(-1, *[1] * (values.ndim - 1)) if values.ndim else scales[0, 0])

    def read_scales(self, name: str, rows: slice) -> Tensor:
        """Return the fp32 scales ``[n, 1]`` of an fp8 tensor's rows; 1 where the file has none.

        Raises:
            CheckpointError: a scale that is not finite.
        """
        import torch

        scale, count = self.tensors[name].scale, rows.stop - rows.start
        if scale is None:
            return torch.ones(count, 1)
        values = self._assemble(scale, None, f"the scale of {name!r}").float().reshape(-1, 1)
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"the scale of {name!r} is NaN or infinite", where=str(self.where),
                                  fix="the file is damaged; download it again")
        return values.expand(count, 1).contiguous() if values.shape[0] == 1 else values[rows]

    def read_raw(self, name: str, box: Box | None = None) -> Tensor:
        """Return the box of tensor ``name`` as it is stored: fp8 values without their scale."""
        return self._assemble(self.tensors[name], box, f"tensor {name!r}")

    def _assemble(self, stored: StoredTensor, box: Box | None, what: str) -> Tensor:
        import torch

        box = [slice(0, size) for size in stored.shape] if box is None else box
        out = torch.empty([s.stop - s.start for s in box], dtype=getattr(torch, DTYPES[stored.code][0]))
        filled = 0
        for piece in stored.pieces:
            part = _overlap(piece, box)
            if part is None:
                continue
            inside, target = part
            block = self._read_piece(piece, inside)
            out[target].copy_(block)
            filled += block.numel()
        if filled != out.numel():
            raise CheckpointError(f"{what} has only {filled} of {out.numel()} elements of a slice",
                                  where=str(self.where), fix="the checkpoint is incomplete; use another one")
        return out

    def _read_piece(self, piece: Piece, inside: tuple[slice, ...]) -> Tensor:
        """Read the rows of ``inside`` in one go and cut the other dimensions in memory."""
        import torch

        dtype = getattr(torch, DTYPES[piece.code][0])
        first = self._first_element(piece)
        if not piece.shape:
            return torch.frombuffer(self._bytes(piece.path, first, DTYPES[piece.code][1]), dtype=dtype).view(())
        rows = inside[0]
        count = rows.stop - rows.start
        raw = self._bytes(piece.path, first + rows.start * piece.row_bytes, count * piece.row_bytes)
        return torch.frombuffer(raw, dtype=dtype).view(count, *piece.shape[1:])[(slice(None), *inside[1:])]

    def _first_element(self, piece: Piece) -> int:
        """Return the file offset of the piece's first element."""
        if piece.zipped is None:
            return piece.offset
        stream = self._stream(piece.path)
        ref = read_torch_file(piece.path, start=piece.offset, length=piece.zipped, stream=stream).root
        described = (piece.code, piece.shape)
        if not isinstance(ref, TensorRef) or not ref.is_contiguous or (ref.code, ref.shape) != described:
            raise CheckpointError(f"the chunk at byte {piece.offset} is not the tensor that .metadata describes",
                                  where=str(piece.path), fix="the checkpoint is damaged; use another one")
        return ref.offset

    def _stream(self, path: Path) -> IO[bytes]:
        if path not in self._open:
            stream = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the stack
            self._open[path] = self._stack.enter_context(stream)
        return self._open[path]

    def _bytes(self, path: Path, offset: int, length: int) -> bytearray:
        stream = self._stream(path)
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        while done < length:
            read = os.preadv(stream.fileno(), [view[done:]], offset + done) if hasattr(os, "preadv") else _seek_read(
                stream, view[done:], offset + done)
            if read == 0:
                raise CheckpointError(f"ends at byte {offset + done}; truncated", where=str(path),
                                      fix="copy or download it again")
            done += read
        self.bytes_read += length
        return buffer


def _seek_read(stream: IO[bytes], view: memoryview, offset: int) -> int:
    stream.seek(offset)
    return int(stream.readinto(view))  # type: ignore[attr-defined]


def _overlap(piece: Piece, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return where ``box`` meets ``piece``: (slices inside the piece, slices inside the box), or ``None``."""
    inside, target = [], []
    for wanted, origin, size in zip(box, piece.origin, piece.shape):
        start, stop = max(wanted.start, origin), min(wanted.stop, origin + size)
        if start >= stop:
            return None
        inside.append(slice(start - origin, stop - origin))
        target.append(slice(start - wanted.start, stop - wanted.start))
    return tuple(inside), tuple(target)


def local_box(view: Tensor) -> tuple[slice, ...] | None:
    """Return the box of the global tensor that this rank holds of ``view`` (a DTensor or a plain tensor).

    ``None`` when the rank holds nothing of it (uneven sharding).
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(view, DTensor):
        return tuple(slice(0, size) for size in view.shape)
    shape, offset = compute_local_shape_and_global_offset(view.shape, view.device_mesh, view.placements)
    if 0 in shape:
        return None
    return tuple(slice(o, o + n) for o, n in zip(offset, shape))


def copy_into(
    files: TensorFiles, targets: Mapping[str, Tensor | QuantizedTarget], names: Mapping[str, str] | None = None
) -> None:
    """Read every target's own box and copy it in place, cast to the target's dtype or quantised.

    Args:
        files: the checkpoint.
        targets: name -> global view (DTensor over local storage, or a plain tensor) or 8-bit weight; written in place.
        names: target name -> name in ``files`` where they differ.
    """
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for name, view in targets.items():
            source = names[name] if names else name
            if not isinstance(view, torch.Tensor):
                quantized = read_quantized(files, source, view, view.device)
                if quantized is not None:
                    view.store(*quantized)
                continue
            box = local_box(view)
            if box is None:
                continue
            shard = view.to_local() if isinstance(view, DTensor) else view
            shard.copy_(files.read(source, box))


def read_quantized(
    files: TensorFiles, name: str, view: QuantizedTarget, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor] | None:
    """Return the codes and fp32 scales of this rank's part of tensor ``name``; ``None`` when it holds nothing of it.

    An fp8 file is taken over bit for bit by an fp8 layer; else this rank's rows are quantised on ``device``.
    """
    box = local_box(view.codes)
    if box is None:
        return None
    if view.format == "fp8" and view.change is None and files.tensors[name].code == "F8_E4M3":
        return files.read_raw(name, box), files.read_scales(name, box[0])
    return view.encoded(files.read(name, (box[0], slice(0, view.shape[1]))).to(device))
