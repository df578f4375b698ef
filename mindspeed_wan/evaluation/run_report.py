"""One self-contained HTML file about training runs: what ran, its curves, what went wrong, what it makes.

Reads what every run leaves in its save folder: ``config.json``, ``versions.json``, ``metrics.jsonl``,
``validation.jsonl``, ``bad_samples.jsonl`` and ``validation/iter_*/``. Several runs (both experts, say) share the
plots; a folder that holds ``high/`` and ``low/`` counts as both.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation.charts import Points, bars, curves, smooth
from mindspeed_wan.evaluation.html import SYNC, figure, write_page

CURVES = {
    "loss": "loss (thin: each iteration, thick: running mean)",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
    "throughput": "samples per second",
    "seconds": "seconds per iteration",
    "data_wait": "share of the step spent waiting for data",
    "peak_memory": "peak device memory of the first rank, GiB",
}
"""Curves in the order of the page; one that no run has is left out."""

MAX_BAD_ROWS = 200
MAX_VIDEO_ITERATIONS = 8
"""Of more iterations with validation videos, the first, the last and some between are shown."""
GIB = 2**30
EXPERTS = ("high", "low")


def run_report(runs: list[Path], out: Path) -> Path:
    """Write the report of ``runs`` (save folders) to the HTML file ``out`` and return it.

    Raises:
        DataError: a folder without ``metrics.jsonl``, or a damaged file.
    """
    runs = [folder for run in runs for folder in _experts(run)]
    loaded = {_label(run, runs): _load(run) for run in runs}
    body = ["<h2>Curves</h2>"]
    for key, title in CURVES.items():
        series = {name: _series(run, key) for name, run in loaded.items()}
        if any(series.values()):
            body.append(curves(title, series, smoothed=smooth if key == "loss" else None))
    body += [_quartile_chart(name, run) for name, run in loaded.items()]
    body.append(_sigma_chart(loaded))
    for name, run in loaded.items():
        body.append(_run_section(name, run, out.parent))
    return write_page(out, "Training report", "".join(body), SYNC)


def _experts(run: Path) -> list[Path]:
    """Return the run itself, or the runs of both experts inside the folder of ``--expert both``."""
    inside = [run / expert for expert in EXPERTS if (run / expert / "metrics.jsonl").is_file()]
    return inside if inside and not (run / "metrics.jsonl").is_file() else [run]


def _load(folder: Path) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError("holds no metrics.jsonl", where=str(folder), fix="give the run's save folder (SAVE_PATH)")
    run: dict[str, Any] = {"folder": folder, "metrics": _json_lines(metrics)}
    for name in ("config", "versions"):
        path = folder / f"{name}.json"
        run[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    run["bad"] = _json_lines(folder / "bad_samples.jsonl")
    run["validation"] = _json_lines(folder / "validation.jsonl")
    run["videos"] = sorted((folder / "validation").glob("**/*.mp4"))
    return run


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; the last one may be torn by a kill, any other bad line is an error."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines):
                raise DataError("is not JSON", where=f"{path}:{number}") from None
    return rows


def _label(run: Path, runs: list[Path]) -> str:
    return run.name if sum(r.name == run.name for r in runs) == 1 else str(run)


def _series(run: dict[str, Any], key: str) -> Points:
    """Return (iteration, value) of one curve."""
    rows = run["metrics"]
    timed = [row for row in rows if row.get("seconds")]
    if key == "validation_loss":
        return _numbers(run["validation"], "loss")
    if key == "data_wait":
        return [(row["iteration"], row["data_seconds"] / row["seconds"]) for row in timed if "data_seconds" in row]
    if key == "throughput":
        # A step's samples are what it consumed; the first row of a file has nothing to be compared with.
        return [(row["iteration"], (row["consumed_samples"] - before["consumed_samples"]) / row["seconds"])
                for before, row in itertools.pairwise(timed) if "consumed_samples" in before and
                row.get("consumed_samples", 0) > before["consumed_samples"]]
    if key == "peak_memory":
        return [(at, value / GIB) for at, value in _numbers(rows, "peak_memory_bytes") if value]
    return _numbers(rows, key)


def _numbers(rows: list[dict[str, Any]], key: str) -> Points:
    """Return the finite values; a step that was left out may have reported none."""
    return [(row["iteration"], row[key]) for row in rows
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])]


def _quartile_chart(name: str, run: dict[str, Any]) -> str:
    """Return the validation loss of each quarter of the sigmas."""
    rows = [row for row in run["validation"] if row.get("quartiles")]
    if not rows:
        return ""
    bounds = rows[-1]["sigma_bounds"]
    series = {f"sigma {low:.3f} to {high:.3f}": [(row["iteration"], row["quartiles"][part]) for row in rows
                                                 if row["quartiles"][part] is not None]
              for part, (low, high) in enumerate(itertools.pairwise(bounds))}
    return curves(f"validation loss by sigma: {name}", series)


def _sigma_chart(loaded: dict[str, dict[str, Any]]) -> str:
    """Return how often each sigma was trained on, over the whole run."""
    counts: dict[str, list[int]] = {}
    for name, run in loaded.items():
        per_step = [row["sigma_counts"] for row in run["metrics"] if row.get("sigma_counts")]
        if per_step:
            counts[name] = [sum(column) for column in zip(*per_step)]
    return bars("sigmas of all training samples", counts, (0.0, 1.0), "sigma") if counts else ""


def _run_section(name: str, run: dict[str, Any], out: Path) -> str:
    rows = run["metrics"]
    last = f"{len(rows)} iterations, last loss {rows[-1]['loss']:.4f}" if rows else "no iteration yet"
    skipped = sum(bool(row.get("skipped")) for row in rows)
    last += f", {skipped} left out" if skipped else ""
    if run["validation"]:
        last += f", last validation loss {run['validation'][-1]['loss']:.6f}"
    parts = [f"<h2>{html.escape(name)}</h2><p>{html.escape(str(run['folder']))}: {last}</p>"]
    if run["bad"]:
        shown = "".join(f"<tr><td>{html.escape(json.dumps(row, ensure_ascii=False))}</td></tr>"
                        for row in run["bad"][:MAX_BAD_ROWS])
        more = f" (the first {MAX_BAD_ROWS})" if len(run["bad"]) > MAX_BAD_ROWS else ""
        parts.append(f"<h3>{len(run['bad'])} bad samples{more}</h3><table>{shown}</table>")
    parts.append(_videos(run["videos"], out))
    for key in ("versions", "config"):
        if run[key] is not None:
            text = html.escape(json.dumps(run[key], indent=2, ensure_ascii=False))
            parts.append(f"<details><summary>{key}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _videos(videos: list[Path], out: Path) -> str:
    """Return one row of players a prompt, in order of iteration; the players of a row run in step."""
    folders = sorted({video.parent for video in videos})
    shown = _spread(folders, MAX_VIDEO_ITERATIONS)
    rows: dict[str, list[Path]] = {}
    for video in videos:
        if video.parent in shown:
            rows.setdefault(video.name, []).append(video)
    if not rows:
        return ""
    told = _told(shown[-1])
    hidden = len(folders) - len(shown)
    left = f" ({hidden} of {len(folders)} iterations are left out)" if hidden else ""
    parts = [f"<h3>Validation videos{left}</h3>"]
    if told.get("note"):
        parts.append(f"<p>{html.escape(told['note'])}</p>")
    prompts = {entry["file"]: entry["prompt"] for entry in told.get("videos", ())}
    for name, row in sorted(rows.items()):
        players = "".join(figure(video, out, video.parent.name.removeprefix("iter_").lstrip("0") or "0", "")
                          for video in row)
        parts.append(f"<h4>{html.escape(prompts.get(name, name))}</h4><div class=row>{players}</div>")
    return "".join(parts)


def _told(folder: Path) -> dict[str, Any]:
    """Return what the run wrote about the videos of one iteration; nothing where it wrote nothing."""
    path = folder / "videos.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DataError("is not JSON", where=str(path)) from None
    return found if isinstance(found, dict) else {}


def _spread(items: list[Path], limit: int) -> list[Path]:
    """Return at most ``limit`` items, first and last included, evenly spread."""
    if len(items) <= limit:
        return items
    return [items[round(at * (len(items) - 1) / (limit - 1))] for at in range(limit)]
