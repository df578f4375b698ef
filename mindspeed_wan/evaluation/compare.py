"""Several models side by side, with or without references: one row per clip and model, means per model, the score."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation import metrics
from mindspeed_wan.evaluation.frames import align, find_videos, read_frames
from mindspeed_wan.evaluation.output import write_text
from mindspeed_wan.evaluation.prompts import prompt_of
from mindspeed_wan.evaluation.score import Rating, check_ratings, mean_subjective, score

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_wan.models.score_models import ClipScorer, VideoFeatures


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """One generated clip. What needs a reference is ``None`` without one.

    Attributes:
        compared_frames: frames that clip and reference both have; the metrics with a reference look at these.
        identical_frames: of these, equal in every pixel; their PSNR counts as 100 dB.
        resized: the frames were scaled to the reference's size.
    """

    model: str
    clip: str
    video: str
    reference: str | None = None
    prompt: str | None = None
    num_frames: int
    fps: float
    reference_frames: int | None = None
    reference_fps: float | None = None
    compared_frames: int | None = None
    identical_frames: int | None = None
    resized: bool | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None
    flicker: float
    motion: float
    reference_motion: float | None = None
    text_similarity: float | None = None
    frame_consistency: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """Means over a model's clips; ``score`` needs ratings and references, ``frechet_distance`` references.

    ``subjective`` is the mean of ``num_ratings`` rows of the rating sheets, out of 20.
    """

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
    num_ratings: int | None = None
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


@dataclass(frozen=True)
class _Video:
    """One video file in memory."""

    path: Path
    frames: np.ndarray
    fps: float
    motion: float

    @classmethod
    def read(cls, path: Path) -> _Video:
        frames, fps = read_frames(path)
        return cls(path, frames, fps, metrics.motion(frames))


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
        DataError: a model lacks a clip, or has one that no reference matches (none is left out); ratings or prompts of
            other clips.
    """
    measures = measures or Measures()
    found = {model: find_videos(folder) for model, folder in models.items()}
    references = find_videos(reference) if reference is not None else {}
    wanted = references or next(iter(found.values()))
    for model, videos in found.items():
        _check_names(model, models[model], set(wanted), set(videos), "reference" if references else "clip of that name")
    check_ratings(ratings, found)
    if measures.prompts and not set(measures.prompts) & set(wanted):
        raise DataError(f"the prompts are of other clips: {', '.join(list(measures.prompts)[:10])}",
                        fix=f"the clips are {', '.join(list(wanted)[:10])}")
    features = _Features(measures.features)
    clips: list[ClipResult] = []
    for name in wanted:
        true = _Video.read(references[name]) if references else None
        if true is not None:
            features.add(None, true.frames)
        for model, videos in found.items():
            if on_clip:
                on_clip(model, name)
            video = _Video.read(videos[name])
            features.add(model, video.frames)
            clips.append(_measure(model, name, true, video, measures))
    return clips, [_summarise(model, clips, ratings, features.distance(model)) for model in models]


class _Features:
    """Collects the features of every model's clips, and of the references (model ``None``)."""

    def __init__(self, extract: VideoFeatures | None) -> None:
        self._extract, self._rows = extract, dict["str | None", "list[Tensor]"]()

    def add(self, model: str | None, frames: np.ndarray) -> None:
        """Add one clip."""
        if self._extract is not None:
            self._rows.setdefault(model, []).append(self._extract(frames))

    def distance(self, model: str) -> float | None:
        """Return the Frechet distance of a model to the references; ``None`` without features or references."""
        if None not in self._rows:
            return None
        import torch

        from mindspeed_wan.evaluation.learned import frechet_distance

        return frechet_distance(torch.cat(self._rows[model]), torch.cat(self._rows[None]))


