"""A feature cache: what VAE and UMT5 made of a data set, in shards that know what they were made from.

Layout of a cache folder::

    cache.json                      identity: clip settings, seed, the encoders' weights; written first
    shards/00012.safetensors        tensors of consecutive samples; its header names every sample
    empty_text.safetensors          UMT5's states of the empty caption
    index.json                      written last: every sample's shard, shape, captions and source file

Names of tensors: ``<sample>/latents/<variant>`` and ``<sample>/condition/<variant>`` fp32 [16, f, h, w] normalised;
``<sample>/text/<caption>`` [L, C] in UMT5's dtype, unpadded. A variant is one draw of the random frame window and crop
(epoch e reads variant e modulo their number).

A sample's name in a shard is the hash of its clip's content, its captions, its place in the data set (which decides its
random window) and the identity, so a shard that was made from something else is recognised and never read. A data set
that has grown keeps its shards. Rows also hold a checksum of every tensor, verified on each read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.data.plan import ClipSettings, Shape
from mindspeed_wan.data.records import ClipRecord
from mindspeed_wan.errors import DataError, WanError
from mindspeed_wan.models.frozen_weights import FileIdentity, identify
from mindspeed_wan.models.text_encoder import text_encoder_files
from mindspeed_wan.models.vae import vae_files

FORMAT = 1
IDENTITY_FILE, INDEX_FILE, EMPTY_TEXT_FILE = "cache.json", "index.json", "empty_text.safetensors"
_READER_FIELDS = ("reader", "caption_dropout")
"""Clip settings that do not change what is encoded: every reader gives the same pixels, dropout is drawn later."""


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Which encoders make the features, and how they run; ``None`` for one that nobody names."""

    vae: str | None
    text_encoder: str | None
    tokenizer: str | None = None
    vae_dtype: str = "fp32"
    text_dtype: str = "bf16"
    tiling: tuple[int, int, int, int] | None = None
    max_length: int = 512
    clean_captions: bool = True

    def weights(self, known: Mapping[str, Sequence[FileIdentity]] | None = None) -> dict[str, list[FileIdentity]]:
        """Hash the weight files; those that ``known`` lists with the same size and time are not read again.

        Encoders that are not on this machine are left out.
        """
        known, found = known or {}, {}
        encoders = (("vae", self.vae, vae_files), ("text_encoder", self.text_encoder, text_encoder_files))
        for name, path, files in encoders:
            if path is not None and Path(path).exists():
                found[name] = identify(files(path), known.get(name, ()))
        return found

    def options(self) -> dict[str, Any]:
        """Return what besides the weights decides the features, of the encoders that are named."""
        vae = {"vae_dtype": self.vae_dtype, "tiling": list(self.tiling) if self.tiling else None}
        text = {"text_dtype": self.text_dtype, "max_length": self.max_length, "clean_captions": self.clean_captions}
        return {**(vae if self.vae is not None else {}), **(text if self.text_encoder is not None else {})}


