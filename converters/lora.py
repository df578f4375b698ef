"""MindSpeed-MM's two LoRA verbs: ``lora_hf_to_mm`` renames an adapter, ``merge_lora_to_base`` adds one to weights.

The adapter may be in any format that ``lora.formats`` reads; its alpha is the file's own, and ``--lora_alpha`` counts
where it has none. Merging streams: one parameter is in memory at a time.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import TRACKER_NAME
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.lora.formats import LoraFile, read_lora, write_lora
from mindspeed_wan.lora.merge_files import merge_files
from mindspeed_wan.lora.model_config import config_of as config_of_weights
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.formats.hf import config_of

FILE_NAME = "adapter.safetensors"
"""The adapter's name when the target is a folder."""


@dataclass(frozen=True)
class LoraOptions:
    """Options of both verbs; ``rank`` is only compared with the file's, ``alpha`` is for files without one."""

    source: Path
    target: Path
    lora: Path | None = None
    hf_dir: Path | None = None
    rank: int | None = None
    alpha: float | None = None


def lora_hf_to_mm(options: LoraOptions) -> Path:
    """Write the adapter ``options.source`` with MindSpeed-MM's names and return the file."""
    config = config_of(options.hf_dir) if options.hf_dir else config_of_weights("t2v-A14B")
    lora = _read(options.source, config, options)
    target = options.target
    path = write_lora(lora, target if target.suffix == ".safetensors" else target / FILE_NAME, config, "mm")
    print(f"{lora.format} -> mm: {len(lora.adapters)} modules, rank {'/'.join(map(str, lora.ranks))}: {path}")
    return path


def merge_lora_to_base(options: LoraOptions) -> Path:
    """Write ``options.source`` plus the adapter ``options.lora`` to ``options.target``, in the source's format.

    Raises:
        ConfigError: no adapter, or another rank than the one given.
        CheckpointError: damaged files, or an adapter of another model.
    """
    if options.lora is None:
        raise ConfigError("no adapter", fix="mm-convert merge_lora_to_base BASE TARGET --cfg.lora_path ADAPTER")
    config = config_of(options.hf_dir) if options.hf_dir else config_of_weights(options.source)
    lora = _read(options.lora, config, options)
    kind = _format_of(options.source)
    if kind == "hf":
        return _merge(options.source, options.target, lora, config)
    from mindspeed_wan_converters.convert import Options, run

    between = options.target.with_name(f".{options.target.name}.merged")
    try:
        _merge(options.source, between, lora, config)
        run("hf", kind, Options(source=between, target=options.target))
    finally:
        shutil.rmtree(between, ignore_errors=True)
    return options.target


def _merge(base: Path, target: Path, lora: LoraFile, config: WanConfig) -> Path:
    done = merge_files(base, [(lora, 1.0)], target, config)
    total = done.report.total
    print(f"merged {len(done.report.losses)} parameters in {done.seconds:.1f} s: {total}")
    if total.relative_error > 0.1:
        print("  the stored dtype loses a part of the adapter: mindspeed-wan lora merge --dtype fp32 keeps it")
    return done.folder


def _read(path: Path, config: WanConfig, options: LoraOptions) -> LoraFile:
    lora = read_lora(path, config, alpha_default=options.alpha)
    if options.rank is not None and lora.ranks != [options.rank]:
        raise ConfigError(f"--lora_rank {options.rank}, but the adapter's rank is {'/'.join(map(str, lora.ranks))}",
                          where=str(path), fix="leave --lora_rank out")
    return lora


def _format_of(folder: Path) -> str:
    """Return the conversion format of base weights: ``mm``, ``dcp`` or ``hf`` (everything in safetensors)."""
    inside = folder
    if (folder / TRACKER_NAME).is_file():
        inside = next((f for f in sorted(folder.iterdir()) if f.is_dir()), folder)
    if any(inside.glob("mp_rank_*")):
        return "mm"
    return "dcp" if (inside / ".metadata").is_file() else "hf"
