"""`mindspeed-wan report RUN`: one self-contained HTML file about one or more training runs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "one HTML file about training runs: config, versions, curves, sigma histogram, bad samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the report's options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="save folder of a run (SAVE_PATH)")
    parser.add_argument("--out", type=Path, help="the HTML file; default: report.html in the first run")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    from mindspeed_wan.evaluation.run_report import run_report

    print(run_report(args.runs, args.out or args.runs[0] / "report.html"))
    return 0
