"""`mindspeed-wan lora`: look into adapter files, convert, merge, extract, resize and verify them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan import __version__
from mindspeed_wan.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from mindspeed_wan.lora.formats import LoraFile
    from mindspeed_wan.models.wan.config import WanConfig

FORMAT_NAMES = ("diffusers", "peft", "kohya", "kohya2", "comfy", "lightx2v", "diffsynth", "mm")
"""The keys of ``lora.formats.FORMATS``, here so that ``--help`` needs no torch."""
LINE = 200
"""Longest value that ``inspect`` prints; diffusers' metadata is a screenful of JSON."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    inspect = verbs.add_parser("inspect", help="what is in the file")
    _add_file(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    convert = verbs.add_parser("convert", help="write the file in another format")
    _add_file(convert)
    _add_output(convert)

    merge = verbs.add_parser("merge", help="write an expert with adapters merged into its weights, in fp32 arithmetic")
    merge.add_argument("--base", type=Path, required=True, help="the expert: Diffusers, Wan-AI, MM or DCP")
    merge.add_argument("--lora", action="append", required=True, metavar="FILE[=WEIGHT]",
                       help="adapter and its weight (default 1); repeat to merge several")
    merge.add_argument("--out", type=Path, required=True, help="folder of the merged expert")
    merge.add_argument("--dtype", choices=["keep", *DTYPES], default="keep",
                       help="of the result; bf16 loses a part of the adapter, which is printed (default: keep)")
    merge.add_argument("--layout", choices=["hf", "original"], default="hf", help="names and config.json of the result")
    _add_reading(merge)

    extract = verbs.add_parser("extract", help="make an adapter out of a fine-tuned expert")
    extract.add_argument("--base", type=Path, required=True, help="the expert before fine-tuning")
    extract.add_argument("--tuned", type=Path, required=True, help="the expert after it")
    extract.add_argument("--rank", type=int, default=32, help="rank of the adapters (default 32)")
    extract.add_argument("--targets", default="proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2", help="target modules")
    extract.add_argument("--with-diffs", action="store_true", help="also the differences of norms and biases")
    extract.add_argument("--model", help="preset or config.json (default: what --base says)")
    _add_output(extract)

    resize = verbs.add_parser("resize", help="the best adapter of another rank")
    _add_file(resize)
    resize.add_argument("--rank", type=int, required=True, help="the new rank")
    _add_output(resize)

    verify = verbs.add_parser("verify", help="check every byte, name and value, merge every module, run one block")
    _add_file(verify)
    verify.add_argument("--expert", choices=["high", "low"], help="the expert it has to be for")
    verify.add_argument("--expect", choices=["reward"], help="counts of the published Wan2.2-Fun reward LoRAs")
    verify.add_argument("--sha256", help="hash the file has to have")
    verify.add_argument("--base", type=Path, help="the expert's weights to merge into (default: random weights)")
    verify.add_argument("--weight", type=float, default=1.0, help="strength (default 1)")
    verify.add_argument("--device", choices=["npu", "cuda", "cpu"], help="default: the best there is")
    verify.add_argument("--report", type=Path, default=Path("lora_verification.json"), help="JSON report")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="preset (t2v-A14B, i2v-A14B, inp-A14B ...), config.json or expert folder")
    parser.add_argument("--alpha-override", type=float, metavar="ALPHA",
                        help="use this alpha for every module, whatever the file says")
    parser.add_argument("--allow-unmatched", action="store_true", help="leave out keys that name nothing in the model")


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="adapter file, or the folder that holds one")
    _add_reading(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="file to write (a folder for peft)")
    parser.add_argument("--to", choices=FORMAT_NAMES, default="diffusers", help="format (default diffusers)")
    parser.add_argument("--dtype", choices=["keep", *DTYPES], default="keep", help="of the tensors (default keep)")
    parser.add_argument("--drop-diffs", action="store_true",
                        help="leave out plain differences that the format has no words for")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return {"inspect": _inspect, "convert": _convert, "merge": _merge, "extract": _extract, "resize": _resize,
            "verify": _verify}[args.verb](args)


