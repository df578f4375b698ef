"""`mindspeed-wan world`: a small world that is really learned, from clips to marked videos."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "learn a small world of moving shapes: pretrain, I2V, LoRA, evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the world's options."""
    parser.add_argument("--out", type=Path, default=Path("world_out"),
                        help="folder of the world; run the command again to go on after an interruption")
    parser.add_argument("--short", action="store_true", help="a few steps of everything: shows that all parts fit")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Build the world; exit code 0 only if every stage did its work."""
    from mindspeed_wan.demo.world.build import build
    from mindspeed_wan.demo.world.job import SHORT, Effort, World

    print(build(World.at(args.out, effort=SHORT if args.short else Effort(), seed=args.seed)))
    return 0
