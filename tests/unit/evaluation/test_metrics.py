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


def test_ms_ssim_is_measured_from_the_first_size_that_it_can_be() -> None:
    least = metrics.MS_SSIM_MIN_SIDE
    small, large = (metrics.ms_ssim(*_pair(1, (side, least + 9))) for side in (least - 1, least))
    assert small is None and large is not None and 0 < large[0] < 1


def test_identical_frames_are_capped_and_seed_arithmetic_wraps() -> None:
    reference, video = _pair(noise=40)
    assert metrics.psnr(reference, reference).tolist() == [metrics.PSNR_CAP_DB] * 3
    assert (metrics.identical_frames(reference, reference), metrics.identical_frames(reference, video)) == (3, 0)
    # A black frame against value 240: true MSE 57600, wrapped uint8 arithmetic sees (256-240)^2 = 256 mod 256 = 0.
    black, bright = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 240, np.uint8)
    assert metrics.psnr(black, bright)[0] == pytest.approx(20 * np.log10(255 / 240), rel=1e-9)
    assert metrics.psnr(black, bright, seed_compat=True)[0] > 40 and metrics.identical_frames(black, bright) == 0
    assert (metrics.psnr(reference, video, seed_compat=True) > metrics.psnr(reference, video)).all()


def test_flicker_and_motion_see_what_they_should() -> None:
    still = np.full((6, 48, 64, 3), 80, np.uint8)
    assert metrics.flicker(still) == 1.0 and metrics.motion(still) < 0.01
    strobe = still.copy()
    strobe[1::2] = 180
    assert metrics.flicker(strobe) == pytest.approx(1 - 100 / 255)
    assert metrics.flicker(still[:1]) == 1.0 and metrics.motion(still[:1]) == 0.0


@pytest.mark.parametrize(("size", "step"), [((96, 128), 1), ((96, 128), 4), ((240, 320), 2), ((240, 320), 10)])
def test_motion_is_the_length_of_a_known_shift(size: tuple[int, int], step: int) -> None:
    from scipy.ndimage import gaussian_filter

    height, width = size
    scene = gaussian_filter(np.random.default_rng(1).uniform(0, 255, (height, width + 2 * step)), height / 80)
    scene = (scene - scene.min()) / np.ptp(scene) * 255
    slide = np.stack([scene[:, at * step : at * step + width] for at in range(3)])
    assert metrics.motion(slide[..., None].repeat(3, axis=-1).astype(np.uint8)) == pytest.approx(step, rel=0.1)


def test_frames_of_different_shape_are_refused() -> None:
    reference, video = _pair()
    with pytest.raises(ConfigError, match="differ"):
        metrics.psnr(reference, video[:, :-1])
