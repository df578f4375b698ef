"""The verbs of ``mm-convert``: their names, what they read and write, and how options become a call.

Names only; the modules that do the work are imported when a verb runs, so ``--help`` needs neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import ConfigError

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Verb:
    """A command: ``source`` and ``target`` are formats for conversions and ``None`` for other verbs."""

    name: str
    help: str
    source: str | None = None
    target: str | None = None


_LABEL = {"hf": "Diffusers", "original": "original Wan", "mm": "MindSpeed-MM", "dcp": "torch DCP"}


def _conversions() -> list[Verb]:
    order = ("hf", "original", "mm", "dcp")
    return [Verb(f"{a}_to_{b}", f"{_LABEL[a]} -> {_LABEL[b]}", a, b) for a in order for b in order if a != b]


VERBS: dict[str, Verb] = {verb.name: verb for verb in (
    *_conversions(),
    Verb("resplit", "MindSpeed-MM -> MindSpeed-MM in another TP x PP x VPP layout", "mm", "mm"),
    Verb("merge_dcp_to_hf", "another name of dcp_to_hf", "dcp", "hf"),
    Verb("lora_hf_to_mm", "an adapter in any format -> MindSpeed-MM's names"),
    Verb("merge_lora_to_base", "weights + adapter (--cfg.lora_path) -> weights in the same format"),
    Verb("inspect", "what is this folder, and what is it good for?"),
    Verb("verify", "is this folder whole? are two folders equal, in whatever formats?"),
)}

CONVERTERS: dict[str, str | None] = {"WanConverter": None, "Wan2.2T2VConverter": "t2v", "Wan2.2I2VConverter": "i2v"}
"""Converter name -> the task whose weights it insists on."""


ELSEWHERE = {
    "layerzero_to_mm": "convert MindSpeed LayerZero checkpoints with MindSpeed-MM, then use mm_to_dcp or mm_to_hf",
}
"""MindSpeed-MM's other verb, and what to use instead."""


LORA_VERBS = ("lora_hf_to_mm", "merge_lora_to_base")


def run_verb(verb: Verb, converter: str, args: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code."""
    from pathlib import Path

    if not args.source_path:
        raise ConfigError("no source", fix=f"mm-convert {verb.name} SOURCE ..., or --cfg.source_path SOURCE")
    if verb.name in LORA_VERBS:
        _run_lora(verb, args)
        return 0
    if verb.source is None:
        _run_reader(verb, args)
        return 0
    if not args.target_path:
        raise ConfigError("no target", fix=f"mm-convert {verb.name} SOURCE TARGET, or --cfg.target_path TARGET")
    from mindspeed_wan_converters.convert import Options, run
    from mindspeed_wan_converters.formats.mm import Parallel

    if args.ep_size != 1:
        raise ConfigError(f"ep_size {args.ep_size}: Wan has no experts to spread (it is not a mixture of experts)",
                          where="--cfg.target_parallel_config.ep_size", fix="leave it at 1")
    parallel = Parallel.parse(args.tp_size, args.pp_layers)
    if verb.target != "mm" and parallel != Parallel():
        raise ConfigError("a parallel layout was given, but only MindSpeed-MM's format has one",
                          where="--cfg.target_parallel_config", fix=f"drop it for {verb.name}")
    run(str(verb.source), str(verb.target), Options(
        source=Path(args.source_path), target=Path(args.target_path), expert=args.expert,
        hf_dir=Path(args.hf_dir).expanduser() if args.hf_dir else None, parallel=parallel, dtype=args.dtype,
        max_shard_size=args.max_shard_size, workers=args.workers, dry_run=args.dry_run, overwrite=args.overwrite,
        resume=args.resume, verify=args.verify, quiet=args.quiet, task=CONVERTERS[converter], converter=converter))
    return 0


def _run_lora(verb: Verb, args: Any) -> None:
    from mindspeed_wan_converters import lora

    if not args.target_path:
        raise ConfigError("no target", fix=f"mm-convert {verb.name} SOURCE TARGET, or --cfg.target_path TARGET")
    from pathlib import Path

    def path(text: str | None) -> Path | None:
        return Path(text).expanduser() if text else None

    options = lora.LoraOptions(source=Path(args.source_path).expanduser(), target=Path(args.target_path).expanduser(),
                               lora=path(args.lora_path), hf_dir=path(args.hf_dir), rank=args.lora_rank,
                               alpha=args.lora_alpha)
    getattr(lora, verb.name)(options)


def _run_reader(verb: Verb, args: Any) -> None:
    from pathlib import Path

    from mindspeed_wan_converters.formats.hf import config_of
    from mindspeed_wan_converters.verify import inspect, verify

    hint = config_of(Path(args.hf_dir).expanduser()) if args.hf_dir else None
    source = Path(args.source_path).expanduser()
    if verb.name == "inspect":
        inspect(source, args.expert, hint, as_json=args.json)
    else:
        second = Path(args.target_path).expanduser() if args.target_path else None
        verify(source, second, args.expert, hint, quiet=args.quiet)
