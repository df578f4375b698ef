"""One conversion from beginning to end: read the tables, plan, check the disk, write to a staging folder, commit.

The target appears in one rename, complete with manifests, or not at all. ``--resume`` continues in the staging folder
when plan and sources are unchanged; ``--overwrite`` exchanges an older result for the new one at the very end.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.lock import locked_target
from mindspeed_wan.checkpoint.manifest import (
    MANIFEST_NAME,
    RELEASE,
    commit_folder,
    disk_error,
    staging_folder,
    verify_manifest,
    write_manifest,
    write_text_atomic,
    write_tracker,
)
from mindspeed_wan.errors import ConfigError, ResourceError, WanError
from mindspeed_wan_converters.checks import check_same_model, check_task
from mindspeed_wan_converters.formats import dcp, hf, mm, original
from mindspeed_wan_converters.plan import CARD_NAME, Layout, OutputFile, Slice, Weights
from mindspeed_wan_converters.progress import Progress, human
from mindspeed_wan_converters.sources import FORMATS, read_all, recognise
from mindspeed_wan_converters.stream import Written
from mindspeed_wan_converters.writer import journal_path, write_files

_CODES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
DEFAULT_SHARD = 5 * 10**9
_RESERVE = 64 << 20  # bytes left free beyond the plan: manifests, the file system's own needs


@dataclass(frozen=True)
class Options:
    """What the command line says about a conversion.

    ``dtype`` is fp32, bf16, fp16 or ``None`` (as stored); ``task`` is set by Wan2.2T2VConverter and
    Wan2.2I2VConverter; ``max_shard_size`` is in bytes, for safetensors shards and DCP files.
    """

    source: Path
    target: Path
    expert: str | None = None
    hf_dir: Path | None = None
    parallel: mm.Parallel = field(default_factory=mm.Parallel)
    dtype: str | None = None
    max_shard_size: int = DEFAULT_SHARD
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    quiet: bool = False
    task: str | None = None
    converter: str = "WanConverter"


def run(source_format: str, target_format: str, options: Options) -> None:
    """Convert ``options.source`` into ``options.target``; the verbs are calls of this.

    Raises:
        ConfigError: paths or options that cannot be meant.
        CheckpointError: the source is damaged, incomplete, or another model.
        ResourceError: not enough disk, or the target cannot be written.
    """
    options = replace(options, source=_clean(options.source), target=_clean(options.target))
    _check_paths(options)
    hint = hf.config_of(options.hf_dir) if options.hf_dir else None
    weights = read_all(recognise(options.source), source_format, options.expert, hint)
    for found in weights.values():
        check_task(found, options.task, options.converter)
        if hint is not None:
            check_same_model(found, hint, f"--cfg.hf_dir {options.hf_dir}")
    layout = plan(weights, target_format, options)
    _print_plan(weights, layout, target_format, options)
    if options.dry_run:
        return
    with locked_target(options.target):
        _check_paths(options)  # another conversion may have finished meanwhile
        _write(layout, options)
        if target_format == "hf":
            _complete_parent(options)
    print(f"wrote {options.target} ({human(layout.size)})")


def plan(weights: Mapping[str | None, Weights], target: str, options: Options) -> Layout:
    """Return the target's files.

    Two experts go into a subfolder each. One expert is the target itself, but with a pipeline as ``--cfg.hf_dir``
    the target of ``*_to_hf`` is a pipeline too: the target folder, or its parent when it is called ``transformer``
    or ``transformer_2`` (see ``_complete_parent``).
    """
    layouts = {expert: _lay_out(found, target, options) for expert, found in weights.items()}
    pipeline = _pipeline_of(target, options)
    if len(layouts) == 1 and (pipeline is None or options.target.name in _EXPERT_NAMES):
        _check_place(next(iter(weights.values())), target, options)
        return next(iter(layouts.values()))
    folders = original.EXPERT_FOLDERS if target == "original" else hf.EXPERT_FOLDERS
    result = Layout()
    for expert, layout in layouts.items():
        result.merge(layout.below(folders[expert or _only_expert(weights, options)]))
    if pipeline is not None:
        hf.add_pipeline_parts(result, pipeline)
    return result


_EXPERT_NAMES = {"transformer": "high", "transformer_2": "low"}


def _pipeline_of(target: str, options: Options) -> Path | None:
    """Return the pipeline folder that completes the target, if one is given."""
    complete = target == "hf" and options.hf_dir is not None and (options.hf_dir / "model_index.json").is_file()
    return options.hf_dir if complete else None


def _check_place(weights: Weights, target: str, options: Options) -> None:
    """Refuse to write one expert into the folder that Diffusers reads the other from."""
    place = _EXPERT_NAMES.get(options.target.name)
    if target == "hf" and place and weights.card.expert and weights.card.expert != place and _two_experts(options):
        raise ConfigError(f"{options.target.name}/ is the {place} expert's place, these are the "
                          f"{weights.card.expert} expert's weights", where=str(options.target),
                          fix=f"write to {hf.EXPERT_FOLDERS[weights.card.expert]}/")


def _two_experts(options: Options) -> bool:
    index = hf.read_model_index(options.hf_dir) if _pipeline_of("hf", options) and options.hf_dir else {}
    return (index.get("transformer_2") or [None])[0] is not None


def _only_expert(weights: Mapping[str | None, Weights], options: Options) -> str:
    """Return which part of a pipeline a lone expert is; a model with one DiT goes where the high expert does."""
    known = next(iter(weights.values())).card.expert
    if known is None and _two_experts(options):
        raise ConfigError("which expert is this? The pipeline of --cfg.hf_dir has two", where=str(options.source),
                          fix="add --expert high or --expert low")
    return known or "high"


def _complete_parent(options: Options) -> None:
    """Make the parent of ``transformer/`` or ``transformer_2/`` a pipeline, linking what is not there yet."""
    pipeline = _pipeline_of("hf", options)
    parent = options.target.parent
    if pipeline is None or options.target.name not in _EXPERT_NAMES or (parent / "model_index.json").exists():
        return
    rest = Layout([OutputFile(f"{options.target.name}/config.json", ())])
    hf.add_pipeline_parts(rest, pipeline)
    for name, part in rest.links.items():
        if not (parent / name).exists():
            (parent / name).symlink_to(part, target_is_directory=True)
    write_text_atomic(parent / "model_index.json", (pipeline / "model_index.json").read_text(encoding="utf-8"))


def _lay_out(weights: Weights, target: str, options: Options) -> Layout:
    code = _CODES[options.dtype] if options.dtype else None
    if target == "hf":
        return hf.lay_out(weights, code, options.max_shard_size)
    if target == "original":
        return original.lay_out(weights, code, options.max_shard_size)
    if target == "dcp":
        return dcp.lay_out(weights, code, options.max_shard_size)
    return mm.lay_out(weights, code, options.parallel)


# ---- checks before anything is written -----------------------------------------------------------------------


_PLACEHOLDER = re.compile(r"(^|/)(path[ _/]to[ _/]|your[ _/](path|model|weights)|\[[^/]*\](/|$))", re.IGNORECASE)


def _clean(path: Path) -> Path:
    text = str(path)
    if _PLACEHOLDER.search(text):
        raise ConfigError(f"{text!r} is a placeholder", fix="give a real path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _check_paths(options: Options) -> None:
    if _is_placeholder_link(options):
        return
    source, target = (Path(os.path.realpath(path)) for path in (options.source, options.target))  # links may loop
    if source == target:
        raise ConfigError("source and target are the same folder", where=str(source), fix="choose another target")
    if source.is_relative_to(target):
        raise ConfigError(f"the target {target} contains the source", where=str(source), fix="choose another target")
    if target.exists() and not target.is_dir():
        raise ConfigError("the target is a file", where=str(target), fix="choose another target")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not options.overwrite:
        raise ConfigError("the target exists and is not empty", where=str(target),
                          fix="add --overwrite to replace it, or choose another target")
    if not _is_ours_to_replace(target):
        raise ConfigError("the target holds other things than weights; it will not be replaced", where=str(target),
                          fix="choose another target, or empty this folder yourself")


def _is_placeholder_link(options: Options) -> bool:
    """True when the target is the link to ``--cfg.hf_dir``'s own expert that ``_complete_parent`` has made."""
    target, pipeline = options.target, _pipeline_of("hf", options)
    return pipeline is not None and target.is_symlink() and target.resolve() == (pipeline / target.name).resolve()


