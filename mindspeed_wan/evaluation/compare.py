"""Several models side by side, with or without references: one row per clip and model, means per model, the score."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation import metrics
from mindspeed_wan.evaluation.frames import align, find_videos, read_frames
from mindspeed_wan.evaluation.score import Rating, mean_subjective, score

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_wan.models.score_models import ClipScorer, VideoFeatures


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """One generated clip. What needs a reference is ``None`` without one; ``identical_frames`` were cut to 100 dB."""

    model: str
    clip: str
    video: str
    reference: str | None = None
    num_frames: int
    psnr_db: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None
    flicker: float
    motion: float
    reference_motion: float | None = None
    identical_frames: int | None = None
    text_similarity: float | None = None
    frame_consistency: float | None = None
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """Means over a model's clips; ``score`` needs ratings and references, ``frechet_distance`` references."""

    model: str
    num_clips: int
    psnr_db: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None
    flicker: float
    motion: float
    text_similarity: float | None = None
    frame_consistency: float | None = None
    frechet_distance: float | None = None
    subjective: float | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured besides the metrics that need no weights.

    ``clip`` scores text and frames, with the prompts of ``prompts`` (by clip) or of the files beside the videos;
    ``features`` gives what the Frechet distance compares.
    """

    seed_compat: bool = False
    clip: ClipScorer | None = None
    features: VideoFeatures | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)


def compare(
    reference: Path | None,
    models: dict[str, Path],
    *,
    ratings: Sequence[Rating] = (),
    measures: Measures | None = None,
    on_clip: Callable[[str, str], None] | None = None,
) -> tuple[list[ClipResult], list[ModelResult]]:
    """Measure every model's videos, against the references of the same file name where there are any.

    Args:
        reference: folder of references, or ``None``; the first model's clips then say which ones all must have.
        models: folder of videos by name of the model.
        ratings: what people said.
        measures: what is measured.
        on_clip: called with model and clip before each.

    Raises:
        DataError: a model lacks a clip, or has one that no reference matches (none is left out).
    """
    measures = measures or Measures()
    found = {model: find_videos(folder) for model, folder in models.items()}
    references = find_videos(reference) if reference is not None else {}
    wanted = set(references or next(iter(found.values())))
    for model, videos in found.items():
        _check_names(model, models[model], wanted, set(videos), "reference" if references else "clip of that name")
    features = _Features(measures.features)
    clips: list[ClipResult] = []
    for model, videos in found.items():
        for name, path in videos.items():
            if on_clip:
                on_clip(model, name)
            frames = read_frames(path)[0]
            features.add(model, frames)
            clips.append(_measure(model, name, references.get(name), path, frames, measures))
    distances = features.distances(references)
    return clips, [_summarise(model, clips, ratings, distances.get(model)) for model in models]


class _Features:
    """Collects the features of every model's clips, and compares them with the references'."""

    def __init__(self, extract: VideoFeatures | None) -> None:
        self._extract, self._rows = extract, dict[str, "list[Tensor]"]()

    def add(self, model: str, frames: np.ndarray) -> None:
        """Add one clip of a model."""
        if self._extract is not None:
            self._rows.setdefault(model, []).append(self._extract(frames))

    def distances(self, references: Mapping[str, Path]) -> dict[str, float]:
        """Return the Frechet distance of each model; nothing without features or references."""
        if self._extract is None or not references:
            return {}
        import torch

        from mindspeed_wan.evaluation.learned import frechet_distance

        true = torch.cat([self._extract(read_frames(path)[0]) for path in references.values()])
        return {model: frechet_distance(torch.cat(rows), true) for model, rows in self._rows.items()}


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


def _measure(model: str, name: str, reference_path: Path | None, path: Path, video: np.ndarray, measures: Measures
             ) -> ClipResult:
    values: dict[str, float | int | str | None] = {}
    if measures.clip is not None:
        from mindspeed_wan.evaluation.learned import clip_scores, prompt_of

        prompt = prompt_of(path, measures.prompts)
        if prompt is None and reference_path is not None:
            prompt = prompt_of(reference_path, measures.prompts)
        similarity, consistency = clip_scores(measures.clip, video, prompt)
        values.update(text_similarity=similarity, frame_consistency=consistency, prompt=prompt)
    flicker, motion = metrics.flicker(video), metrics.motion(video)
    if reference_path is not None:
        reference = read_frames(reference_path)[0]
        values.update(reference=str(reference_path), reference_motion=metrics.motion(reference),
                      **_against(reference, video, measures.seed_compat))
    return ClipResult(model=model, clip=name, video=str(path), num_frames=len(video), flicker=flicker, motion=motion,
                      **values)  # type: ignore[arg-type]


def _against(reference: np.ndarray, video: np.ndarray, seed_compat: bool) -> dict[str, float | int | str | None]:
    """Return the metrics that compare with a reference, over the frames that both have."""
    reference, video = align(reference, video)
    psnr = metrics.psnr(reference, video, seed_compat=seed_compat)
    ms_ssim = metrics.ms_ssim(reference, video)
    return {
        "psnr_db": float(psnr.mean()), "ssim": float(metrics.ssim(reference, video).mean()),
        "ms_ssim": None if ms_ssim is None else float(ms_ssim.mean()),
        "identical_frames": int((psnr >= metrics.PSNR_CAP_DB).sum()),
    }


def _summarise(model: str, clips: list[ClipResult], ratings: Sequence[Rating], distance: float | None) -> ModelResult:
    own = [clip for clip in clips if clip.model == model]

    def mean(name: str) -> float | None:
        values = [value for clip in own if (value := getattr(clip, name)) is not None]
        return float(np.mean(values)) if values else None

    psnr, ssim, subjective = mean("psnr_db"), mean("ssim"), mean_subjective(list(ratings), model)
    has_score = subjective is not None and psnr is not None and ssim is not None
    return ModelResult(
        model=model, num_clips=len(own), psnr_db=psnr, ssim=ssim, ms_ssim=mean("ms_ssim"),
        flicker=float(mean("flicker") or 0.0), motion=float(mean("motion") or 0.0),
        text_similarity=mean("text_similarity"), frame_consistency=mean("frame_consistency"),
        frechet_distance=distance, subjective=subjective,
        score=score(subjective, psnr, ssim) if has_score else None,  # type: ignore[arg-type]
    )


def _check_names(model: str, folder: Path, wanted: set[str], videos: set[str], counterpart: str) -> None:
    missing, extra = sorted(wanted - videos), sorted(videos - wanted)
    if missing or extra:
        parts = [f"{label} {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
                 for label, names in (("lacks", missing), (f"has no {counterpart} for", extra)) if names]
        raise DataError(f"model {model!r} {' and '.join(parts)}", where=str(folder),
                        fix="videos pair by file name")
