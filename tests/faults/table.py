"""``make faults``: run the properties T1 to T24 with their long counts and print one table.

    python -m tests.faults.table [--small] [--only T1,T3] [--lanes 2] [--out benchmarks/results/faults.json]

Without ``--out`` the table also goes into the pages on reliability. Results of earlier runs in the same file are kept
for the properties that are not run, with the date they were run. Two properties run side by side, each in a process of
its own (most cases keep one core busy, some only wait); those that measure seconds run alone, at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.harness import Property, Tally

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGES = (ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.zh.md")


@dataclass(frozen=True)
class Row:
    """One property: where its cases are, how many run in the default suite and in ``make faults``, and what passes."""

    name: str
    title: str
    module: str
    function: str
    small: int
    long: int
    figure: str
    alone: bool = False
    """It measures seconds, so nothing may run beside it."""

    def load(self) -> Property:
        """Return the function that runs the cases."""
        return getattr(importlib.import_module(f"tests.faults.{self.module}"), self.function)  # type: ignore[no-any-return]


ROWS: tuple[Row, ...] = (
    Row("T1", "kill -9 during a save: resumes, nothing partial named", "saves", "killed_saves", 3, 50, "50/50"),
    Row("T2", "kill -9 during a background save: tracker never ahead", "saves", "killed_background_saves", 3, 50,
        "50/50"),
    Row("T3", "bit flips, truncations, zero pages: found, survived", "saves", "rot", 32, 160, "160/160"),
    Row("T4", "saving over leftovers, 2 ranks", "saves", "leftovers", 5, 20, "20/20"),
    Row("T5", "retention keeps exactly the newest whole ones", "saves", "retention", 20, 100, "100/100"),
    Row("T6", "torn trackers: one line, exit 4", "saves", "torn_trackers", 33, 33, "30/30"),
    Row("T7", "killed at steps 7 and 13 of 20: same bits as straight", "runs", "bitwise_resume", 0, 8, "8/8"),
    Row("T8", "reshard over all (TP, CP, FSDP2) pairs, world <= 4", "reshard", "reshard", 1, 100, "all"),
    Row("T9", "data order over DP 2 -> 1 -> 2: every sample once", "inputs", "data_order", 20, 100, "0 repeats"),
    Row("T10", "SIGTERM, SIGUSR1, twice, during saves: exit 75, bits", "runs", "signals", 0, 30, "30/30"),
    Row("T11", "kill -9 one rank: restarted, finished", "ranks", "killed_ranks", 0, 20, "20/20", alone=True),
    Row("T12", "hung rank, in training and in collectives: named, stacks, exit 6", "ranks", "hung_ranks", 0, 8, "all",
        alone=True),
    Row("T13", "NaN, Inf, spike on one rank: nothing moves, policy kept", "runs", "bad_numbers", 1, 12, "all"),
    Row("T14", "same seed, same bits: fp32, bf16, workers 0 and 2", "runs", "determinism", 0, 10, "10/10"),
    Row("T15", "odd and damaged media: one line each", "inputs", "bad_media", 12, 100, "60/60"),
    Row("T16", "damaged annotations: file, line, hint", "inputs", "bad_annotations", 60, 100, "60/60"),
    Row("T17", "hostile checkpoints: refused, nothing executed", "inputs", "hostile_files", 40, 100, "25/25"),
    Row("T18a", "disk full during a save: the old one stays, exit 3", "saves", "full_disk_saves", 3, 20, "20/20"),
    Row("T18b", "disk full during a conversion: the old result stays, exit 3", "inputs", "full_disk_conversions", 3, 20,
        "20/20"),
    Row("T18c", "disk full for adapters (exports, merges, saves): the same", "adapters", "full_disk_adapters", 3, 32,
        "all"),
    Row("T19", "conversion round trips are bit-equal", "inputs", "round_trips", 2, 18, "all"),
    Row("T20", "mutated weights refused by the converter", "inputs", "mutations", 10, 120, "100/100"),
    Row("T21a", "typos in config keys refused", "inputs", "key_typos", 20, 200, "200/200"),
    Row("T21b", "typos in flags refused", "inputs", "flag_typos", 50, 200, "200/200"),
    Row("T21c", "of these, the message names the right word", "inputs", "named_typos", 50, 400, ">= 95 %"),
    Row("T22a", "bad runs as a process: exit code, one message, no traceback", "inputs", "exit_codes", 2, 17,
        "0 false successes"),
    Row("T22b", "bad commands to launchers, mm-convert, mindspeed-wan: the same", "shell", "bad_commands", 16, 1000,
        "0 of 200 wrong"),
    Row("T23", "two jobs on one save path, two conversions of one target", "inputs", "concurrent_use", 2, 20, "20/20"),
    Row("T24", "no network: train, convert, generate; 0 connections tried", "runs", "offline", 0, 3, "3/3"),
    Row("modes", "file modes follow the umask", "saves", "file_modes", 4, 4, "4/4"),
)  # fmt: skip


def run_row(row: Row, count: int) -> Tally:
    """Run the cases of one property in a fresh folder.

    What they print is dropped: a limit on the size of files would hold for a log that it is appended to, as well.
    """
    tally, started = Tally(), time.monotonic()
    with (tempfile.TemporaryDirectory(prefix=f"faults-{row.name}-") as folder,
          contextlib.redirect_stdout(io.StringIO())):
        try:
            row.load()(tally, count, Path(folder))
        except Exception:  # outside a case; the other properties still run
            tally.add(0, 1, traceback.format_exc())
    tally.seconds = time.monotonic() - started
    return tally


def markdown(results: dict[str, Any]) -> str:
    """Return the table of a results file."""
    lines = ["| # | property | counts run | passed | pass figure |", "|---|---|---:|---:|---|"]
    for row in ROWS:
        found = results["properties"].get(row.name)
        run, passed = (found["run"], found["passed"]) if found else ("not run", "-")
        lines.append(f"| {row.name} | {row.title} | {run} | {passed} | {row.figure} |")
    return "\n".join(lines)


def write_page(results: dict[str, Any], page: Path) -> None:
    """Put the table into a page, between its two marks."""
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    page.write_text(before + mark + markdown(results) + "\n" + end + after, encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"properties": {}}


def _note(path: Path, row: Row, tally: Tally) -> dict[str, Any]:
    """Add one result to the file; it is read again each time, so that two tables may be made side by side."""
    import torch

    results = _load(path)
    results["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    results["properties"][row.name] = {
        "property": row.title, "run": tally.run, "passed": tally.passed, "figure": row.figure,
        "seconds": round(tally.seconds, 1), "date": time.strftime("%Y-%m-%d"), "problems": tally.problems[:20],
        **({"measured": tally.notes} if tally.notes else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return results


def run_rows(cases: list[tuple[Row, int]], lanes: int, seconds: dict[str, float]) -> Iterator[tuple[Row, Tally]]:
    """Run rows with their counts and yield each as it ends.

    Args:
        cases: the rows and how many cases of each.
        lanes: how many rows run side by side.
        seconds: what rows took before; the longest start first, so that the lanes end together.
    """
    # Every lane is a fresh interpreter: a limit or a umask that one row sets is not seen by the other's.
    context = multiprocessing.get_context("spawn")
    quiet: dict[str, Any] = {"initializer": warnings.filterwarnings, "initargs": ("ignore",)}
    with ProcessPoolExecutor(lanes, mp_context=context, **quiet) as pool:
        together = sorted((case for case in cases if not case[0].alone), key=lambda case: -seconds.get(case[0].name, 0))
        running = {pool.submit(run_row, row, count): row for row, count in together}
        for future in as_completed(running):
            yield running[future], future.result()
        for row, count in (case for case in cases if case[0].alone):
            yield row, pool.submit(run_row, row, count).result()


def main() -> int:
    """Run, print the table, return 1 if a case failed."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="Count what survives.")
    parser.add_argument("--small", action="store_true", help="the counts of the default test suite")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--count", type=int, help="another count, with --only")
    parser.add_argument("--lanes", type=int, default=2, help="properties that run side by side")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such property: {', '.join(sorted(unknown))}")
    if args.lanes < 1:
        parser.error("--lanes: at least 1")
    chosen = [(row, args.count or (row.small if args.small else row.long)) for row in ROWS
              if not names or row.name in names]
    before = {name: found["seconds"] for name, found in _load(RESULTS)["properties"].items()}
    failed, started = 0, time.monotonic()
    for row, tally in run_rows([case for case in chosen if case[1]], args.lanes, before):
        failed += tally.run - tally.passed
        print(f"{row.name:5} {tally.passed}/{tally.run} in {tally.seconds:.0f} s", *tally.problems, sep="\n      ",
              flush=True)
        _note(args.out, row, tally)
    results = _load(args.out)
    print(markdown(results), f"{time.monotonic() - started:.0f} s in all", sep="\n\n")
    if args.out == RESULTS:
        for page in PAGES:
            write_page(results, page)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
