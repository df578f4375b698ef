"""Folders that are whole or absent: manifest, atomic commit, tracker file.

A checkpoint is written to a staging folder, sealed with ``manifest.json`` (size, CRC-32 and SHA-256 of every
file), renamed into place by ``commit_folder``, and only then named by the tracker file. A process killed at any
point leaves the previous checkpoint untouched and at worst a staging folder, which the next run removes. torch's
own DCP files carry no checksums, so the manifest is what finds a flipped bit. No torch here.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import CheckpointError, ResourceError

MANIFEST_NAME = "manifest.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_NEXT_NAME = f".{TRACKER_NAME}.next"
_MANIFEST_VERSION = 2
"""2 added the seal, a checksum of the manifest itself; 1 is still read."""
_BLOCK = 8 << 20
_TRACKER_LIMIT = 64


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes, CRC-32 and SHA-256 (both lower-case hex) of one file."""

    size: int
    crc32: str
    sha256: str


class Digest:
    """CRC-32 and SHA-256 of a byte stream in one pass; ``record()`` gives the ``FileRecord``."""

    def __init__(self) -> None:
        self._size, self._crc, self._sha = 0, 0, hashlib.sha256()

    def update(self, block: bytes | bytearray | memoryview) -> None:
        """Add ``block`` (any contiguous byte buffer)."""
        view = memoryview(block).cast("B")
        self._size += len(view)
        self._crc = zlib.crc32(view, self._crc)
        self._sha.update(view)

    def record(self) -> FileRecord:
        """Return what has been seen so far."""
        return FileRecord(self._size, f"{self._crc:08x}", self._sha.hexdigest())


def hash_file(path: str | os.PathLike[str], *, full: bool = True) -> FileRecord:
    """Read ``path`` once, in blocks of 8 MiB; ``full=False`` skips the SHA-256 (left empty), three times faster."""
    digest, size, crc = Digest(), 0, 0
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            if full:
                digest.update(block)
            else:
                size, crc = size + len(block), zlib.crc32(block, crc)
    return digest.record() if full else FileRecord(size, f"{crc:08x}", "")


# ---- manifest ------------------------------------------------------------------------------------------------