def remarks(clips: Sequence[ClipResult]) -> list[str]:
    """Return what a reader must know about how clips were compared, a sentence each; nothing if all pairs match."""
    told = []
    for model in dict.fromkeys(clip.model for clip in clips):
        own = [clip for clip in clips if clip.model == model and clip.reference is not None]
        for changed, text in (
            ([c for c in own if c.fps != c.reference_fps],
             "another frame rate than the reference ({0.clip}: {0.fps:g} against {0.reference_fps:g} frames a second): "
             "frame i was compared with frame i, whatever their times"),
            ([c for c in own if c.num_frames != c.reference_frames],
             "another length than the reference ({0.clip}: {0.num_frames} against {0.reference_frames} frames): "
             "only the first frames that both have were compared"),
            ([c for c in own if c.resized],
             "another size than the reference ({0.clip}): its frames were scaled before they were compared"),
        ):
            if changed:
                told.append(f"{model}: {len(changed)} of {len(own)} clips have {text.format(changed[0])}.")
    return told


def write_tables(out: Path, clips: list[ClipResult], models: list[ModelResult]) -> None:
    """Write ``clips.csv`` and ``summary.json``."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(asdict(clips[0])))
    writer.writeheader()
    writer.writerows(asdict(clip) for clip in clips)
    write_text(out / "clips.csv", table.getvalue())
    write_text(out / "summary.json", json.dumps([asdict(m) for m in models], indent=2, ensure_ascii=False) + "\n")


def _measure(model: str, name: str, true: _Video | None, video: _Video, measures: Measures) -> ClipResult:
    prompt = prompt_of(video.path, measures.prompts)
    if prompt is None and true is not None:
        prompt = prompt_of(true.path, measures.prompts)
    values: dict[str, float | int | str | None] = {}
    if measures.clip is not None:
        from mindspeed_wan.evaluation.learned import clip_scores

        similarity, consistency = clip_scores(measures.clip, video.frames, prompt)
        values.update(text_similarity=similarity, frame_consistency=consistency)
    if true is not None:
        values.update(_against(true, video, measures.seed_compat))
    return ClipResult(model=model, clip=name, video=str(video.path), prompt=prompt, num_frames=len(video.frames),
                      fps=video.fps, flicker=metrics.flicker(video.frames), motion=video.motion,
                      **values)  # type: ignore[arg-type]


def _against(true: _Video, video: _Video, seed_compat: bool) -> dict[str, float | int | str | None]:
    """Return the metrics that compare with a reference, over the frames that both have."""
    reference, frames = align(true.frames, video.frames)
    ms_ssim = metrics.ms_ssim(reference, frames)
    return {
        "reference": str(true.path), "reference_frames": len(true.frames), "reference_fps": true.fps,
        "reference_motion": true.motion, "compared_frames": len(frames),
        "identical_frames": metrics.identical_frames(reference, frames),
        "resized": true.frames.shape[1:] != video.frames.shape[1:],
        "psnr_db": float(metrics.psnr(reference, frames, seed_compat=seed_compat).mean()),
        "ssim": float(metrics.ssim(reference, frames).mean()),
        "ms_ssim": None if ms_ssim is None else float(ms_ssim.mean()),
    }


def _summarise(model: str, clips: list[ClipResult], ratings: Sequence[Rating], distance: float | None) -> ModelResult:
    own, said = [clip for clip in clips if clip.model == model], [r for r in ratings if r.model == model]

    def mean(name: str) -> float | None:
        values = [value for clip in own if (value := getattr(clip, name)) is not None]
        return float(np.mean(values)) if values else None

    psnr, ssim, subjective = mean("psnr_db"), mean("ssim"), mean_subjective(said)
    has_score = subjective is not None and psnr is not None and ssim is not None
    return ModelResult(
        model=model, num_clips=len(own), psnr_db=psnr, ssim=ssim, ms_ssim=mean("ms_ssim"),
        flicker=float(mean("flicker") or 0.0), motion=float(mean("motion") or 0.0),
        text_similarity=mean("text_similarity"), frame_consistency=mean("frame_consistency"),
        frechet_distance=distance, num_ratings=len(said) or None, subjective=subjective,
        score=score(subjective, psnr, ssim) if has_score else None,  # type: ignore[arg-type]
    )


def _check_names(model: str, folder: Path, wanted: set[str], videos: set[str], counterpart: str) -> None:
    missing, extra = sorted(wanted - videos), sorted(videos - wanted)
    if missing or extra:
        parts = [f"{label} {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
                 for label, names in (("lacks", missing), (f"has no {counterpart} for", extra)) if names]
        raise DataError(f"model {model!r} {' and '.join(parts)}", where=str(folder),
                        fix="videos pair by file name")