# ---- verbs ------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    from mindspeed_wan.lora.expert import expert_of

    lora = _read(args, _config(args))
    alphas = sorted({adapter.alpha for adapter in lora.adapters.values()})
    facts: dict[str, Any] = {
        "format": lora.format, "modules": len(lora.adapters), "ranks": lora.ranks, "alphas": alphas,
        "alpha_source": lora.alpha_source, "differences": len(lora.diffs), "values": lora.num_values,
        "expert": expert_of(lora.metadata, args.path), "unmatched": list(lora.unmatched),
        "metadata": dict(lora.metadata), "kinds": lora.kinds,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name == "kinds":
            print("modules by kind:")
            for kind, count in value.items():
                print(f"  {kind:<32} {count}")
        else:
            text = str(value)
            print(f"{name:<14} {text if len(text) <= LINE else text[:LINE] + ' ... (whole: --json)'}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    config = _config(args)
    lora = _read(args, config)
    path = _write(args, lora, config)
    print(f"{lora.format} -> {args.to}: {len(lora.adapters)} modules, {len(lora.diffs)} differences, {path}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from mindspeed_wan.lora.merge_files import merge_files

    config = _config(args, fallback=args.base)
    loras = [(_read(args, config, path), weight) for path, weight in map(_weighted, args.lora)]

    def progress(name: str, index: int, total: int) -> None:
        if index % 100 == 0:
            print(f"  {index}/{total} {name}", flush=True)

    done = merge_files(args.base, loras, args.out, config, dtype=_dtype(args.dtype), layout=args.layout,
                       on_parameter=progress)
    total = done.report.total
    print(f"merged {len(done.report.losses)} parameters into {done.folder} in {done.seconds:.1f} s "
          f"({done.bytes_written / 1e9:.2f} GB): {total}")
    if total.relative_error > 0.1:
        print("  the stored dtype loses a part of the adapter: use --dtype fp32, or keep the adapter unmerged")
    return 0


def _weighted(text: str) -> tuple[Path, float]:
    path, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--lora {text!r}: {weight!r} is not a number", fix="write FILE=0.55")
    return Path(path), value


def _extract(args: argparse.Namespace) -> int:
    from mindspeed_wan.lora.spec import parse_targets
    from mindspeed_wan.lora.svd import extract

    config = _config(args, fallback=args.base)
    done = extract(args.base, args.tuned, config, args.rank, targets=parse_targets(args.targets),
                   with_diffs=args.with_diffs)
    path = _write(args, done.lora, config)
    print(f"{len(done.lora.adapters)} modules, rank {done.lora.ranks}, {_energy(done.energy)}: {path}")
    return 0


def _resize(args: argparse.Namespace) -> int:
    from mindspeed_wan.lora.svd import resize

    config = _config(args)
    lora = _read(args, config)
    done = resize(lora, args.rank)
    path = _write(args, done.lora, config)
    print(f"rank {lora.ranks} -> {args.rank}, {_energy(done.energy)}: {path}")
    return 0


def _energy(energy: dict[str, float]) -> str:
    if not energy:
        return "no low-rank part"
    worst = min(energy, key=lambda name: energy[name])
    return (f"keeps {sum(energy.values()) / len(energy):.1%} of the change's energy on average, least "
            f"{energy[worst]:.1%} ({worst})")


def _verify(args: argparse.Namespace) -> int:
    from contextlib import ExitStack

    import torch

    from mindspeed_wan.checkpoint.sources import find, open_weights
    from mindspeed_wan.lora.verify import Expectation, verify
    from mindspeed_wan.platforms import get_platform

    if not math.isfinite(args.weight):
        raise ConfigError(f"--weight {args.weight} is not a number")
    config = _config(args, fallback=args.base)
    platform = get_platform(args.device)
    platform.activate()
    expect = Expectation(args.expert, args.sha256, args.expect == "reward", args.alpha_override, args.allow_unmatched)
    with ExitStack() as stack:
        base = stack.enter_context(open_weights(find(args.base), config)) if args.base else None
        report = verify(args.path, config, platform.device(), expect=expect, weight=args.weight, base=base)
    report.environment = {"device": platform.device_name(), "torch": torch.__version__, "mindspeed_wan": __version__}
    report.write(args.report)
    for check in report.checks:
        print(f"{check.status:<8} {check.name:<10} {check.detail} ({check.seconds:.1f} s)")
    print(f"report: {args.report}")
    if not report.passed:
        raise CheckpointError("; ".join(check.detail for check in report.errors), where=str(args.path),
                              fix=f"see {args.report}")
    return 0


# ---- shared -----------------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace, *, fallback: Path | None = None) -> WanConfig:
    """Return the model the adapter is for: ``--model``, else what the base folder says, else T2V-A14B."""
    from mindspeed_wan.lora.model_config import config_of

    return config_of(args.model or fallback or "t2v-A14B")


def _read(args: argparse.Namespace, config: WanConfig, path: Path | None = None) -> LoraFile:
    from mindspeed_wan.lora.formats import read_lora

    return read_lora(path or args.path, config, alpha_override=args.alpha_override,
                     allow_unmatched=args.allow_unmatched)


def _write(args: argparse.Namespace, lora: LoraFile, config: WanConfig) -> Path:
    from mindspeed_wan.lora.formats import write_lora

    dtype = _dtype(args.dtype)
    return write_lora(lora.to(dtype) if dtype else lora, args.out, config, args.to, drop_diffs=args.drop_diffs)


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "keep" else getattr(torch, DTYPES[name])
