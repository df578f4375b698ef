"""What a conversion will write, as data: files made of constants, tensor slices and checksums.

Every size is known before the first byte is written, so the disk can be checked, progress has a total, files can be
written in any order by several workers, and an interrupted conversion can be continued file by file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.torch_file import DTYPES
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.tensors import Box, StoredTensor

CARD_NAME = "wan.json"
CARD_VERSION = 1


@dataclass(frozen=True)
class Constant:
    """Bytes known before writing: headers, small JSON files, pickles."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.data)


@dataclass(frozen=True)
class Slice:
    """A box of a source tensor, written row-major in dtype ``code``; ``name`` is its name in the target."""

    name: str
    tensor: StoredTensor
    box: Box
    code: str

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.box.numel * DTYPES[self.code][1]


@dataclass(frozen=True)
class Deferred:
    """Bytes that need the CRC-32 of the slices written before them in the same file (zip directories)."""

    size: int
    build: Callable[[Sequence[int]], bytes]


Part = Constant | Slice | Deferred


@dataclass(frozen=True)
class OutputFile:
    """One file of the target: path relative to the target folder, and its parts in order."""

    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(part.size for part in self.parts)


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for sizes in a config that no model has and that arithmetic would choke on."""
    for key, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(n, (int, float)) and not isinstance(n, bool) and not 0 < n < 1 << 24 for n in numbers):
            raise ValueError(f"{key} is {value}")


@dataclass(frozen=True)
class Card:
    """What a folder of weights is: architecture and expert. Stored as ``wan.json`` beside the weights.

    ``boundary`` is the sigma at which the experts change and ``shift`` the flow shift the weights were trained with;
    both ``None`` when the source does not say.
    """

    config: WanConfig
    expert: str | None = None
    boundary: float | None = None
    shift: float | None = None

    def to_json(self) -> str:
        """Return the text of ``wan.json``."""
        return json.dumps({"version": CARD_VERSION, "task": self.config.task, "expert": self.expert,
                           "boundary": self.boundary, "shift": self.shift, "config": self.config.to_dict()}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Card | None:
        """Return the card of ``folder``, ``None`` when it has none; ``CheckpointError`` when it is damaged."""
        path = folder / CARD_NAME
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            check_numbers(raw["config"])
            expert = raw.get("expert")
            if expert not in (None, "high", "low"):
                raise ValueError(f"expert {expert!r}")
            return cls(WanConfig.from_dict(raw["config"]), expert, raw.get("boundary"), raw.get("shift"))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError) as error:
            raise CheckpointError(f"cannot be read ({error})", where=str(path),
                                  fix="the folder is damaged; convert it again") from None


@dataclass(frozen=True)
class Weights:
    """One expert as found on disk: what it is and where every tensor lies, keyed by MindSpeed-MM names.

    ``format`` is ``hf``, ``original``, ``mm`` or ``dcp``; ``note`` describes its layout for people (``TP 2, PP 2``).
    """

    path: Path
    format: str
    card: Card
    tensors: dict[str, StoredTensor]
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Layout:
    """Everything a conversion will write below one target folder.

    ``seals`` are the folders (relative) that get ``wan.json`` and ``manifest.json``; ``tracker`` says where a tracker
    file naming ``release`` goes; ``links`` maps a relative path to what it points at.
    """

    files: list[OutputFile] = field(default_factory=list)
    seals: dict[str, Card] = field(default_factory=dict)
    trackers: list[str] = field(default_factory=list)
    links: dict[str, Path] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def below(self, folder: str) -> Layout:
        """Return the same layout moved into ``folder`` (``""`` keeps it)."""
        def move(name: str) -> str:
            return "/".join(part for part in (folder, name) if part)

        return Layout([OutputFile(move(f.name), f.parts) for f in self.files],
                      {move(n): c for n, c in self.seals.items()}, [move(n) for n in self.trackers],
                      {move(n): p for n, p in self.links.items()})

    def merge(self, other: Layout) -> None:
        """Add the files of another layout."""
        self.files += other.files
        self.seals.update(other.seals)
        self.trackers += other.trackers
        self.links.update(other.links)

    def fingerprint(self, options: Any) -> str:
        """Return a hash of the plan and of its sources (path, size, modification time), to tell if it may resume."""
        digest = hashlib.sha256(repr(options).encode())
        sources: set[Path] = set()
        for file in self.files:
            digest.update(f"{file.name}:{file.size};".encode())
            for part in file.parts:
                if isinstance(part, Slice):
                    digest.update(f"{part.name}{part.box}{part.code}".encode())
                    sources.update(chunk.path for chunk in part.tensor.chunks)
                elif isinstance(part, Constant):
                    digest.update(part.data)
        for path in sorted(sources):
            state = path.stat()
            digest.update(f"{path}:{state.st_size}:{state.st_mtime_ns};".encode())
        return digest.hexdigest()
