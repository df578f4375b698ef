"""The seed's score of one model: half human, half reference metrics.

score = 0.5 * subjective / 20 + 0.25 * PSNR / 50 + 0.25 * SSIM; subjective is the sum of four criteria, each 1 to 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation.tables import read_table

CRITERIA = ("dynamics", "camera", "frame_quality", "accuracy")
"""What a person rates, each from 1 (bad) to 5 (good)."""

_COLUMNS = ("model", "clip", *CRITERIA)


@dataclass(frozen=True)
class Rating:
    """One person's view of one clip; ``total`` is out of 20."""

    model: str
    clip: str
    points: tuple[int, int, int, int]

    @property
    def total(self) -> int:
        """Sum of the four criteria."""
        return sum(self.points)


def score(subjective: float, psnr_db: float, ssim: float) -> float:
    """Return the weighted score in [0, 1] (PSNR counts up to 50 dB)."""
    return 0.5 * subjective / 20 + 0.25 * min(psnr_db, 50.0) / 50 + 0.25 * ssim


def read_ratings(path: Path) -> list[Rating]:
    """Read the CSV that the rating sheet exports; every bad row is named with its line."""
    ratings = []
    for where, row in read_table(path, _COLUMNS):
        try:
            points = tuple(int(row[name]) for name in CRITERIA)
        except ValueError:
            raise DataError(f"points must be whole numbers: {row}", where=where) from None
        if not all(1 <= p <= 5 for p in points):
            raise DataError(f"points {points} are not between 1 and 5", where=where)
        ratings.append(Rating(row["model"], row["clip"], points))  # type: ignore[arg-type]
    return ratings


def check_ratings(ratings: Sequence[Rating], clips: Mapping[str, Collection[str]]) -> None:
    """Refuse ratings that would be ignored: of a model or clip that is not compared.

    Args:
        ratings: what people said.
        clips: names of the clips of each model.
    """
    unknown = dict.fromkeys(f"{r.model}/{r.clip}" for r in ratings if r.clip not in clips.get(r.model, ()))
    if unknown:
        shown = ", ".join(list(unknown)[:10]) + (" ..." if len(unknown) > 10 else "")
        raise DataError(f"ratings of clips that are not compared: {shown}",
                        fix=f"the models are {', '.join(clips)}: name them with --model as the rating sheet does")


def mean_subjective(ratings: Sequence[Rating]) -> float | None:
    """Return the mean total (of 20) over all persons and clips; None when nobody rated any."""
    return sum(r.total for r in ratings) / len(ratings) if ratings else None
