"""Reading the weights of the frozen encoders: files in, tensors out, into a model strictly, no code run from a file.

The libraries' own ``from_pretrained`` keeps random values for what a file lacks and only warns. Here a missing, extra
or mis-shaped tensor is an error, whichever version of the library is installed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import CheckpointError, nearest

if TYPE_CHECKING:
    import torch

_LFS_MARK = b"version https://git-lfs"
_REDOWNLOAD = "download the file again; the release is on Hugging Face and ModelScope"


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``folder/config.json``.

    Raises:
        CheckpointError: absent or not JSON.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no config.json in {folder}", where=str(folder)) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path), fix=_REDOWNLOAD) from None
    if not isinstance(values, dict):
        raise CheckpointError("not a JSON object", where=str(path), fix=_REDOWNLOAD)
    return values


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a component folder: those of its index, or the only one.

    Raises:
        CheckpointError: none, several without an index, or an index that names a file which is absent or elsewhere.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _indexed_files(folder, indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(f"{len(files)} safetensors files and no index that orders them", where=str(folder))
    pickled = sorted(folder.glob("*.bin"))
    raise CheckpointError(
        "no safetensors weights" + (f", only {pickled[0].name}" if pickled else ""),
        where=str(folder),
        fix="use the safetensors release of this component",
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError("not a safetensors index", where=str(index), fix=_REDOWNLOAD) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"shard name {name!r} is not a file name", where=str(index))
        if not (folder / name).is_file():
            raise CheckpointError(f"shard {name} is missing", where=str(index), fix=_REDOWNLOAD)
    return [folder / name for name in sorted(names)]


def read_safetensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Read every tensor of ``files`` (memory-mapped).

    Raises:
        CheckpointError: a damaged file, or one tensor in two files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read: {_reason(file, error)}", where=str(file), fix=_REDOWNLOAD) from None
        double = sorted(set(part) & set(tensors))
        if double:
            raise CheckpointError(f"{double[0]} is in another shard as well", where=str(file))
        tensors.update(part)
    return tensors


def read_pth(file: Path) -> dict[str, torch.Tensor]:
    """Read a ``.pth`` state dict (memory-mapped, ``weights_only``: no code in it can run).

    Raises:
        CheckpointError: damaged, an old-style pickle, or something else than a dict of tensors.
    """
    import torch

    if not file.is_file():
        raise CheckpointError("no such file", where=str(file))
    if not zipfile.is_zipfile(file):
        reason = _reason(file, ValueError("not a torch zip archive (truncated, or an old pickle)"))
        raise CheckpointError(f"cannot read: {reason}", where=str(file), fix=_REDOWNLOAD)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for a damaged archive
        raise CheckpointError(f"cannot read: {_reason(file, error)}", where=str(file), fix=_REDOWNLOAD) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError("not a state dict of tensors", where=str(file))
    return state


def _reason(file: Path, error: Exception) -> str:
    """Return one line on why a weight file does not open."""
    head = file.open("rb").read(64) if file.is_file() else b""
    if head.startswith(_LFS_MARK):
        return "this is a git-lfs pointer of a few bytes, not the weights (git lfs pull)"
    if not head:
        return "the file is empty"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is an HTML page, not weights"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_strict(model: torch.nn.Module, tensors: dict[str, torch.Tensor], *, where: str) -> None:
    """Put ``tensors`` into ``model`` (built on the meta device), sharing their memory; every name and shape must fit.

    Raises:
        CheckpointError: names up to five missing and unknown tensors, or the first wrong shape.
    """
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        parts = [f"{len(names)} {word} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                 for word, names in (("missing", missing), ("unknown", unknown)) if names]
        close = nearest(missing[0], unknown, limit=1) if missing and unknown else []
        raise CheckpointError(
            f"tensors do not fit {type(model).__name__}: {'; '.join(parts)}",
            where=where,
            fix=f"{missing[0]} may be what the file calls {close[0]}" if close else None,
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}, the model needs {list(expected[name].shape)}", where=where
            )
    model.load_state_dict(tensors, strict=True, assign=True)


def cast_floating(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors with floating ones in ``dtype`` (unchanged memory where they already are)."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def freeze(model: torch.nn.Module) -> None:
    """Put ``model`` in inference mode for good: no gradients, no dropout."""
    model.requires_grad_(False)
    model.eval()


# ---- identity of weights, for caches of what they computed ----------------------------------------------------------


@dataclass(frozen=True)
class FileIdentity:
    """A weight file as a feature cache remembers it."""

    name: str
    size: int
    mtime_ns: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def identify(files: Iterable[Path], known: Iterable[FileIdentity] = ()) -> list[FileIdentity]:
    """Hash ``files`` (BLAKE2b-128 of the content); a file with the size and time of a ``known`` one is not re-read."""
    remembered = {(entry.name, entry.size, entry.mtime_ns): entry for entry in known}
    result = []
    for file in files:
        stat = file.stat()
        found = remembered.get((file.name, stat.st_size, stat.st_mtime_ns))
        result.append(found or FileIdentity(file.name, stat.st_size, stat.st_mtime_ns, _digest(file)))
    return result


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
