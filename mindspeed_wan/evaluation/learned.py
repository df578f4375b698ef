"""Scores by networks whose weights lie in a local folder: text-video similarity, frame consistency, Frechet distance.

- text similarity: mean cosine between CLIP's vector of the prompt and those of the frames, in [-1, 1]. (CLIPScore as
  torchmetrics reports it is 100 times that.)
- frame consistency: mean cosine between CLIP's vectors of neighbouring frames.
- Frechet distance: between Gaussians fitted to the features of all generated and of all reference clips. With VideoMAE
  features it orders models as FVD does, but the numbers are not those of I3D's FVD and depend on the number of clips:
  compare only models measured with the same folder on the same clips.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mindspeed_wan.errors import DataError
from mindspeed_wan.models.score_models import ClipScorer


def clip_scores(scorer: ClipScorer, frames: np.ndarray, prompt: str | None) -> tuple[float | None, float]:
    """Return (text similarity, ``None`` without a prompt; frame consistency) of one video."""
    vectors = scorer.frames(frames)
    consistency = float((vectors[1:] * vectors[:-1]).sum(dim=-1).mean()) if len(vectors) > 1 else 1.0
    if prompt is None:
        return None, consistency
    return float((vectors @ scorer.texts([prompt])[0]).mean()), consistency


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features [n, d], in fp64.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``; with fewer rows than columns the covariances are singular, which
    the symmetric form of the root used here allows.

    Raises:
        DataError: fewer than two rows in a set.
    """
    if min(len(first), len(second)) < 2:
        raise DataError(f"a Frechet distance needs at least two feature rows a side, there are {len(first)} and "
                        f"{len(second)}", fix="give more clips")
    one, two = first.double(), second.double()
    root = _root(torch.cov(one.T))
    crossed = torch.linalg.eigvalsh(root @ torch.cov(two.T) @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(dim=0) - two.mean(dim=0)).square().sum()
    return float(means + one.var(dim=0).sum() + two.var(dim=0).sum() - 2 * crossed)


def _root(matrix: Tensor) -> Tensor:
    """Return the root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
