"""Every benchmark this machine can run, then one Markdown page of all results: what ``make bench`` does.

    python benchmarks/run_all.py            # run, then write results/README.md
    python benchmarks/run_all.py --table    # only write results/README.md from the files that are there

A benchmark that fails does not stop the others; the exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
JOBS: dict[str, list[str]] = {
    "DiT step beside diffusers": ["dit_step.py", "--compile"],
    "DiT training step, recomputed, inputs on the host": ["dit_step.py", "--offload"],
    "LoRA training step": ["dit_step.py", "--recompute", "--lora", "32"],
    "generation beside diffusers": ["generate.py"],
    "start-up": ["startup.py"],
    "data loading": ["data.py"],
    "converters, 4 of 40 blocks": ["convert.py", "--layers", "4"],
    "LoRA merge, 4 of 40 blocks": ["lora_merge.py", "--layers", "4"],
    "Ulysses, exchange beside attention": ["ulysses_overlap.py"],
    "memory plan against measured peaks": ["plan_accuracy.py"],
    "PipeFusion against the exact video": ["pipefusion.py", "--out", "benchmarks/results/pipefusion.json"],
    "weights in 8 bits beside torchao": ["quantization.py"],
}
_LONG_TEXT = 200


def main() -> int:
    """Run the jobs whose script is there and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    failed = [] if args.table else [title for title, command in JOBS.items() if not _run(title, command)]
    print(f"wrote {write_page()}")
    for title in failed:
        print(f"failed: {title}", file=sys.stderr)
    return 1 if failed else 0


def _run(title: str, command: list[str]) -> bool:
    print(f"\n== {title}: python benchmarks/{' '.join(command)}", flush=True)
    start = time.monotonic()
    line = [sys.executable, str(HERE / command[0]), *command[1:]]
    code = subprocess.run(line, cwd=HERE.parent, check=False).returncode
    print(f"== {time.monotonic() - start:.0f} s, exit code {code}", flush=True)
    return code == 0


def write_page() -> Path:
    """Write ``results/README.md``: every result file as tables, newest figures as they are in the files."""
    parts = ["# Benchmark results", "",
             "Written by `python benchmarks/run_all.py --table` from the JSON files in this folder; each names its"
             " command and machine. Ratios above 1 mean faster than the peer in the same run.", ""]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## {path.stem}", "", *_picture(result, path), *_section(result), ""]
    page = RESULTS / "README.md"
    temporary = page.with_name(".README.md.tmp")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    os.replace(temporary, page)
    return page


def _picture(result: Any, path: Path) -> list[str]:
    """Plot a DiT step's result beside its file; returns the line that shows it."""
    if not isinstance(result, dict) or result.get("benchmark") != "dit_step":
        return []
    from benchmarks.plots import plot_steps

    plot_steps(result, path.with_suffix(".png"))
    return [f"![{path.stem}]({path.stem}.png)", ""]


def _section(value: Any) -> list[str]:
    """Scalars as a list, lists of flat objects as tables, nested objects by their key."""
    if isinstance(value, list):
        return _table(value)
    lines = [f"- {name}: {_text(item)}" for name, item in value.items() if not isinstance(item, dict | list)]
    for name, item in value.items():
        if isinstance(item, dict) and item:
            lines += ["", f"**{name}**", "", *_section(item)]
        elif isinstance(item, list) and item:
            lines += ["", f"**{name}**", "", *_table(item)]
    return lines


def _table(rows: list[Any]) -> list[str]:
    if not rows or not all(isinstance(row, dict) for row in rows):
        return [f"- {_text(row)}" for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_text(row.get(name, "")) for name in names) + " |" for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|")[:_LONG_TEXT]


if __name__ == "__main__":
    sys.exit(main())