_KNOWN = {"config.json", "model_index.json", MANIFEST_NAME, CARD_NAME, "latest_checkpointed_iteration.txt", RELEASE,
          "transformer", "transformer_2", "high_noise_model", "low_noise_model", "vae", "text_encoder", "tokenizer",
          "scheduler", "image_encoder", "image_processor"}


def _is_ours_to_replace(target: Path) -> bool:
    """True when the folder holds nothing but what a conversion writes (links included, real pipeline parts not)."""
    for entry in target.iterdir():
        converted = entry.name.startswith("diffusion_pytorch_model") or entry.name in _KNOWN
        foreign = entry.name in _KNOWN and entry.is_dir() and not entry.is_symlink() and entry.name not in (
            RELEASE, "transformer", "transformer_2", "high_noise_model", "low_noise_model")
        if not converted or foreign:
            return False
    return True


def _check_space(layout: Layout, options: Options) -> None:
    parent = next(p for p in (options.target, *options.target.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    staged = sum(p.stat().st_size for p in _staging(options).rglob("*") if p.is_file()) if options.resume else 0
    if layout.size + _RESERVE > free + staged:
        raise ResourceError(f"needs {human(layout.size)}, but {parent} has {human(free)} free",
                            where=str(options.target), fix="free some space, or choose a target on another disk")


def _staging(options: Options) -> Path:
    return options.target.with_name(f".{options.target.name}.tmp")


def _print_plan(weights: Mapping[str | None, Weights], layout: Layout, target: str, options: Options) -> None:
    for expert, found in weights.items():
        config = found.card.config
        kind = f"{config.task.upper()}, {config.num_layers} blocks of {config.dim}, {len(found.tensors)} tensors"
        label = f", {expert or found.card.expert} expert" if expert or found.card.expert else ""
        print(f"{found.path}: {FORMATS[found.format]} ({found.note}), {kind}, {human(found.nbytes)}{label}")
    print(f"-> {options.target}: {FORMATS[target]}, {len(layout.files)} files, {human(layout.size)}")
    if options.dry_run:
        free = shutil.disk_usage(next(p for p in (options.target, *options.target.parents) if p.exists())).free
        print(f"bytes needed {layout.size}, free {free}")
        for file in layout.files:
            print(f"{file.size:>14}  {file.name}")
            for part in file.parts:
                if isinstance(part, Slice):
                    print(f"{'':16}{part.name}  {part.code} {list(part.box.sizes)}  <- {part.tensor.name}")


# ---- writing -------------------------------------------------------------------------------------------------


def _write(layout: Layout, options: Options) -> None:
    fingerprint = layout.fingerprint((options.dtype, options.max_shard_size))
    _check_space(layout, options)
    staging = staging_folder(options.target, fresh=not options.resume)
    try:
        _remove_unplanned(staging, layout)
        progress = Progress(layout.size, quiet=options.quiet)
        workers = options.workers or min(4, os.cpu_count() or 1)
        written = write_files(layout.files, staging, progress, workers=workers, fingerprint=fingerprint,
                              resume=options.resume)
        seconds = progress.finish()
        _seal(staging, layout, written, options)
        # Not after the commit: an exchange leaves the old result in the staging folder, and a journal beside it
        # would make the next --resume take those files for finished ones.
        journal_path(staging).unlink(missing_ok=True)
        commit_folder(staging, options.target)
    except (WanError, OSError) as error:
        # A full disk must not stay full of half-written files, and damaged input will not mend.
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, staging) from None
        raise
    finally:
        if not staging.exists():
            journal_path(staging).unlink(missing_ok=True)
    if not options.quiet:
        print(f"{human(layout.size / max(seconds, 1e-6))}/s over {seconds:.1f} s", file=sys.stderr)


def _remove_unplanned(staging: Path, layout: Layout) -> None:
    """Remove what an interrupted run with another plan has left in the staging folder."""
    planned = {staging / f.name for f in layout.files}
    for path in list(staging.rglob("*")):
        if (path.is_file() or path.is_symlink()) and path not in planned:
            path.unlink()


def _seal(staging: Path, layout: Layout, written: Mapping[str, Written], options: Options) -> None:
    """Add links, ``wan.json`` and manifests, then the trackers: the last thing that makes a checkpoint complete."""
    for name, target in layout.links.items():
        (staging / name).symlink_to(target, target_is_directory=True)
    by_name = {file.name: file for file in layout.files}
    for folder, card in layout.seals.items():
        (staging / folder / CARD_NAME).write_text(card.to_json(), encoding="utf-8")
        inside = {n: w for n, w in written.items() if not folder or n.startswith(f"{folder}/")}
        known = {n[len(folder):].lstrip("/"): w.record for n, w in inside.items()}
        extra: dict[str, Any] = {"format": "mindspeed-wan", "source": str(options.source)}
        if tensors := _tensor_checksums(inside, by_name):
            extra["tensors"] = tensors
        write_manifest(staging / folder, extra, known=known)
        if options.verify:
            _read_back(staging / folder, options)
    for folder in layout.trackers:
        write_tracker(staging / folder, RELEASE)


def _tensor_checksums(written: Mapping[str, Written], files: Mapping[str, OutputFile]) -> dict[str, str]:
    """Return CRC-32 per tensor of safetensors files, whose format has none of its own."""
    result: dict[str, str] = {}
    for name, entry in written.items():
        if name.endswith(".safetensors"):
            slices = [part for part in files[name].parts if isinstance(part, Slice)]
            result.update({s.name: f"{crc:08x}" for s, crc in zip(slices, entry.slice_crcs, strict=True)})
    return result


def _read_back(folder: Path, options: Options) -> None:
    """Read every file again from disk and compare SHA-256 with what was computed while writing."""
    if not options.quiet:
        print("reading back", file=sys.stderr)
    verify_manifest(folder, full=True)


