"""`mindspeed-wan eval`: measure generated videos against references, compare models, collect ratings.

`mindspeed-wan eval loss` (`eval_loss`) measures a checkpoint without making videos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mindspeed_wan.cli import eval_loss
from mindspeed_wan.errors import ConfigError

HELP = "PSNR, SSIM, MS-SSIM, flicker, motion; several models side by side; the seed's score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison, and the action ``loss``."""
    actions = parser.add_subparsers(dest="action", metavar="{loss}")
    eval_loss.add_arguments(actions.add_parser("loss", help=eval_loss.HELP))
    parser.add_argument("--reference", type=Path, help="folder of reference videos")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER",
                        help="a model's videos, named like the references; repeat for several models")
    parser.add_argument("--ratings", type=Path, action="append", default=[],
                        help="CSV exported by the rating sheet; repeat for several persons")
    parser.add_argument("--seed-compat", action="store_true",
                        help="PSNR with the seed's uint8 arithmetic (wraps around; too high)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of the report")


def run(args: argparse.Namespace) -> int:
    """Write clips.csv, summary.json, comparison.html and rating.html, or measure a checkpoint's loss."""
    if args.action == "loss":
        return eval_loss.run(args)
    if args.reference is None or not args.model:
        raise ConfigError("nothing to measure",
                          fix="give --reference DIR and --model NAME=DIR, or use the action: mindspeed-wan eval loss")
    from mindspeed_wan.evaluation.compare import compare, write_tables
    from mindspeed_wan.evaluation.html import comparison_page, rating_page
    from mindspeed_wan.evaluation.score import read_ratings

    models = _models(args.model)
    ratings = [rating for path in args.ratings for rating in read_ratings(path)]
    clips, results = compare(args.reference, models, ratings=ratings, seed_compat=args.seed_compat,
                             on_clip=lambda model, clip: print(f"  {model}: {clip}", flush=True))
    write_tables(args.out, clips, results)
    for result in results:
        tail = "" if result.score is None else f", score {result.score:.4f}"
        print(f"{result.model}: {result.num_clips} clips, PSNR {result.psnr_db:.2f} dB, SSIM {result.ssim:.4f}, "
              f"flicker {result.flicker:.4f}, motion {result.motion:.2f} px/frame{tail}")
    print(f"report: {comparison_page(args.out, clips, results)}")
    print(f"rating sheet: {rating_page(args.out, clips)}")
    return 0


def _models(values: list[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for value in values:
        name, separator, folder = value.partition("=")
        if not separator or not name or not folder:
            raise ConfigError(f"--model {value!r} is not NAME=FOLDER", fix="for example --model ours=out/videos")
        if name in models:
            raise ConfigError(f"--model {name!r} is given twice")
        models[name] = Path(folder)
    return models
