"""Training checkpoints: plain torch DCP under ``<save>/iter_%07d/``, whole or absent, loadable in any layout.

A folder holds

- DCP files with the keys ``model.<MM name>`` (fp32 masters), ``optimizer.state.<MM name>.{exp_avg,exp_avg_sq}`` and
  ``ema.<MM name>``: global tensors, so tensor-, context-, FSDP2- and world sizes may differ when it is read again;
- ``wan.json``: architecture, task, expert, boundary and shift;
- ``training.json``: iteration, samples consumed, optimizer steps. Randomness follows from the seed and the samples
  consumed (there is no generator to save), the learning rate from the samples consumed;
- ``manifest.json``: size, CRC-32 and SHA-256 of every file.

It is written to a staging folder, hashed by the ranks that wrote it, renamed, and only then named by the tracker.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from mindspeed_wan.checkpoint import manifest
from mindspeed_wan.checkpoint.sources import MODEL_CARD, Found, check_expert, open_dcp
from mindspeed_wan.checkpoint.stored import copy_into
from mindspeed_wan.errors import CheckpointError, WanError
from mindspeed_wan.parallel.agreement import all_or_none, barrier, first_decides

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS_FILE = "training.json"
_FOLDER = re.compile(r"iter_(0\d{6}|[1-9]\d{6,})", re.ASCII)
"""The name that a save of ours has; any other spelling of a number is somebody else's."""


class OptimizerState(Protocol):
    """What a checkpoint needs of the optimizer (``training.optimizer.AdamW``)."""

    steps: int

    def masters(self) -> dict[str, Tensor]:
        """Name -> fp32 local weights."""

    def moments(self) -> Mapping[str, dict[str, Tensor]]:
        """Name -> moment name -> fp32 local tensor."""

    def masters_to_parameters(self) -> None:
        """Round the masters into the parameters."""

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what was written into the tensors of ``moments()``, which may be copies."""


@dataclass
class Progress:
    """How far a run has come. ``iteration`` counts from the first start, ``skipped`` the updates left out.

    ``bad_steps`` in a row were left out just now; ``loss_average`` (exponential, not yet bias-corrected) and
    ``loss_count`` are what a spike of the loss is measured against. ``command`` is the digest of the configuration
    that the run was started with.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    optimizer_steps: int = 0
    ema_updates: int = 0
    seed: int = 0
    global_batch_size: int = 0
    bad_steps: int = 0
    loss_count: int = 0
    loss_average: float = 0.0
    command: str = ""


# ---- what is saved -------------------------------------------------------------------------------------------


def view_like(view: Tensor, shard: Tensor) -> Tensor:
    """Return ``shard``, shaped like the local part of ``view``, as a global tensor laid out like ``view``; no copy."""
    from torch.distributed.tensor import DTensor

    from mindspeed_wan.parallel.dtensor import piece_of

    if not isinstance(view, DTensor):
        return shard
    return piece_of(shard, view.device_mesh, view.placements, shape=view.shape, stride=view.stride())


