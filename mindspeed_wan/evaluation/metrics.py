"""Metrics of frame arrays that need no downloaded weights.

Shapes: frames [T, H, W, 3] uint8, RGB. Full-reference metrics return one value per frame, [T] float64.

PSNR and SSIM follow the definitions of the seed's evaluation (per frame, SSIM on BT.601 luma with scikit-image's
uniform 7x7 window). ``seed_compat`` repeats its uint8 arithmetic, whose differences wrap around at 256 and so report
too high a PSNR; use it only to compare with old figures.
"""

from __future__ import annotations

import itertools

import numpy as np

from mindspeed_wan.errors import ConfigError

PSNR_CAP_DB = 100.0
"""PSNR of identical frames; infinity would swallow every mean."""

_FLOW_SIDE = 160
"""Short side of the pictures whose flow is taken: its cost grows with the area, and far motion gets nearer."""
_LUMA = np.array([0.299, 0.587, 0.114])
MIN_SIDE = 7
"""SSIM's window; smaller frames are no videos."""
MS_SSIM_MIN_SIDE = 176
"""Halved four times, a side must still hold MS-SSIM's window of 11 pixels."""


def psnr(reference: np.ndarray, video: np.ndarray, *, seed_compat: bool = False) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each frame in dB, at most ``PSNR_CAP_DB``."""
    _check_pair(reference, video)
    error = _wrapped_squared_error if seed_compat else _squared_error
    mean = np.array([error(a, b) for a, b in zip(reference, video)])
    with np.errstate(divide="ignore"):
        value = 20 * np.log10(255.0) - 10 * np.log10(mean)
    return np.minimum(value, PSNR_CAP_DB)


def identical_frames(reference: np.ndarray, video: np.ndarray) -> int:
    """Return how many frames are equal in every pixel: those that ``PSNR_CAP_DB`` stands for."""
    _check_pair(reference, video)
    return sum(np.array_equal(a, b) for a, b in zip(reference, video))


def ssim(reference: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Return the structural similarity of each frame's luma, in [-1, 1]."""
    from skimage.metrics import structural_similarity

    _check_pair(reference, video)
    if min(reference.shape[1:3]) < MIN_SIDE:
        raise ConfigError(f"SSIM's window is {MIN_SIDE} pixels, the frames are {reference.shape[1:3]}")
    return np.array([structural_similarity(luma(a), luma(b), data_range=255.0) for a, b in zip(reference, video)])


def ms_ssim(reference: np.ndarray, video: np.ndarray) -> np.ndarray | None:
    """Return multi-scale SSIM of each frame (RGB), or None for frames too small for its five scales."""
    _check_pair(reference, video)
    if min(reference.shape[1:3]) < MS_SSIM_MIN_SIDE:
        return None
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    values = []
    for a, b in zip(reference, video):
        first, second = (torch.from_numpy(np.ascontiguousarray(f)).permute(2, 0, 1)[None].float() for f in (a, b))
        values.append(float(measure(first, second, data_range=255.0)))
    return np.array(values)


def flicker(video: np.ndarray) -> float:
    """Return VBench's temporal flickering score, (255 - mean |f[i] - f[i+1]|) / 255; 1 is a still picture."""
    differences = [np.abs(a.astype(np.int16) - b).mean() for a, b in itertools.pairwise(video)]
    return float(1.0 - np.mean(differences) / 255.0) if differences else 1.0


def motion(video: np.ndarray) -> float:
    """Return the mean length of the optical flow between neighbouring frames, in pixels per frame.

    Flow: scikit-image's iterative Lucas-Kanade on luma, large frames scaled down first. The length of a pair of frames
    is the one that 95 % of the pixels stay below: high enough that a moving object on a still background counts, while
    the few pixels where something enters the picture, whose flow means nothing, do not.
    """
    from skimage.registration import optical_flow_ilk

    lengths = []
    scale = max(1.0, min(video.shape[1:3]) / _FLOW_SIDE)
    for before, after in itertools.pairwise(_scaled_down(luma(frame) / 255.0, scale) for frame in video):
        flow = optical_flow_ilk(before, after, radius=7, prefilter=True)
        lengths.append(scale * np.quantile(np.hypot(flow[0], flow[1]), 0.95))
    return float(np.mean(lengths)) if lengths else 0.0


def luma(frame: np.ndarray) -> np.ndarray:
    """Return BT.601 luma [H, W] of one frame, float64 in [0, 255]."""
    return frame.astype(np.float64) @ _LUMA


def _scaled_down(picture: np.ndarray, scale: float) -> np.ndarray:
    """Return a picture [H, W] at 1/scale of its size, antialiased."""
    from PIL import Image

    if scale == 1.0:
        return picture
    height, width = (round(side / scale) for side in picture.shape)
    small = Image.fromarray(picture.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float64)


def _squared_error(reference: np.ndarray, video: np.ndarray) -> float:
    return float(np.square(reference.astype(np.float64) - video).mean())


def _wrapped_squared_error(reference: np.ndarray, video: np.ndarray) -> float:
    return float(np.square(reference - video).mean())  # uint8 wraps twice: kept on purpose


def _check_pair(reference: np.ndarray, video: np.ndarray) -> None:
    if reference.shape != video.shape or reference.dtype != np.uint8 or video.dtype != np.uint8:
        raise ConfigError(
            f"frames differ: reference {reference.shape} {reference.dtype}, video {video.shape} {video.dtype}",
            fix="align() cuts and resizes; frames are uint8 RGB",
        )
