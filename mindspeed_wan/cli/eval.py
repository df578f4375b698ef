"""`mindspeed-wan eval`: measure generated videos against references, compare models, collect ratings.

`mindspeed-wan eval loss` (`eval_loss`) measures a checkpoint without making videos.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_wan.cli import eval_loss
from mindspeed_wan.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_wan.evaluation.compare import Measures, ModelResult

HELP = "PSNR, SSIM, MS-SSIM, flicker, motion; several models side by side; the seed's score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison, and the action ``loss``."""
    actions = parser.add_subparsers(dest="action", metavar="{loss}",
                                    help="without one, videos are measured: --model NAME=FOLDER, --reference FOLDER")
    eval_loss.add_arguments(actions.add_parser("loss", help=eval_loss.HELP))
    parser.add_argument("--reference", type=Path, help="folder of reference videos")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER",
                        help="a model's videos, named like the references; repeat for several models")
    parser.add_argument("--ratings", type=Path, action="append", default=[],
                        help="CSV exported by the rating sheet; repeat for several persons")
    parser.add_argument("--seed-compat", action="store_true",
                        help="PSNR with the seed's uint8 arithmetic (wraps around; too high)")
    parser.add_argument("--clip", type=Path, metavar="DIR",
                        help="local CLIP folder (transformers, safetensors): text similarity and frame consistency")
    parser.add_argument("--features", type=Path, metavar="DIR",
                        help="local VideoMAE or CLIP folder: Frechet distance to the references")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="prompt of each clip for --clip and the pages, JSON or CSV; default: the .json or .txt "
                        "beside a video")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of the report")


def run(args: argparse.Namespace) -> int:
    """Write clips.csv, summary.json, comparison.html and rating.html, or measure a checkpoint's loss."""
    if args.action == "loss":
        return eval_loss.run(args)
    from mindspeed_wan.evaluation.compare import compare, remarks, write_tables
    from mindspeed_wan.evaluation.html import comparison_page, rating_page
    from mindspeed_wan.evaluation.score import read_ratings

    _check(args)
    models = _models(args.model)
    ratings = [rating for path in args.ratings for rating in read_ratings(path)]
    clips, results = compare(args.reference, models, ratings=ratings, measures=_measures(args),
                             on_clip=lambda model, clip: print(f"  {model}: {clip}", flush=True))
    write_tables(args.out, clips, results)
    for result in results:
        print(f"{result.model}: {result.num_clips} clips, {_describe(result)}")
    for remark in remarks(clips):
        print(f"note: {remark}")
    print(f"report: {comparison_page(args.out, clips, results)}")
    print(f"rating sheet: {rating_page(args.out, clips)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        ConfigError: an option that has nothing to work on.
    """
    if not args.model:
        raise ConfigError("nothing to measure",
                          fix="give --model NAME=DIR (and --reference DIR), or use the action: mindspeed-wan eval loss")
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is not a folder")
    if args.reference is None:
        for name, value in (("--features", args.features), ("--ratings", args.ratings),
                            ("--seed-compat", args.seed_compat)):
            if value:
                raise ConfigError(f"{name} needs --reference DIR, which it compares with")


def _measures(args: argparse.Namespace) -> Measures:
    """Load what the options name."""
    from mindspeed_wan.evaluation.compare import Measures
    from mindspeed_wan.evaluation.prompts import read_prompts

    prompts = {} if args.prompts is None else read_prompts(args.prompts)
    if args.clip is None and args.features is None:
        return Measures(seed_compat=args.seed_compat, prompts=prompts)
    from mindspeed_wan.models.score_models import ClipScorer, VideoFeatures
    from mindspeed_wan.platforms import get_platform

    device = get_platform().device()
    return Measures(
        seed_compat=args.seed_compat,
        clip=None if args.clip is None else ClipScorer(args.clip, device),
        features=None if args.features is None else VideoFeatures(args.features, device),
        prompts=prompts,
    )


def _describe(result: ModelResult) -> str:
    """Return the figures that a model has, as one line."""
    shown = (("PSNR {:.2f} dB", result.psnr_db), ("SSIM {:.4f}", result.ssim), ("flicker {:.4f}", result.flicker),
             ("motion {:.2f} px/frame", result.motion), ("text similarity {:.4f}", result.text_similarity),
             ("frame consistency {:.4f}", result.frame_consistency),
             ("Frechet distance {:.3f}", result.frechet_distance), ("score {:.4f}", result.score))
    return ", ".join(text.format(value) for text, value in shown if value is not None)


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