def write_manifest(folder: str | os.PathLike[str], extra: Mapping[str, Any] | None = None, *,
                   known: Mapping[str, FileRecord] | None = None) -> Path:
    """Write ``folder/manifest.json`` over every file below ``folder`` and return its path.

    Args:
        folder: a staging folder that nobody writes to any more.
        extra: JSON-ready values stored beside ``files``.
        known: records of files hashed while they were written (relative POSIX path -> record); not read again.
    """
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(_regular_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST_NAME:
            continue
        record = known[name] if known and name in known else hash_file(path)
        if record.size != path.stat().st_size:
            raise CheckpointError(f"changed while it was being written ({record.size} bytes expected)", where=str(path))
        files[name] = asdict(record)
    target = folder / MANIFEST_NAME
    content = {**(extra or {}), "version": _MANIFEST_VERSION, "files": files}
    try:
        # Flushed by commit_folder with everything else.
        target.write_text(json.dumps({**content, "seal": _seal(content)}, indent=1), encoding="utf-8")
    except OSError as error:
        raise disk_error(error, target) from None
    return target


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the parsed manifest of ``folder``; ``CheckpointError`` when it is absent or garbled."""
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != 1 and manifest.pop("seal") != _seal(manifest):
            raise ValueError("its own checksum does not match")
        for name, record in manifest["files"].items():
            if not isinstance(name, str) or set(record) != {"size", "crc32", "sha256"}:
                raise ValueError(f"bad entry {name!r}")
    except FileNotFoundError:
        raise CheckpointError("the manifest is missing: the folder is not a complete checkpoint", where=str(path),
                              fix="use another iteration, or write it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"the manifest cannot be read ({error})", where=str(path),
                              fix="the folder is damaged; use another iteration") from None
    return dict(manifest)


def _seal(content: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a manifest's content, which finds a flipped bit in the manifest itself."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def verify_manifest(folder: str | os.PathLike[str], full: bool = False) -> dict[str, Any]:
    """Check every file of ``folder`` against its manifest and return the manifest.

    Args:
        folder: a committed checkpoint folder.
        full: compare SHA-256 as well; otherwise size and CRC-32 (finds every single flipped bit, at disk speed).

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    for name, wanted in records.items():
        path = confined(folder, name)
        with _reading(path):
            size = path.stat().st_size if path.is_file() else None
        if size != wanted.size:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{state}; the manifest says {wanted.size} bytes", where=str(path), fix=_REFETCH)
    for name, wanted in records.items():
        with _reading(folder / name):
            found = hash_file(folder / name, full=full)
        if found.crc32 != wanted.crc32 or (full and found.sha256 != wanted.sha256):
            raise CheckpointError("its content does not match the checksum of the manifest", where=str(folder / name),
                                  fix=_REFETCH)
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Take what the disk cannot give for damage, like a file with other content."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path), fix=_REFETCH) from None


_REFETCH = "the file is damaged; use another checkpoint, copy it again, or convert it again"


def confined(folder: Path, name: str) -> Path:
    """Return ``folder/name``; ``CheckpointError`` when ``name`` leads outside ``folder`` (``..``, absolute, link)."""
    path = folder / name
    plain = bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    plain = plain and not any("\ud800" <= letter <= "\udbff" for letter in name)  # no file system can hold these
    # realpath, since a link that leads to itself is an error to resolve()
    if not plain or not _stays_inside(Path(os.path.realpath(path)), Path(os.path.realpath(folder))):
        raise CheckpointError(f"file name {name!r} leads outside the folder", where=str(folder),
                              fix="do not use this checkpoint: it names files it has no business with")
    return path


def _stays_inside(path: Path, root: Path) -> bool:
    """True below ``root``; huggingface_hub's cache links ``snapshots/<revision>/*`` to ``blobs/``, which is fine."""
    if path.is_relative_to(root):
        return True
    cache = next((parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    return cache is not None and path.parent == cache / "blobs"


def _regular_files(folder: Path) -> Iterator[Path]:
    return (Path(base) / name for base, _, names in os.walk(folder) for name in names)


# ---- atomic files and folders --------------------------------------------------------------------------------


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that readers see the old or the new content, never a part (fsync + rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from None
    fsync_folder(path.parent)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush the folder's own entry list, so that a rename survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows and some network mounts cannot open folders; there is nothing to flush there.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise disk_error(error, folder) from None
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: str | os.PathLike[str]) -> ResourceError:
    """Return the ``ResourceError`` for a failed write: disk full, quota, file-size limit, read-only, permissions."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space or choose another disk" if full else "choose a folder that you can write to"
    return ResourceError(f"cannot write: {error.strerror or error}", where=str(path), fix=fix)


def staging_folder(final: str | os.PathLike[str], *, fresh: bool = True) -> Path:
    """Create and return the staging folder of ``final``: its hidden sibling ``.<name>.tmp``.

    The name depends on ``final`` only, so every rank of a run finds the same folder; let one rank create it.

    Args:
        final: the folder that ``commit_folder`` will put in place.
        fresh: remove what an interrupted run left there; ``False`` keeps it (to resume).
    """
    staging = staging_path(final)
    recover(final)
    try:
        if fresh and staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, staging) from None
    return staging


def staging_path(final: str | os.PathLike[str]) -> Path:
    """Return the path of the staging folder of ``final`` without creating it."""
    final = Path(final)
    return final.with_name(f".{final.name}.tmp")


def remove_stale_staging(root: str | os.PathLike[str]) -> list[Path]:
    """Remove the staging folders and unfinished trackers that killed runs left below ``root``; return their paths."""
    stale = [p for p in Path(root).glob(".*.tmp") if p.is_dir() and not p.is_symlink()]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    # A kill between writing a tracker or its note and renaming it leaves the temporary file of a process that is gone.
    for path in Path(root).glob(f".*{TRACKER_NAME}.*.tmp"):
        if path.is_file() and path.name.split(".")[-2] != str(os.getpid()):
            path.unlink(missing_ok=True)
            stale.append(path)
    return stale


def commit_folder(tmp: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Put the staging folder ``tmp`` in place as ``final``, durably and atomically.

    Files and folders are flushed first. An old ``final`` is exchanged in one step where the kernel can do it
    (Linux ``renameat2``); elsewhere it is moved aside and ``recover`` puts it back should the process die between
    the two renames. The old folder is deleted only after the new one is in place.
    """
    tmp, final = Path(tmp), Path(final)
    try:
        _fsync_tree(tmp)
        if not final.is_symlink() and (not final.exists() or (final.is_dir() and not any(final.iterdir()))):
            os.rename(tmp, final)
        elif _exchange(tmp, final):
            fsync_folder(final.parent)
            remove_folder(tmp)
        else:
            aside = _aside_path(final)
            os.rename(final, aside)
            os.rename(tmp, final)
            fsync_folder(final.parent)
            remove_folder(aside)
        fsync_folder(final.parent)
    except OSError as error:
        raise disk_error(error, final) from None


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link without touching what it points at."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def recover(final: str | os.PathLike[str]) -> None:
    """Finish a ``commit_folder`` that died between its two renames: put the old folder back, or drop it."""
    final = Path(final)
    aside = _aside_path(final)
    if not aside.exists():
        return
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, final)


def _aside_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _fsync_tree(folder: Path) -> None:
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(base, name)
            if not os.path.islink(path):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        fsync_folder(base)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically; ``False`` where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


# ---- tracker -------------------------------------------------------------------------------------------------


def write_tracker(root: str | os.PathLike[str], iteration: int | str) -> None:
    """Name the newest complete checkpoint of ``root``: an iteration number or ``"release"``. Call it last."""
    write_text_atomic(Path(root) / TRACKER_NAME, str(_parse_tracker(str(iteration), Path(root) / TRACKER_NAME)))
    (Path(root) / _NEXT_NAME).unlink(missing_ok=True)


def announce_next(root: str | os.PathLike[str], iteration: int, folder: str | os.PathLike[str]) -> None:
    """Note that ``iteration`` is about to be put in place and the tracker to be moved to it.

    A process killed between those two leaves the note, by which ``committed_next`` tells the checkpoint it had just
    finished from a newer one that somebody has set the tracker back from.

    Args:
        root: the checkpoint root.
        iteration: the number of the new checkpoint.
        folder: its staging folder, sealed.
    """
    note = {"iteration": iteration, "manifest": hash_file(Path(folder) / MANIFEST_NAME).sha256}
    write_text_atomic(Path(root) / _NEXT_NAME, json.dumps(note) + "\n")


def committed_next(root: str | os.PathLike[str]) -> int | None:
    """Return the iteration that was put in place, but not yet named by the tracker, when its process was killed."""
    try:
        note = json.loads((Path(root) / _NEXT_NAME).read_text(encoding="utf-8"))
        iteration = int(note["iteration"])
        sealed = hash_file(checkpoint_folder(root, iteration) / MANIFEST_NAME).sha256
        return iteration if sealed == note["manifest"] else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, CheckpointError):
        return None  # no note, a torn one, or the kill came before the folder was in place


def read_tracker(root: str | os.PathLike[str]) -> int | str:
    """Return the iteration number or ``"release"`` that the tracker of ``root`` names.

    Surrounding white space, a BOM and Windows line ends are tolerated (``echo release >`` writes them); anything
    else is a ``CheckpointError``, where Megatron-LM exits with code 0.
    """
    path = Path(root) / TRACKER_NAME
    try:
        with open(path, "rb") as stream:
            raw = stream.read(_TRACKER_LIMIT + 1)
    except FileNotFoundError:
        raise CheckpointError("the tracker file is missing", where=str(path),
                              fix=f"point at the folder that holds {TRACKER_NAME} and {RELEASE}/ or iter_*/") from None
    except OSError as error:
        raise CheckpointError(f"the tracker cannot be read: {error.strerror}", where=str(path)) from None
    if len(raw) > _TRACKER_LIMIT:
        raise CheckpointError("the tracker is not one short word", where=str(path), fix=_TRACKER_FIX)
    return _parse_tracker(raw.decode("utf-8-sig", errors="replace"), path)


def tracker_or_none(root: str | os.PathLike[str]) -> int | str | None:
    """Return what the tracker names, ``None`` where there is none; a torn one is an error."""
    return read_tracker(root) if (Path(root) / TRACKER_NAME).exists() else None


def named_iteration(root: str | os.PathLike[str]) -> int | str | None:
    """Return what the tracker names, or ought to: its process may have been killed just before. ``None`` without one.

    Raises:
        CheckpointError: the tracker is torn.
    """
    named, pending = tracker_or_none(root), committed_next(root)
    if pending is not None and (not isinstance(named, int) or pending > named):
        return pending
    return named


def checkpoint_folder(root: str | os.PathLike[str], iteration: int | str | None = None) -> Path:
    """Return ``root/release`` or ``root/iter_%07d``, for ``iteration`` or for what the tracker names."""
    value = read_tracker(root) if iteration is None else iteration
    folder = Path(root) / (RELEASE if value == RELEASE else f"iter_{int(value):07d}")
    if not folder.is_dir() and iteration is not None:
        there = sorted(path.name for path in Path(root).glob("iter_*") if path.is_dir())
        raise CheckpointError(f"has no {folder.name}", where=str(root),
                              fix=f"it holds {', '.join(there[-5:])}" if there else "it holds no iterations at all")
    if not folder.is_dir():
        raise CheckpointError(f"names {value!r}, but {folder.name}/ does not exist",
                              where=str(Path(root) / TRACKER_NAME), fix=_TRACKER_FIX)
    return folder


_TRACKER_FIX = f"write the number of a complete iteration, or '{RELEASE}', into it"


def _parse_tracker(text: str, path: Path) -> int | str:
    word = text.strip()
    if word == RELEASE:
        return RELEASE
    if word.isascii() and word.isdigit():
        return int(word)
    raise CheckpointError(f"the tracker says {word[:40]!r}, not an iteration number or '{RELEASE}'", where=str(path),
                          fix=_TRACKER_FIX)
