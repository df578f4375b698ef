"""Write the planned files: several at a time, and continued where an interrupted run stopped.

Every worker writes one file at a time through an ``OutputStream``. A finished file is flushed to disk and noted in a
journal; ``--resume`` keeps the noted files and writes the others again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.manifest import FileRecord, disk_error
from mindspeed_wan_converters.plan import Constant, Deferred, OutputFile, Slice
from mindspeed_wan_converters.progress import Progress
from mindspeed_wan_converters.stream import BLOCK, Expected, OutputStream, StoppedError, Written
from mindspeed_wan_converters.tensors import SourceFiles, as_file_range, iter_blocks


def write_files(files: Sequence[OutputFile], folder: Path, progress: Progress, *, workers: int,
                fingerprint: str = "", resume: bool = False) -> dict[str, Written]:
    """Write ``files`` below ``folder`` and return what was written, by name.

    Args:
        files: the plan; directories are made as needed.
        folder: the staging folder.
        progress: told every byte.
        workers: files written at the same time.
        fingerprint: identifies plan and sources in the journal.
        resume: keep the files that the journal of an interrupted run with this fingerprint names.

    Raises:
        ResourceError: the disk is full or not writable.
        CheckpointError: a source file is damaged or ends early.
    """
    journal = _Journal(journal_path(folder), fingerprint, resume)
    done = {f.name: journal.done[f.name] for f in files if journal.keeps(f, folder)}
    progress.skip(sum(f.size for f in files if f.name in done))
    stop = threading.Event()

    def work(file: OutputFile) -> tuple[str, Written]:
        try:
            return file.name, _write_one(file, folder, sources, progress, stop, journal)
        except BaseException:
            stop.set()
            raise

    with SourceFiles() as sources, ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        # Large files first, so that no worker is left alone with the largest at the end.
        todo = sorted((f for f in files if f.name not in done), key=lambda f: -f.size)
        futures = [pool.submit(work, file) for file in todo]
        try:
            errors = [e for f in futures if (e := f.exception()) is not None]
        except BaseException:  # Ctrl-C: let the workers stop at their next buffer
            stop.set()
            raise
    real = [e for e in errors if not isinstance(e, StoppedError)]
    if real:
        raise real[0]
    done.update(future.result() for future in futures)
    return done


def journal_path(folder: Path) -> Path:
    """Return the journal of a staging folder; it lies beside it, so that the folder holds nothing but the target."""
    return folder.with_name(f"{folder.name}.journal")


# ---- one file ------------------------------------------------------------------------------------------------


def _write_one(file: OutputFile, folder: Path, sources: SourceFiles, progress: Progress, stop: threading.Event,
               journal: _Journal) -> Written:
    if stop.is_set():
        raise StoppedError
    path = folder / file.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with OutputStream(path, file.size, progress, stop) as stream:
            for part in file.parts:
                if isinstance(part, Constant):
                    stream.put(part.data)
                elif isinstance(part, Deferred):
                    stream.put_deferred(part)
                else:
                    _write_slice(part, stream, sources)
            written = stream.finish()
    except OSError as error:
        raise disk_error(error, path) from None
    journal.note(file.name, written)
    return written


def _write_slice(part: Slice, stream: OutputStream, sources: SourceFiles) -> None:
    stream.begin_slice()
    source = as_file_range(part.tensor, part.box, part.code)
    if source is None:
        for block in iter_blocks(part.tensor, part.box, part.code, sources, BLOCK):
            stream.put(memoryview(block).cast("B"))
        stream.end_slice()
        return
    done = 0
    while done < source.length:
        with stream.room(source.length - done) as view:
            sources.read_into(source.path, source.offset + done, view, once=True)
            done += len(view)
    stream.end_slice(None if source.crc32 is None else Expected(source.crc32, part.tensor.name, source.path))


# ---- journal -------------------------------------------------------------------------------------------------


class _Journal:
    """The finished files of a staging folder, one JSON line each behind a line with the plan's fingerprint."""

    def __init__(self, path: Path, fingerprint: str, resume: bool) -> None:
        self._path, self._lock = path, threading.Lock()
        self.done: dict[str, Written] = self._read(fingerprint) if resume else {}
        lines = [json.dumps({"plan": fingerprint}), *(self._line(n, w) for n, w in self.done.items())]
        try:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(error, path) from None

    def keeps(self, file: OutputFile, folder: Path) -> bool:
        """True when ``file`` was finished earlier and is still there at full size."""
        path = folder / file.name
        return file.name in self.done and path.is_file() and path.stat().st_size == file.size

    def note(self, name: str, written: Written) -> None:
        """Add a finished file. Its data is on disk already, so losing the line costs time and never correctness."""
        with self._lock:
            try:
                with open(self._path, "a", encoding="utf-8") as stream:
                    stream.write(self._line(name, written) + "\n")
            except OSError as error:
                raise disk_error(error, self._path) from None

    def _read(self, fingerprint: str) -> dict[str, Written]:
        try:
            first, *lines = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"plan": fingerprint}:
                return {}
        except (OSError, ValueError):
            return {}
        done: dict[str, Written] = {}
        for line in lines:
            try:
                raw: Mapping[str, Any] = json.loads(line)
                done[raw["name"]] = Written(FileRecord(**raw["record"]), tuple(raw["slices"]))
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the process died
        return done

    @staticmethod
    def _line(name: str, written: Written) -> str:
        return json.dumps({"name": name, "record": asdict(written.record), "slices": list(written.slice_crcs)})
