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

_LUMA = np.array([0.299, 0.587, 0.114])
_MS_SSIM_MIN_SIDE = 161
"""Five scales with an 11-pixel window need more than (11 - 1) * 2**4 pixels a side."""


def psnr(reference: np.ndarray, video: np.ndarray, *, seed_compat: bool = False) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each frame in dB, at most ``PSNR_CAP_DB``."""
    _check_pair(reference, video)
    if seed_compat:
        difference = (reference - video).astype(np.float64)  # uint8 wraps: kept on purpose
        squared = ((reference - video) ** 2).astype(np.float64)
        mean = squared.reshape(len(difference), -1).mean(axis=1)
    else:
        difference = reference.astype(np.float64) - video.astype(np.float64)
        mean = (difference**2).reshape(len(difference), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        value = 20 * np.log10(255.0) - 10 * np.log10(mean)
    return np.minimum(value, PSNR_CAP_DB)


def ssim(reference: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Return the structural similarity of each frame's luma, in [-1, 1]."""
    from skimage.metrics import structural_similarity

    _check_pair(reference, video)
    if min(reference.shape[1:3]) < 7:
        raise ConfigError(f"SSIM's window is 7 pixels, the frames are {reference.shape[1:3]}")
    pairs = zip(luma(reference), luma(video), strict=True)
    return np.array([structural_similarity(a, b, data_range=255.0) for a, b in pairs])


def ms_ssim(reference: np.ndarray, video: np.ndarray) -> np.ndarray | None:
    """Return multi-scale SSIM of each frame (RGB), or None for frames too small for its five scales."""
    _check_pair(reference, video)
    if min(reference.shape[1:3]) < _MS_SSIM_MIN_SIDE:
        return None
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    values = []
    for a, b in zip(reference, video, strict=True):
        first, second = (torch.from_numpy(np.ascontiguousarray(f)).permute(2, 0, 1)[None].float() for f in (a, b))
        values.append(float(measure(first, second, data_range=255.0)))
    return np.array(values)


def flicker(video: np.ndarray) -> float:
    """Return VBench's temporal flickering score, (255 - mean |f[i] - f[i+1]|) / 255; 1 is a still picture."""
    if len(video) < 2:
        return 1.0
    frames = video.astype(np.float64)
    return float((255.0 - np.abs(frames[1:] - frames[:-1]).mean()) / 255.0)


def motion(video: np.ndarray) -> float:
    """Return the mean length of the optical flow between neighbouring frames, in pixels per frame.

    Flow: scikit-image's iterative Lucas-Kanade on luma, averaged over the fastest-moving 5 % of pixels, so that a
    small moving object on a still background counts.
    """
    from skimage.registration import optical_flow_ilk

    if len(video) < 2:
        return 0.0
    grey = luma(video) / 255.0
    lengths = []
    for before, after in itertools.pairwise(grey):
        flow = optical_flow_ilk(before, after, radius=7)
        length = np.sort(np.hypot(flow[0], flow[1]).ravel())
        lengths.append(length[-max(1, length.size // 20):].mean())
    return float(np.mean(lengths))


def luma(frames: np.ndarray) -> np.ndarray:
    """Return BT.601 luma [T, H, W] float64 in [0, 255]."""
    return frames.astype(np.float64) @ _LUMA


def _check_pair(reference: np.ndarray, video: np.ndarray) -> None:
    if reference.shape != video.shape or reference.dtype != np.uint8 or video.dtype != np.uint8:
        raise ConfigError(
            f"frames differ: reference {reference.shape} {reference.dtype}, video {video.shape} {video.dtype}",
            fix="align() cuts and resizes; frames are uint8 RGB",
        )
