"""Metrics against scikit-image and torchmetrics, and the traps of the seed's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.evaluation import metrics


def _pair(num_frames: int = 3, size: tuple[int, int] = (48, 64), noise: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)
    video = np.clip(reference.astype(int) + rng.integers(-noise, noise + 1, reference.shape), 0, 255).astype(np.uint8)
    return reference, video


def test_psnr_and_ssim_agree_with_scikit_image() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    reference, video = _pair()
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(reference, video)]
    np.testing.assert_allclose(metrics.psnr(reference, video), psnr, rtol=1e-6)
    weights = np.array([0.299, 0.587, 0.114])
    ssim = [structural_similarity(a @ weights, b @ weights, data_range=255.0) for a, b in zip(reference, video)]
    np.testing.assert_allclose(metrics.ssim(reference, video), ssim, rtol=1e-6)


def test_ms_ssim_and_psnr_agree_with_torchmetrics_over_the_batch() -> None:
    torch = pytest.importorskip("torch")
    torchmetrics = pytest.importorskip("torchmetrics")
    reference, video = _pair(2, (180, 192), 40)
    values = metrics.ms_ssim(reference, video)
    assert values is not None
    measure = torchmetrics.image.MultiScaleStructuralSimilarityIndexMeasure(data_range=255.0)
    tensors = [torch.from_numpy(v).permute(0, 3, 1, 2).float() for v in (reference, video)]
    psnr = torchmetrics.functional.image.peak_signal_noise_ratio(tensors[1], tensors[0], data_range=255.0,
                                                                 reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(reference, video), psnr.numpy(), atol=1e-4)
    assert values.mean() == pytest.approx(float(measure(*tensors)), abs=1e-4)
    assert metrics.ms_ssim(*_pair()) is None


def test_identical_frames_are_capped_and_seed_arithmetic_wraps() -> None:
    reference, video = _pair(noise=40)
    assert metrics.psnr(reference, reference).tolist() == [metrics.PSNR_CAP_DB] * 3
    # A black frame against value 240: true MSE 57600, wrapped uint8 arithmetic sees (256-240)^2 = 256 mod 256 = 0.
    black, bright = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 240, np.uint8)
    assert metrics.psnr(black, bright)[0] == pytest.approx(20 * np.log10(255 / 240), rel=1e-9)
    assert metrics.psnr(black, bright, seed_compat=True)[0] > 40
    assert (metrics.psnr(reference, video, seed_compat=True) > metrics.psnr(reference, video)).all()


def test_flicker_and_motion_see_what_they_should() -> None:
    still = np.full((6, 48, 64, 3), 80, np.uint8)
    assert metrics.flicker(still) == 1.0 and metrics.motion(still) < 0.01
    strobe = still.copy()
    strobe[1::2] = 180
    assert metrics.flicker(strobe) == pytest.approx(1 - 100 / 255)
    rng = np.random.default_rng(1)
    texture = np.kron(rng.integers(0, 256, (16, 32)), np.ones((4, 4))).astype(np.uint8)
    slide = {step: np.stack([np.repeat(np.roll(texture, step * i, axis=1)[:48, :96, None], 3, axis=2)
                             for i in range(5)]) for step in (1, 3)}
    assert 0.5 < metrics.motion(slide[1]) < metrics.motion(slide[3])


def test_frames_of_different_shape_are_refused() -> None:
    reference, video = _pair()
    with pytest.raises(ConfigError, match="differ"):
        metrics.psnr(reference, video[:, :-1])
