"""One self-contained HTML file about a training run: what ran, its curves, what went wrong.

Reads what every run leaves in its save folder (``config.json``, ``versions.json``, ``metrics.jsonl``,
``bad_samples.jsonl``, ``validation/*.mp4``). Several runs (both experts, say) share the plots.
"""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation.html import figure, write_page

CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
    "seconds": "seconds per iteration",
    "data_wait": "share of the step spent waiting for data",
    "peak_memory_bytes": "peak device memory, bytes",
    "validation_loss": "validation loss",
}
"""Curves in the order of the page; one that no run has is left out."""

MAX_BAD_ROWS = 200


def run_report(runs: list[Path], out: Path) -> Path:
    """Write the report of ``runs`` (save folders) to the HTML file ``out`` and return it."""
    loaded = {_label(run, runs): _load(run) for run in runs}
    body = ["<h2>Curves</h2>"]
    for key, title in CURVES.items():
        series = {name: _series(run["metrics"], key) for name, run in loaded.items()}
        if any(points for points in series.values()):
            body.append(_curve_svg(title, series))
    sigmas = {name: [row["sigma"] for row in run["metrics"] if "sigma" in row] for name, run in loaded.items()}
    if any(sigmas.values()):
        body.append(_histogram_svg("mean sigma of each global batch", sigmas))
    for name, run in loaded.items():
        body.append(_run_section(name, run, out.parent))
    return write_page(out, "Training report", "".join(body))


def _load(folder: Path) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError("holds no metrics.jsonl", where=str(folder), fix="give the run's save folder (SAVE_PATH)")
    run: dict[str, Any] = {"folder": folder, "metrics": _json_lines(metrics)}
    for name in ("config", "versions"):
        path = folder / f"{name}.json"
        run[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    run["bad"] = _json_lines(folder / "bad_samples.jsonl")
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


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    if key == "data_wait":
        timed = [r for r in rows if r.get("seconds") and "data_seconds" in r]
        return [(r["iteration"], r["data_seconds"] / r["seconds"]) for r in timed]
    return [(r["iteration"], r[key]) for r in rows if isinstance(r.get(key), int | float)]


def _run_section(name: str, run: dict[str, Any], out: Path) -> str:
    rows = run["metrics"]
    last = f"{len(rows)} iterations, last loss {rows[-1]['loss']:.4f}" if rows else "no iteration yet"
    parts = [f"<h2>{html.escape(name)}</h2><p>{html.escape(str(run['folder']))}: {last}</p>"]
    if run["bad"]:
        shown = "".join(f"<tr><td>{html.escape(json.dumps(row, ensure_ascii=False))}</td></tr>"
                        for row in run["bad"][:MAX_BAD_ROWS])
        parts.append(f"<h3>{len(run['bad'])} bad samples</h3><table>{shown}</table>")
    if run["videos"]:
        parts.append("<h3>Validation videos</h3><div class=row>"
                     + "".join(figure(v, out, v.stem, "") for v in run["videos"]) + "</div>")
    for key in ("versions", "config"):
        if run[key] is not None:
            text = html.escape(json.dumps(run[key], indent=2, ensure_ascii=False))
            parts.append(f"<details><summary>{key}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _curve_svg(title: str, series: dict[str, list[tuple[int, float]]]) -> str:
    def draw(axes: Any) -> None:
        for name, points in series.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set_xlabel("iteration")

    return _svg(title, draw)


def _histogram_svg(title: str, values: dict[str, list[float]]) -> str:
    def draw(axes: Any) -> None:
        for name, data in values.items():
            if data:
                axes.hist(data, bins=40, range=(0, 1), alpha=0.6, label=name)
        axes.set_xlabel("sigma")

    return _svg(title, draw)


def _svg(title: str, draw: Any) -> str:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = picture.subplots()
    draw(axes)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg")
    return "<div>" + buffer.getvalue()[buffer.getvalue().index("<svg"):] + "</div>"