def state_views(views: Mapping[str, Tensor], optimizer: OptimizerState, *, with_moments: bool = True,
                ema: Mapping[str, Tensor] | None = None,
                moments: Mapping[str, Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """Return checkpoint key -> global view of the live tensor: weights (masters where trained), moments, EMA.

    Args:
        views: parameter name -> global view; frozen parameters are included as they are.
        optimizer: the optimizer over some or all of those parameters.
        with_moments: include the optimizer's moments.
        ema: name -> local average.
        moments: what ``optimizer.moments()`` returned, where the caller needs them too.
    """
    masters = optimizer.masters()
    state = {f"model.{n}": view_like(v, masters[n]) if n in masters else v for n, v in views.items()}
    if with_moments:
        for name, kinds in (optimizer.moments() if moments is None else moments).items():
            state.update({f"optimizer.state.{name}.{kind}": view_like(views[name], shard)
                          for kind, shard in kinds.items()})
    for name, average in (ema or {}).items():
        state[f"ema.{name}"] = view_like(views[name], average)
    return state


@dataclass(frozen=True)
class Record:
    """What is written beside the tensors: ``training.json``, ``wan.json``; and how many iterations to keep.

    ``attach`` writes further files into the folder on rank 0, before it is sealed.
    """

    progress: Progress
    card: Mapping[str, Any]
    keep_last: int | None = None
    attach: Callable[[Path], None] | None = None


def save(root: str | Path, state: Mapping[str, Tensor], record: Record) -> Path:
    """Write ``root/iter_%07d`` and move the tracker to it. Collective; returns the folder.

    Args:
        root: the save folder (``--save``).
        state: key -> global view, from :func:`state_views`.
        record: progress, model card and retention.

    Raises:
        ResourceError: on every rank, when the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = final_folder(root, record)
    staging = first_decides(lambda: open_staging(final))
    all_or_none(lambda: _write_shards(staging, state))
    records = gather_records(all_or_none(lambda: hash_own_files(staging)))
    first_decides(lambda: commit(staging, final, records, record))
    return final


def final_folder(root: str | Path, record: Record) -> Path:
    """Return the folder that ``record`` is saved in."""
    return Path(root) / f"iter_{record.progress.iteration:07d}"


def open_staging(final: Path) -> Path:
    """Create the staging folder of ``final`` and drop those of interrupted saves. Rank 0."""
    manifest.remove_stale_staging(final.parent)
    return manifest.staging_folder(final)


def writer(staging: Path) -> Any:
    """Return torch's DCP writer: one file per rank; ``commit_folder`` flushes all of them at once."""
    import torch.distributed.checkpoint as dcp

    return dcp.FileSystemWriter(staging, single_file_per_rank=True, sync_files=False, overwrite=True)


def _write_shards(staging: Path, state: Mapping[str, Tensor]) -> None:
    """Write this rank's part with torch's own DCP writer."""
    import torch.distributed.checkpoint as dcp

    with write_errors(staging):
        dcp.save(dict(state), storage_writer=writer(staging), no_dist=not dist.is_initialized())


@contextmanager
def write_errors(staging: Path) -> Iterator[None]:
    """Turn what torch's writer raises (a collection of per-rank failures) into the one error that matters."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise _first_failure(error, staging) from None
    except OSError as error:
        raise manifest.disk_error(error, staging) from None


def _first_failure(error: Any, staging: Path) -> WanError:
    failures = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    for failure in failures:
        if isinstance(failure, OSError):
            return manifest.disk_error(failure, staging)
    text = str(failures[0]) if failures else str(error)
    if "No space" in text or "PytorchStreamWriter" in text or "unexpected pos" in text:
        return manifest.disk_error(OSError(errno.ENOSPC, f"No space left on device ({text.splitlines()[0]})"), staging)
    return CheckpointError(f"could not be written: {text.splitlines()[0]}", where=str(staging))


def hash_own_files(staging: Path) -> dict[str, manifest.FileRecord]:
    """Hash the files that this rank wrote."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        return {path.name: manifest.hash_file(path) for path in sorted(staging.glob(f"__{rank}_*.distcp"))}
    except OSError as error:
        raise manifest.disk_error(error, staging) from None


def gather_records(records: dict[str, manifest.FileRecord]) -> dict[str, manifest.FileRecord]:
    """Return the records of all ranks. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return records
    parts: list[dict[str, manifest.FileRecord] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return {name: record for part in parts if part for name, record in part.items()}


def commit(staging: Path, final: Path, records: Mapping[str, manifest.FileRecord], record: Record) -> None:
    """Seal the staging folder, put it in place, move the tracker, remove what is too old. Rank 0."""
    manifest.write_text_atomic(staging / MODEL_CARD, json.dumps(record.card, indent=2) + "\n")
    if record.attach is not None:
        record.attach(staging)
    manifest.write_text_atomic(staging / PROGRESS_FILE, json.dumps(asdict(record.progress), indent=2) + "\n")
    manifest.write_manifest(staging, {"iteration": record.progress.iteration}, known=records)
    manifest.announce_next(final.parent, record.progress.iteration, staging)
    manifest.commit_folder(staging, final)
    manifest.write_tracker(final.parent, record.progress.iteration)
    if record.keep_last is not None:
        remove_old(final.parent, record.keep_last)


def remove_old(root: Path, keep_last: int) -> list[Path]:
    """Remove all but the newest ``keep_last`` complete iterations up to the tracker's, which always stays.

    Folders without a manifest, and those newer than the tracker, are neither counted nor touched: they are somebody
    else's, of a branch that was left, or damage to look at.
    """
    named = manifest.read_tracker(root)
    older = [folder for iteration, folder in complete_iterations(root) if iteration < int(named)]
    old = older[max(keep_last - 1, 0):]
    for folder in old:
        # Under a staging name a half-removed folder does not look complete, and the next save clears it.
        doomed = manifest.staging_path(folder)
        with suppress(OSError):
            if os.path.lexists(doomed):
                manifest.remove_folder(doomed)
            os.rename(folder, doomed)
            manifest.remove_folder(doomed)
    return old


def set_aside(root: Path, *, above: int | None, spare: Path | None = None, files: Sequence[str] = ()) -> Path | None:
    """Move the complete iterations newer than ``above`` (all for ``None``) into a folder of their own.

    A run that starts from an older checkpoint leaves them: nothing may take them for its own saves later. The tracker
    is set back first, so whoever is killed on the way finds them newer than the tracker and goes on moving them.

    Args:
        root: the save folder; its lock is held.
        above: the iteration that the run starts from.
        spare: a folder to leave in place, and the tracker with it: the weights start from there.
        files: names in ``root`` that are copied with them where they exist.

    Returns:
        The new folder, a checkpoint root itself; ``None`` when there is nothing to move.
    """
    newer = [(iteration, folder) for iteration, folder in complete_iterations(root)
             if (above is None or iteration > above) and not (spare is not None and folder.samefile(spare))]
    try:
        if above is not None and manifest.tracker_or_none(root) != above:
            manifest.write_tracker(root, above)
        if not newer:
            return None
        if above is None and spare is None:
            (root / manifest.TRACKER_NAME).unlink(missing_ok=True)
        aside = next(path for path in (root / f"abandoned_{number}" for number in count(1)) if not path.exists())
        aside.mkdir()
        for name in files:
            if (root / name).is_file():
                shutil.copyfile(root / name, aside / name)
        for _, folder in newer:
            os.rename(folder, aside / folder.name)
        manifest.write_tracker(aside, newer[0][0])
        manifest.fsync_folder(root)
    except OSError as error:
        raise manifest.disk_error(error, root) from None
    return aside


def complete_iterations(root: str | Path) -> list[tuple[int, Path]]:
    """Return (iteration, folder) of every ``iter_*`` folder of ours that has a manifest, newest first."""
    found = []
    for folder in Path(root).glob("iter_*"):
        match = _FOLDER.fullmatch(folder.name)
        if match and (folder / manifest.MANIFEST_NAME).is_file() and (folder / PROGRESS_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found, reverse=True)


# ---- what is loaded ------------------------------------------------------------------------------------------


def newest(root: str | Path, *, step: int | None = None, strict: bool = False, full_hash: bool = False,
           warn: Any = print) -> Found | None:
    """Return the training checkpoint of ``root`` to resume from, verified; ``None`` when it holds none of ours.

    A damaged newest checkpoint is reported through ``warn`` and the one before it is taken, unless ``strict`` or an
    explicit ``step`` ask for that very one. Call on rank 0 and share the answer (:func:`agreement.first_decides`).
    """
    iterations = complete_iterations(root)
    if step is None:
        named = manifest.named_iteration(root)
        if named == manifest.RELEASE:
            return None
        wanted = iterations if named is None else _up_to(int(named), iterations, Path(root), strict=strict, warn=warn)
    else:
        wanted = [entry for entry in iterations if entry[0] == step]
    failure: WanError | None = None
    for iteration, folder in wanted:
        try:
            stored = manifest.verify_manifest(folder, full=full_hash).get("iteration")
            if stored not in (None, iteration):
                raise CheckpointError(f"holds iteration {stored}: the folder was renamed or copied", where=str(folder),
                                      fix="give it back its name, or remove it")
        except CheckpointError as error:
            if strict or step is not None:
                raise
            failure = failure or error
            warn(f"warning: checkpoint {folder.name} is damaged and skipped: {error.where}: {error.message}")
            continue
        return Found(folder, "dcp", iteration)
    if failure is not None:
        raise failure
    return None


def _up_to(named: int, iterations: list[tuple[int, Path]], root: Path, *, strict: bool,
           warn: Any) -> list[tuple[int, Path]]:
    """Return the iterations up to the tracker's, and say so when that one is missing or is not the newest."""
    if not iterations:
        manifest.checkpoint_folder(root)  # a folder that is gone is an error, not a fresh start
    tracker, older = root / manifest.TRACKER_NAME, [entry for entry in iterations if entry[0] <= named]
    newer = ", ".join(folder.name for _, folder in reversed(iterations[:len(iterations) - len(older)]))
    if iterations and not older:
        raise CheckpointError(f"names iteration {named}, which is no complete checkpoint here; newer ones are {newer}",
                              where=str(tracker), fix="write the number of one of them into it, or copy that one again")
    if older and older[0][0] != named:
        message = f"names iteration {named}, which is no complete checkpoint here; the one before is {older[0][1].name}"
        if strict:
            raise CheckpointError(message, where=str(tracker), fix="copy that iteration again, or correct the tracker")
        warn(f"warning: {tracker}: {message}")
    if newer:
        warn(f"warning: {tracker}: names iteration {named}; the newer {newer} are not used")
    return older


def read_progress(folder: Path) -> Progress:
    """Return the ``training.json`` of a checkpoint folder."""
    path = folder / PROGRESS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, type] = {field.name: type(field.default) for field in fields(Progress)}
        return Progress(**{key: kinds[key](value) for key, value in values.items() if key in kinds})
    except FileNotFoundError:
        raise CheckpointError("the checkpoint says nothing about how far its run had come", where=str(path),
                              fix="pass --finetune to take only its weights and start at iteration 0") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from None


def load(found: Found, views: Mapping[str, Tensor], optimizer: OptimizerState, *, with_moments: bool = True,
         ema: Mapping[str, Tensor] | None = None, expert: str | None = None) -> Progress:
    """Load weights, moments and EMA of ``found`` in place, in whatever layout this job has. Collective.

    Args:
        found: from :func:`newest`.
        views: parameter name -> global view.
        optimizer: its masters and moments are written; its parameters are rounded from the masters.
        with_moments: ``False`` leaves the moments as they are (``--no-load-optim``).
        ema: name -> local average, written in place; taken from the weights when the checkpoint has no average.
        expert: refuse a checkpoint of the other expert.

    Raises:
        CheckpointError: on every rank, when a tensor is missing, of another shape, or there is no optimizer state.
    """
    check_expert(found, expert)
    progress = first_decides(lambda: read_progress(found.path))
    moments = optimizer.moments() if with_moments else {}
    state = state_views(views, optimizer, with_moments=with_moments, ema=ema, moments=moments)
    elsewhere = _keys_elsewhere(state)
    all_or_none(lambda: _read_state(found.path, state, elsewhere))
    optimizer.masters_to_parameters()
    if with_moments:
        optimizer.take_moments(moments)
    optimizer.steps = progress.optimizer_steps if with_moments else 0
    barrier()
    return progress


def _keys_elsewhere(state: Mapping[str, Tensor]) -> set[str]:
    """Return the keys that only other ranks hold: those of the other pipeline stages. Collective."""
    from torch.distributed.tensor import DTensor

    view = next(iter(state.values()), None)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(view, DTensor) or view.device_mesh.size() == ranks:
        return set()
    keys: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(keys, list(state))
    return {key for part in keys for key in part}.difference(state)


def _read_state(folder: Path, state: Mapping[str, Tensor], elsewhere: set[str]) -> None:
    with open_dcp(folder) as files:
        names = {key: key for key in state}
        if not any(key.startswith("ema.") for key in files.tensors):
            names.update({key: f"model.{key.removeprefix('ema.')}" for key in state if key.startswith("ema.")})
        if not any(key.startswith("optimizer.") for key in files.tensors) and any(
                key.startswith("optimizer.") for key in state):
            raise CheckpointError("was saved without optimizer state (--no-save-optim)", where=str(folder),
                                  fix="pass --no-load-optim to go on with fresh moments")
        here = {key: stored for key, stored in files.tensors.items() if key not in elsewhere}
        _check_state(here, state, names, folder)
        copy_into(files, state, names)


def _check_state(tensors: Mapping[str, Any], state: Mapping[str, Tensor], names: Mapping[str, str],
                 folder: Path) -> None:
    missing = [key for key in state if names[key] not in tensors]
    unknown = [key for key in tensors if key.startswith("model.") and key not in state]
    wrong = [f"{key} {list(tensors[names[key]].shape)} instead of {list(view.shape)}" for key, view in state.items()
             if names[key] in tensors and tensors[names[key]].shape != tuple(view.shape)]
    problems = [f"{len(found)} {label}: {', '.join(found[:10])}"
                for label, found in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)) if found]
    if problems:
        raise CheckpointError("is not a checkpoint of this model: " + "; ".join(problems), where=str(folder),
                              fix="resume with the model.json the run was started with")
