"""Lay out ``torch.save`` files as plan parts, byte by byte, without torch and without holding a tensor.

Same container as torch writes: an uncompressed zip with ``data.pkl``, ``byteorder``, ``data/N`` per tensor (aligned to
64 bytes) and ``version``. CRC-32 values follow each member in a data descriptor, as torch does it too, so the file
can be written in one pass. ``torch.load``, plain or with ``weights_only=True`` or ``mmap=True``, reads it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan_converters.plan import Constant, Deferred, Part, Slice

_STORAGE = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}
_ALIGN = 64
_FLAGS = 0x0808  # sizes and CRC follow the data; names are UTF-8
_SENTINEL = 0xFFFFFFFF  # "see the zip64 record"
_ZIP64_FROM = _SENTINEL  # offsets from here on need zip64 records


# ---- pickle --------------------------------------------------------------------------------------------------


def pickled_tensor(item: Slice, key: int) -> bytes:
    """Return pickle opcodes that rebuild ``item`` from the storage ``data/<key>``."""
    shape, step = item.box.sizes, 1
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    storage = (b"(" + _text("storage") + f"ctorch\n{_STORAGE[item.code]}\n".encode() + _text(str(key)) + _text("cpu")
               + _integer(math.prod(shape)) + b"tQ")
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _integer(0) + _integers(shape) + _integers(strides)
            + b"\x89ccollections\nOrderedDict\n)RtR")


def pickled_dict(items: Mapping[str, bytes]) -> bytes:
    """Return opcodes for a dict of already pickled values."""
    return b"}(" + b"".join(_text(key) + value for key, value in items.items()) + b"u"


def pickled_float(value: float) -> bytes:
    """Return opcodes for a float."""
    return b"G" + struct.pack(">d", value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 256:
        return b"K" + bytes([value])
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_integer(v) for v in values) + b"t"


# ---- container -----------------------------------------------------------------------------------------------


class _Member:
    """One entry of the zip while it is laid out; ``index`` is the number of its slice, ``None`` for a constant."""

    def __init__(self, name: bytes, offset: int, size: int, crc: int | None, index: int | None) -> None:
        self.name, self.offset, self.size, self.crc, self.index = name, offset, size, crc, index

    def checksum(self, crcs: Sequence[int]) -> int:
        return self.crc if self.crc is not None else crcs[self.index or 0]


def torch_file_parts(root: bytes, slices: Sequence[Slice], *, archive: str = "archive",
                     first_slice: int = 0) -> list[Part]:
    """Return the parts of a ``torch.save`` file.

    Args:
        root: pickle opcodes of the saved object, made by ``pickled_dict`` and ``pickled_tensor``.
        slices: the tensors, in the order of their storage keys (0, 1, ...).
        archive: top folder inside the zip (torch uses the file's stem, or ``archive``).
        first_slice: how many slices the same output file holds before this zip (DCP packs many zips in a file).
    """
    parts: list[Part] = []
    members: list[_Member] = []
    at = 0
    contents: list[tuple[str, bytes | Slice]] = [("data.pkl", b"\x80\x02" + root + b"."), ("byteorder", b"little")]
    contents += [(f"data/{i}", item) for i, item in enumerate(slices)]
    contents.append(("version", b"3\n"))
    for name, content in contents:
        member, header, trailer = _lay_member(f"{archive}/{name}".encode(), content, at,
                                              first_slice + len([m for m in members if m.index is not None]))
        body = Constant(content) if isinstance(content, bytes) else content
        parts += [Constant(header), body, trailer]
        members.append(member)
        at += len(header) + member.size + trailer.size
    size = sum(46 + len(m.name) + len(_zip64_extra(m.offset)) for m in members) + _end_size(at)
    parts.append(Deferred(size, lambda crcs, start=at: _directory(members, start, crcs)))  # type: ignore[misc]
    return parts


def _lay_member(name: bytes, content: bytes | Slice, at: int, index: int) -> tuple[_Member, bytes, Part]:
    size = len(content) if isinstance(content, bytes) else content.size
    if size >= _SENTINEL:
        raise CheckpointError(f"{name.decode()} has {size} bytes: a single tensor beyond 4 GiB is no Wan parameter")
    padding = -(at + 30 + len(name) + 4) % _ALIGN
    header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), padding + 4)
    header += name + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    if isinstance(content, bytes):
        crc = zlib.crc32(content)
        return _Member(name, at, size, crc, None), header, Constant(_descriptor(crc, size))
    member = _Member(name, at, size, None, index)
    return member, header, Deferred(16, lambda crcs: _descriptor(crcs[index], size))


def _descriptor(crc: int, size: int) -> bytes:
    return struct.pack("<4s3I", b"PK\x07\x08", crc, size, size)


def _zip64_extra(offset: int) -> bytes:
    return struct.pack("<HHQ", 1, 8, offset) if offset >= _ZIP64_FROM else b""


def _end_size(start: int) -> int:
    return 22 + (56 + 20 if start >= _ZIP64_FROM else 0)


def _directory(members: Sequence[_Member], start: int, crcs: Sequence[int]) -> bytes:
    """The central directory and its end record (with the zip64 forms where offsets pass 4 GiB)."""
    entries = b""
    for member in members:
        extra = _zip64_extra(member.offset)
        entries += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45 if extra else 0, 45 if extra else 0, _FLAGS, 0, 0, 0,
                               member.checksum(crcs), member.size, member.size, len(member.name), len(extra), 0, 0, 0,
                               0, _SENTINEL if extra else member.offset) + member.name + extra
    count, end = len(members), b""
    if start >= _ZIP64_FROM:
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entries), start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(entries), 1)
    end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entries),
                       _SENTINEL if end else start, 0)
    return entries + end


def total_size(parts: Sequence[Any]) -> int:
    """Return the bytes of ``parts``."""
    return sum(part.size for part in parts)
