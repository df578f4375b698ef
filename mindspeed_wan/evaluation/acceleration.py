"""What faster ways of generating cost: videos beside the exact ones, time beside theirs, and a gate on both.

Nothing is generated here (``cli.accelerate`` does); this is the arithmetic and the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mindspeed_wan.evaluation import metrics
from mindspeed_wan.evaluation.output import write_text


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generated video, with what it took.

    Attributes:
        frames: [T, H, W, 3] uint8.
        seconds: of the denoising steps; processor time on a CPU.
        evaluations: times that the blocks of a DiT ran.
        peak_bytes: largest memory held.
    """

    frames: np.ndarray
    seconds: float
    evaluations: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a candidate must reach; ``None`` asks for nothing. PSNR and SSIM count the worst video."""

    min_psnr_db: float | None = None
    min_ssim: float | None = None
    min_speedup: float | None = None

    def failures(self, result: Result) -> tuple[str, ...]:
        """Return what ``result`` misses."""
        checks = (("PSNR", result.worst_psnr_db, self.min_psnr_db, "dB"),
                  ("SSIM", result.worst_ssim, self.min_ssim, ""), ("speed-up", result.speedup, self.min_speedup, ""))
        return tuple(f"{name} {value:.4g} {unit}".strip() + f" is below {least:g}"
                     for name, value, least, unit in checks if least is not None and value < least)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One candidate over all videos; ratios are of sums, so long videos count more.

    Attributes:
        flags: what was added to the exact run's command line.
        speedup: seconds of the exact denoising over the candidate's.
        evaluations_saved: share of the exact run's DiT evaluations that did not run.
        failures: what the gate found.
    """

    name: str
    flags: str
    num_videos: int
    psnr_db: float
    worst_psnr_db: float
    ssim: float
    worst_ssim: float
    speedup: float
    evaluations_saved: float
    seconds: float
    peak_gib: float
    failures: tuple[str, ...] = ()


def summarise(name: str, flags: str, runs: Sequence[Run], exact: Sequence[Run], thresholds: Thresholds) -> Result:
    """Measure a candidate's videos against the exact ones of the same prompts and seeds."""
    psnr = [float(metrics.psnr(a.frames, b.frames).mean()) for a, b in zip(exact, runs, strict=True)]
    ssim = [float(metrics.ssim(a.frames, b.frames).mean()) for a, b in zip(exact, runs, strict=True)]
    seconds, evaluations = sum(run.seconds for run in runs), sum(run.evaluations for run in runs)
    result = Result(
        name=name, flags=flags, num_videos=len(runs), psnr_db=fmean(psnr), worst_psnr_db=min(psnr), ssim=fmean(ssim),
        worst_ssim=min(ssim), speedup=sum(run.seconds for run in exact) / seconds,
        evaluations_saved=1 - evaluations / sum(run.evaluations for run in exact), seconds=seconds,
        peak_gib=max(run.peak_bytes for run in runs) / 2**30,
    )
    return Result(**{**asdict(result), "failures": thresholds.failures(result)})


def fastest_passing(results: Sequence[Result]) -> Result | None:
    """Return the fastest candidate that the gate lets through."""
    return max((result for result in results if not result.failures), key=lambda result: result.speedup, default=None)


def markdown(results: Sequence[Result], left_out: dict[str, str]) -> str:
    """Return the results as a table, the fastest first, and why some candidates were left out."""
    lines = ["| candidate | flags | PSNR dB (worst) | SSIM (worst) | evaluations saved | speed-up | peak GiB | gate |",
             "|---|---|---|---|---|---|---|---|"]
    for r in sorted(results, key=lambda result: -result.speedup):
        lines.append(
            f"| {r.name} | `{r.flags}` | {r.psnr_db:.2f} ({r.worst_psnr_db:.2f}) | {r.ssim:.4f} ({r.worst_ssim:.4f}) | "
            f"{r.evaluations_saved:.1%} | {r.speedup:.2f} | {r.peak_gib:.2f} | {'; '.join(r.failures) or 'pass'} |")
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def write_report(out: Path, facts: dict[str, Any], results: Sequence[Result], left_out: dict[str, str]) -> None:
    """Write ``acceleration.json`` and ``acceleration.md`` into ``out``.

    Args:
        facts: model, machine and exact run, JSON-ready.
        results: one for each candidate.
        left_out: candidates that this model cannot run, and why.
    """
    record = {**facts, "candidates": [asdict(result) for result in results], "left_out": left_out}
    write_text(out / "acceleration.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    told = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items())
    write_text(out / "acceleration.md", f"# Acceleration\n\n{told}\n\n{markdown(results, left_out)}\n")
