"""Several models on the same references: one row per clip and model, means per model, the score."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation import metrics
from mindspeed_wan.evaluation.frames import align, find_videos, read_frames
from mindspeed_wan.evaluation.score import Rating, mean_subjective, score


@dataclass(frozen=True)
class ClipResult:
    """One generated clip against its reference. ``identical_frames`` were capped at 100 dB."""

    model: str
    clip: str
    video: str
    reference: str
    num_frames: int
    psnr_db: float
    ssim: float
    ms_ssim: float | None
    flicker: float
    motion: float
    reference_motion: float
    identical_frames: int


@dataclass(frozen=True)
class ModelResult:
    """Means over a model's clips; ``score`` needs ratings."""

    model: str
    num_clips: int
    psnr_db: float
    ssim: float
    ms_ssim: float | None
    flicker: float
    motion: float
    subjective: float | None
    score: float | None


def compare(
    reference: Path,
    models: dict[str, Path],
    *,
    ratings: Sequence[Rating] = (),
    seed_compat: bool = False,
    on_clip: Callable[[str, str], None] | None = None,
) -> tuple[list[ClipResult], list[ModelResult]]:
    """Measure every model's videos against the references of the same file name.

    Raises:
        DataError: a model lacks a reference's clip, or has clips that no reference matches (none is left out).
    """
    references = find_videos(reference)
    clips: list[ClipResult] = []
    for model, folder in models.items():
        videos = find_videos(folder)
        _check_names(model, folder, set(references), set(videos))
        for name, path in videos.items():
            if on_clip:
                on_clip(model, name)
            clips.append(_measure(model, name, references[name], path, seed_compat))
    return clips, [_summarise(model, clips, ratings) for model in models]


def write_tables(out: Path, clips: list[ClipResult], models: list[ModelResult]) -> None:
    """Write ``clips.csv`` and ``summary.json`` (temporary name, then renamed)."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".clips.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(clips[0])))
        writer.writeheader()
        writer.writerows(asdict(clip) for clip in clips)
    os.replace(temporary, out / "clips.csv")
    temporary = out / ".summary.json.tmp"
    temporary.write_text(json.dumps([asdict(m) for m in models], indent=2), encoding="utf-8")
    os.replace(temporary, out / "summary.json")


def _measure(model: str, name: str, reference_path: Path, path: Path, seed_compat: bool) -> ClipResult:
    reference, _ = read_frames(reference_path)
    video, _ = read_frames(path)
    reference_motion = metrics.motion(reference)
    flicker, motion = metrics.flicker(video), metrics.motion(video)
    reference, video = align(reference, video)
    psnr = metrics.psnr(reference, video, seed_compat=seed_compat)
    ms_ssim = metrics.ms_ssim(reference, video)
    return ClipResult(
        model=model, clip=name, video=str(path), reference=str(reference_path), num_frames=len(video),
        psnr_db=float(psnr.mean()), ssim=float(metrics.ssim(reference, video).mean()),
        ms_ssim=None if ms_ssim is None else float(ms_ssim.mean()), flicker=flicker, motion=motion,
        reference_motion=reference_motion, identical_frames=int((psnr >= metrics.PSNR_CAP_DB).sum()),
    )


def _summarise(model: str, clips: list[ClipResult], ratings: Sequence[Rating]) -> ModelResult:
    own = [c for c in clips if c.model == model]
    psnr, ssim = (float(np.mean([getattr(c, k) for c in own])) for k in ("psnr_db", "ssim"))
    subjective = mean_subjective(list(ratings), model)
    multi_scale = [c.ms_ssim for c in own if c.ms_ssim is not None]
    return ModelResult(
        model=model, num_clips=len(own), psnr_db=psnr, ssim=ssim,
        ms_ssim=float(np.mean(multi_scale)) if multi_scale else None,
        flicker=float(np.mean([c.flicker for c in own])), motion=float(np.mean([c.motion for c in own])),
        subjective=subjective, score=None if subjective is None else score(subjective, psnr, ssim),
    )


def _check_names(model: str, folder: Path, references: set[str], videos: set[str]) -> None:
    missing, extra = sorted(references - videos), sorted(videos - references)
    if missing or extra:
        parts = [f"{label} {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
                 for label, names in (("lacks", missing), ("has no reference for", extra)) if names]
        raise DataError(f"model {model!r} {' and '.join(parts)}", where=str(folder),
                        fix="videos and references pair by file name")
