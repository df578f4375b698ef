"""Charts as inline SVG, drawn by matplotlib: curves, histograms, bars by name."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Points = list[tuple[int, float]]
"""(iteration, value), in order."""

MAX_POINTS = 2000
"""Longer curves are averaged over equal runs of points, so that a page of a long run stays small."""
WINDOW = 50
"""A running mean covers about a fiftieth of the curve."""
MAX_NAMES = 24
"""More names than this under one chart cannot be read."""


def curves(title: str, series: Mapping[str, Points], *, smoothed: Callable[[Points], Points] | None = None) -> str:
    """Return one line for each name; with ``smoothed``, the points thin and what it makes of them thick."""
    def draw(axes: Any) -> None:
        for name, points in series.items():
            if not points:
                continue
            thinned = thin(points)
            line, = axes.plot(*zip(*thinned), label=None if smoothed else _label(name),
                              linewidth=0.5 if smoothed else 1.2, alpha=0.4 if smoothed else 1.0,
                              marker="o" if len(thinned) < 3 else None)
            if smoothed:
                axes.plot(*zip(*thin(smoothed(points))), label=_label(name), linewidth=1.4, color=line.get_color())
        axes.set_xlabel("iteration")

    return _svg(title, draw)


def bars(title: str, counts: Mapping[str, Sequence[float]], limits: tuple[float, float], label: str) -> str:
    """Return a histogram of given counts in equal bins of ``limits``, one colour a name."""
    def draw(axes: Any) -> None:
        low, high = limits
        for name, values in counts.items():
            width = (high - low) / len(values)
            places = [low + width * (at + 0.5) for at in range(len(values))]
            axes.bar(places, values, width=width, alpha=0.6, label=_label(name))
        axes.set_xlabel(label)

    return _svg(title, draw)


def grouped(title: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """Return bars side by side: ``values[series][name]``, one group a name."""
    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(name for row in values.values() for name in row))
        width = 0.8 / max(1, len(values))
        for number, (series, row) in enumerate(values.items()):
            places = [at + (number - (len(values) - 1) / 2) * width for at, name in enumerate(names) if name in row]
            axes.bar(places, [row[name] for name in names if name in row], width=width, label=_label(series))
        if len(names) > MAX_NAMES:
            axes.set_xticks([])
            axes.set_xlabel(f"{len(names)} clips, in the order of the page")
        else:
            axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 6 else 0)

    return _svg(title, draw, legend_outside=True)  # bars leave no room for it


def thin(points: Points) -> Points:
    """Return at most ``MAX_POINTS`` points, each the mean of a run of equally many."""
    step = -(-len(points) // MAX_POINTS)
    if step <= 1:
        return points
    runs = [points[at : at + step] for at in range(0, len(points), step)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]


def smooth(points: Points) -> Points:
    """Return the running mean over the last ``len / WINDOW`` points."""
    window, total, result = max(1, len(points) // WINDOW), 0.0, []
    for at, (iteration, value) in enumerate(points):
        total += value - (points[at - window][1] if at >= window else 0.0)
        result.append((iteration, total / min(at + 1, window)))
    return result


def _label(name: str) -> str:
    """Return a name for the legend, from which matplotlib leaves those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def _svg(title: str, draw: Callable[[Any], None], *, legend_outside: bool = False) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text: any script and sign is shown by the browser's fonts, and a $ in a name is no formula.
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # only measured with matplotlib's own font
        picture = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = picture.subplots()
        draw(axes)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if legend_outside:
            picture.legend(loc="outside right upper")
        elif axes.get_legend_handles_labels()[0]:
            axes.legend()
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return f"<div>{_own_names(buffer.getvalue())}</div>"


def _own_names(svg: str) -> str:
    """Return the ``<svg>`` element with ids that no other chart of the page has."""
    text = svg[svg.index("<svg") :]
    mark = f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{mark}-", text)