@dataclass(frozen=True)
class Identity:
    """What a cache was made from. Two caches with equal ``key`` hold the same features for the same clip."""

    task: str
    settings: dict[str, Any]
    seed: int
    variants: int
    options: dict[str, Any]
    weights: dict[str, list[FileIdentity]]

    @property
    def key(self) -> str:
        """Hash of everything but file times."""
        digests = {name: [entry.digest for entry in files] for name, files in self.weights.items()}
        content = [FORMAT, self.task, self.settings, self.seed, self.variants, self.options, digests]
        return _hash(json.dumps(content, sort_keys=True).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready content of ``cache.json``."""
        weights = {name: [entry.to_dict() for entry in files] for name, files in self.weights.items()}
        return {**vars(self), "weights": weights, "format": FORMAT, "key": self.key}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Identity:
        """Read what ``to_dict`` wrote."""
        weights = {name: [FileIdentity(**entry) for entry in files] for name, files in values["weights"].items()}
        return cls(values["task"], values["settings"], values["seed"], values["variants"], values["options"], weights)

    def differences(self, other: Identity) -> list[str]:
        """Return, in words, in what ``other`` differs."""
        found = []
        for name in ("task", "seed", "variants"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name)} -> {getattr(other, name)}")
        for left, right in ((self.settings, other.settings), (self.options, other.options)):
            found += [f"{key}: {left.get(key)} -> {right.get(key)}" for key in sorted({*left, *right})
                      if left.get(key) != right.get(key)]
        for name in sorted({*self.weights, *other.weights}):
            digests = [[entry.digest for entry in side.weights.get(name, [])] for side in (self, other)]
            if digests[0] != digests[1]:
                found.append(f"the weights of the {name} are others")
        return found


def settings_fields(settings: ClipSettings) -> dict[str, Any]:
    """Return the clip settings that decide what is encoded."""
    fields = {name: value for name, value in asdict(settings).items() if name not in _READER_FIELDS}
    return json.loads(json.dumps(fields))  # as cache.json gives them back: tuples are lists there


def make_identity(task: str, settings: ClipSettings, seed: int, variants: int, encoders: EncoderChoice,
                  known: Identity | None = None) -> Identity:
    """Return the identity of a cache made now; hashes the encoders' files unless ``known`` lists them unchanged."""
    weights = encoders.weights(known.weights if known else None)
    return Identity(task, settings_fields(settings), seed, variants, encoders.options(), weights)


def read_identity(folder: Path) -> Identity:
    """Read ``cache.json``.

    Raises:
        DataError: not a feature cache, damaged, or written by another version.
    """
    path = folder / IDENTITY_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"cache format {values['format']}; this version reads {FORMAT}", where=str(path),
                            fix="build the cache again")
        return Identity.from_dict(values)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("not a feature cache (no cache.json)", where=str(folder),
                        fix="mindspeed-wan features build --help") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"damaged: {error}", where=str(path), fix="build the cache again") from None


# ---- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipContent:
    """A source file as the cache remembers it."""

    path: str
    size: int
    mtime_ns: int
    digest: str


def clip_content(path: Path, known: Sequence[ClipContent] = ()) -> ClipContent:
    """Hash a clip's content (BLAKE2b of the whole file); one in ``known`` with its size and time is not read again."""
    try:
        stat = os.stat(path)
        for content in known:
            if (content.path, content.size, content.mtime_ns) == (str(path), stat.st_size, stat.st_mtime_ns):
                return content
        entry = identify([path])[0]
    except OSError as error:
        return ClipContent(str(path), 0, 0, f"unreadable: {error.strerror}")
    return ClipContent(str(path), entry.size, entry.mtime_ns, entry.digest)


def sample_name(identity_key: str, index: int, content: ClipContent, record: ClipRecord, shape: Shape) -> str:
    """Return the name of a sample's features: a hash of all they depend on."""
    parts = [identity_key, index, content.digest, record.captions, record.cut, record.crop, shape, record.fps,
             record.num_frames]
    return _hash(json.dumps(parts).encode())


def is_changed(content: ClipContent) -> bool:
    """Tell whether a source file is there and is not the one that was encoded (a moved-away file is not)."""
    path = Path(content.path)
    try:
        stat = os.stat(path)
    except OSError:
        return False
    if stat.st_size != content.size:
        return True
    return stat.st_mtime_ns != content.mtime_ns and clip_content(path).digest != content.digest


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / "shards" / f"{number:05d}.safetensors"


def read_shard_rows(path: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a shard's header, ``None`` when there is no whole shard."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return json.loads((file.metadata() or {})["rows"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, path) from None


def disk_error(error: OSError, path: Path) -> WanError:
    """Return the error of a failed write: a full disk, or no permission."""
    from mindspeed_wan.errors import ResourceError

    return ResourceError(f"cannot write: {error.strerror or error}", where=str(path),
                         fix="free space, or choose another --out")
