"""The DiT step as a picture: speed beside diffusers, and what share of one large matrix product it reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_steps(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with two bars per row of a ``dit_step`` result, written beside and then renamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    names = [f"{row['case']}\n{row['dtype']} {'compiled' if row['compiled'] else 'eager'}" for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.55 * len(rows)), sharey=True,
                                            constrained_layout=True)
    left.barh(names, [row["ratio"] for row in rows], color="tab:blue")
    left.axvline(1.0, color="black", linewidth=1, linestyle=":")
    left.set(xlabel="times as fast as diffusers in the same run")
    right.barh(names, [100 * row["share_of_gemm"] for row in rows], color="tab:green")
    right.axvline(100.0, color="black", linewidth=1, linestyle=":")
    right.set(xlabel="% of one large matrix product in the same run")
    left.invert_yaxis()
    figure.suptitle(f"{result['machine']['device']}, {result['tokens']} tokens, {result['config']['num_layers']} blocks"
                    f" of width {result['config']['dim']} ({result['clock']})", fontsize=10)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)
