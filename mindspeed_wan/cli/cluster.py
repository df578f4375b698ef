"""`mindspeed-wan cluster`: job files for Slurm, Kubeflow, Volcano, AscendJob and ModelArts from one description."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.planning.cluster.render import TARGETS, render
from mindspeed_wan.planning.cluster.spec import read_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    rendering = verbs.add_parser("render", help="write the job file of one scheduler, or of all")
    rendering.add_argument("--target", choices=(*TARGETS, "all"), required=True, help="scheduler")
    rendering.add_argument("--spec", type=Path, required=True, help="the description (examples/wan2.2/cluster)")
    rendering.add_argument("--out", type=Path, required=True, help="folder of the files")
    checking = verbs.add_parser("check", help="check a description")
    checking.add_argument("--spec", type=Path, required=True, help="the description")


def run(args: argparse.Namespace) -> int:
    """Check the description; write and name the files.

    Raises:
        ConfigError: mistakes in the description, each with its line; a key that the target needs is missing.
    """
    spec = read_spec(args.spec)
    dims, stages = spec.dims, f", pipeline {spec.dims.pipeline}" if spec.dims.pipeline > 1 else ""
    print(f"{spec.name}: {spec.nodes} nodes x {spec.devices_per_node} {spec.device} = {spec.ranks} ranks, tensor"
          f" {dims.tensor}, context {dims.context}{stages}, data {dims.data}")
    if len(spec.expert_worlds) > 1:
        print(f"both experts side by side, on {spec.expert_worlds[0]} and {spec.expert_worlds[1]} ranks")
    if args.verb == "check":
        return 0
    for target in TARGETS if args.target == "all" else (args.target,):
        try:
            path = render(spec, target, args.out)
        except ConfigError as error:
            if args.target != "all":
                raise ConfigError(error.message, where=f"{args.spec}: {error.where}", fix=error.fix) from None
            print(f"{target}: left out, {error.message}")
            continue
        print(f"{path}: {TARGETS[target].submit.format(path=path)}")
    return 0
