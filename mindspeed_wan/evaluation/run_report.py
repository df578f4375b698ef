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
from mindspeed_wan.evaluation.html import SYNC, figure, may_embed, write_page

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
LIST_FILE = "videos.json"
GIB = 2**30
EXPERTS = ("high", "low")


def run_report(runs: list[Path], out: Path) -> Path:
    """Write the report of ``runs`` (save folders) to the HTML file ``out`` and return it.

    Raises:
        DataError: a folder without ``metrics.jsonl``, or a damaged file.
    """
    runs = list(dict.fromkeys(folder.resolve() for run in runs for folder in _experts(run)))
    loaded = {_label(run, runs): _load(run) for run in runs}
    body = ["<h2>Curves</h2>"]
    for key, title in CURVES.items():
        series = {name: _series(run, key) for name, run in loaded.items()}
        if any(series.values()):
            body.append(curves(title, series, smoothed=smooth if key == "loss" else None))
    body += [_quartile_chart(name, run) for name, run in loaded.items()]
    body.append(_sigma_chart(loaded))
    embed = may_embed(video for run in loaded.values() for video in run["videos"])
    for name, run in loaded.items():
        body.append(_run_section(name, run, out.parent, embed))
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
        run[name] = _json(folder / f"{name}.json")
    # Every start of a run lists what it finds, so a clip that nobody mended is there more than once.
    bad = _json_lines(folder / "bad_samples.jsonl")
    run["bad"] = list({json.dumps(row, sort_keys=True): row for row in bad}.values())
    run["validation"] = _json_lines(folder / "validation.jsonl")
    found = sorted({video.parent for video in (folder / "validation").glob("iter_*/*.mp4")})
    shown = _spread(found, MAX_VIDEO_ITERATIONS)
    run["videos"] = [video for iteration in shown for video in sorted(iteration.glob("*.mp4"))]
    run["iterations_with_videos"] = len(found)
    return run


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; the last one may be torn by a kill, any other bad line is an error."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise DataError("is not JSON", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise DataError("is not a JSON object", where=f"{path}:{number}")
        rows.append(row)
    return rows


def _json(path: Path) -> Any:
    """Read a JSON file; ``None`` where there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError("is not JSON", where=str(path)) from None


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


def _run_section(name: str, run: dict[str, Any], out: Path, embed: bool) -> str:
    rows = run["metrics"]
    losses = _numbers(rows, "loss")
    last = f"{len(rows)} iterations" if rows else "no iteration yet"
    last += f", last loss {losses[-1][1]:.4f}" if losses else ""
    skipped = sum(bool(row.get("skipped")) for row in rows)
    last += f", {skipped} left out" if skipped else ""
    if measured := _numbers(run["validation"], "loss"):
        last += f", last validation loss {measured[-1][1]:.6f}"
    parts = [f"<h2>{html.escape(name)}</h2><p>{html.escape(str(run['folder']))}: {last}</p>"]
    if run["bad"]:
        shown = "".join(f"<tr><td>{html.escape(json.dumps(row, ensure_ascii=False))}</td></tr>"
                        for row in run["bad"][:MAX_BAD_ROWS])
        more = f" (the first {MAX_BAD_ROWS})" if len(run["bad"]) > MAX_BAD_ROWS else ""
        parts.append(f"<h3>{len(run['bad'])} bad samples{more}</h3><table>{shown}</table>")
    parts.append(_videos(run["videos"], run["iterations_with_videos"], out, embed))
    for key in ("versions", "config"):
        if run[key] is not None:
            text = html.escape(json.dumps(run[key], indent=2, ensure_ascii=False))
            parts.append(f"<details><summary>{key}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _videos(videos: list[Path], num_iterations: int, out: Path, embed: bool) -> str:
    """Return one row of players a prompt, in order of iteration; the players of a row run in step."""
    if not videos:
        return ""
    hidden = num_iterations - len({video.parent for video in videos})
    left = f" ({hidden} of {num_iterations} iterations are left out)" if hidden else ""
    parts = [f"<h3>Validation videos{left}</h3>"]
    told = _json(videos[-1].with_name(LIST_FILE)) or {}
    if told.get("note"):
        parts.append(f"<p>{html.escape(told['note'])}</p>")
    prompts = {entry["file"]: entry["prompt"] for entry in told.get("videos", ())}
    for name in sorted({video.name for video in videos}):
        players = "".join(figure(video, out, video.parent.name.removeprefix("iter_").lstrip("0") or "0", "",
                                 embed=embed) for video in videos if video.name == name)
        parts.append(f"<h4>{html.escape(prompts.get(name, name))}</h4><div class=row>{players}</div>")
    return "".join(parts)


def _spread(items: list[Path], limit: int) -> list[Path]:
    """Return at most ``limit`` items, first and last included, evenly spread."""
    if len(items) <= limit:
        return items
    return [items[round(at * (len(items) - 1) / (limit - 1))] for at in range(limit)]
