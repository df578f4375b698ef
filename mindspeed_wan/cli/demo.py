"""`mindspeed-wan demo`: the main job on a tiny Wan2.2, from nothing to a trained model and a video."""

from __future__ import annotations

import argparse
from pathlib import Path

STAND_INS = ("mindspeed-mm", "diffsynth", "cann-recipe", "videox-fun")
HELP = "run the main job on a tiny Wan2.2: convert, pretrain both experts, export, generate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for everything the demo writes")
    parser.add_argument("--iterations", type=int, default=200, help="training iterations per expert")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks of the training runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--like", choices=STAND_INS,
                        help="only write a tiny working folder as users of this tool have it (docs/tutorials)")


def run(args: argparse.Namespace) -> int:
    """Walk through every stage; exit code 0 only if each did its work."""
    if args.like:
        from mindspeed_wan.demo.stand_ins import write_stand_in

        print(f"{write_stand_in(args.like, args.out)}: a tiny working folder as users of {args.like} have it")
        return 0
    from mindspeed_wan.demo.walk import check_iterations, describe, run_walk

    check_iterations(args.iterations, args.ranks)
    walk = run_walk(args.out, num_iterations=args.iterations, num_ranks=args.ranks, seed=args.seed)
    print(describe(walk))
    return 0
