"""`mindspeed-wan features`: encode clips and captions once, look into a cache, check every byte of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_wan.config.schema import RunConfig
    from mindspeed_wan.data.bad_samples import BadSampleLog
    from mindspeed_wan.data.feature_build import BuildReport

HELP = "encode clips and captions once, for training from cached features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add build, info and check."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="encode a data set; start it as often as you like, the work is shared")
    build.add_argument("--mm-data", type=Path, required=True, metavar="FILE", help="data.json of the clips")
    build.add_argument("--mm-model", type=Path, required=True, metavar="FILE", help="model.json with VAE and UMT5")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache folder")
    build.add_argument("--seed", type=int, default=1234, help="of frame windows and crops; that of the training run")
    build.add_argument("--variants", type=int, default=1, metavar="N",
                       help="draws of frame window and crop per clip; epoch e trains on draw e modulo N")
    build.add_argument("--shard-samples", type=int, default=32, metavar="N", help="clips per shard file")
    build.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the best there is")
    build.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F",
                       help="fail when more clips than this cannot be read (they are listed either way)")
    info = actions.add_parser("info", help="what a cache holds and what it was made from")
    info.add_argument("cache", type=Path)
    check = actions.add_parser("check", help="read every tensor, compare checksums, look for clips that changed")
    check.add_argument("cache", type=Path)


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    actions = {"build": _build, "info": _info, "check": _check}
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from mindspeed_wan.config.load import load_files
    from mindspeed_wan.errors import ConfigError

    if not 0 <= args.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction is {args.max_bad_fraction}; it must lie between 0 and 1")
    for name in ("variants", "shard_samples"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is not a folder")
    config = load_files(model=args.mm_model, data=args.mm_data)
    if config.data.kind != "video":
        raise ConfigError("this data file already names features", where=str(args.mm_data),
                          fix="give the one with dataset_type t2v, which names the clips")
    _check_cacheable(config, args.mm_model)
    report, log = _encode(args, config)
    print(f"encoded {report.samples} clips in {report.shards} shards, kept {report.kept} "
          f"({report.seconds:.1f} s)", flush=True)
    if not report.is_complete:
        print("others are still working on the rest; run the same command again to see it through")
        return 0
    return _summary(args, log)


def _check_cacheable(config: RunConfig, model_file: Path) -> None:
    """Refuse before hours of encoding what training would refuse after it."""
    from mindspeed_wan.config.rules_model import image_side_fits
    from mindspeed_wan.errors import ConfigError

    if config.model.vae.do_sample:
        raise ConfigError("do_sample draws new latents each time; cached features hold one", where=str(model_file),
                          fix="set do_sample to false, or train without a cache")
    model = config.model.model_copy(update={"load_video_features": True, "load_text_features": True})
    for error in image_side_fits(config.model_copy(update={"model": model}), None):
        raise ConfigError(error.message, where=str(model_file), fix="train this model without a cache")


def _encode(args: argparse.Namespace, config: RunConfig) -> tuple[BuildReport, BadSampleLog]:
    """Do this process's share; returns what it did, and the clips that could not be read at the start."""
    from tqdm import tqdm

    from mindspeed_wan.data.build import encoder_choice, open_clips
    from mindspeed_wan.data.feature_build import Builder, WanEncoders
    from mindspeed_wan.data.feature_cache import IDENTITY_FILE, make_identity, read_identity
    from mindspeed_wan.platforms import get_platform

    platform = get_platform(args.device).activate()
    clips = open_clips(config.data, seed=args.seed, decoder_threads=0)
    log = clips.bad_sample_log(None, args.max_bad_fraction)
    print("\n".join([*clips.describe(1), *(f"  bad: {record.where}: {reason}" for record, reason in clips.unreadable)]),
          flush=True)
    choice = encoder_choice(config)
    known = read_identity(args.out) if (args.out / IDENTITY_FILE).is_file() else None
    dataset: Any = clips.dataset
    identity = make_identity(config.model.task, dataset.settings, args.seed, args.variants, choice, known)
    bar = tqdm(total=len(dataset), desc="clips", unit="clip", disable=None)
    builder = Builder(args.out, dataset, identity, lambda: WanEncoders(choice, platform.device()),
                      shard_samples=args.shard_samples, on_sample=lambda: bar.update(1))
    report = builder.run()
    bar.close()
    return report, log


def _summary(args: argparse.Namespace, log: BadSampleLog) -> int:
    from mindspeed_wan.data.bad_samples import BadSample

    dataset, bad = _open(args.out)
    total = sum((args.out / "shards" / name).stat().st_size for name in {row["shard"] for row in dataset.rows})
    print(f"the cache is complete: {len(dataset)} clips, {total / 2**20:.1f} MiB "
          f"({total / len(dataset) / 2**20:.2f} MiB a clip)")
    for row in bad:
        print(f"  bad: {row['where']}: {row['content']['path']}: {row['bad']}")
    log.add(BadSample(row["index"], row["content"]["path"], row["where"], row["bad"]) for row in bad)
    print(f'train from it: "dataset_type": "feature" and "data_path": "{args.out.resolve()}" in data.json, '
          '"load_video_features": true and "load_text_features": true in model.json')
    return 0


def _info(args: argparse.Namespace) -> int:
    dataset, bad = _open(args.cache)
    identity = dataset.identity
    shapes: dict[tuple[int, int, int], int] = {}
    for shape in dataset.shapes:
        shapes[shape] = shapes.get(shape, 0) + 1
    print(f"{args.cache}: {len(dataset)} clips for {identity.task}, {identity.variants} draws each, {len(bad)} bad")
    for shape, count in sorted(shapes.items(), key=lambda item: -item[1]):
        print(f"  {count} of {'x'.join(map(str, shape))} (frames x height x width)")
    for name, value in {**identity.settings, **identity.options, "seed": identity.seed}.items():
        print(f"  {name}: {value}")
    for name, files in identity.weights.items():
        print(f"  {name}: {', '.join(f'{entry.name} {entry.digest[:12]}' for entry in files)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from mindspeed_wan.errors import DataError

    dataset, bad = _open(args.cache)
    dataset.check_clips()
    damaged = list(dataset.damaged())
    for message in damaged[:10]:
        print(f"  {message}")
    if damaged:
        raise DataError(f"{len(damaged)} tensors are damaged", where=str(args.cache),
                        fix="remove the shards named above and run features build again")
    print(f"{args.cache}: {len(dataset)} clips are whole, {len(bad)} of them could not be encoded")
    return 0


def _open(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    from mindspeed_wan.data.features import FeatureDataset

    dataset = FeatureDataset(folder.parent if folder.name == "cache.json" else folder)
    return dataset, [row for row in dataset.rows if "bad" in row]
