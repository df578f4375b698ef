"""Frames and sizes as MindSpeed-MM takes them; the reference here is its published rule, written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.data import transforms
from mindspeed_wan.data.plan import (
    ClipSettings,
    FrameWindow,
    choose_frames,
    frame_window,
    sample_shape,
    size_plan,
)
from mindspeed_wan.data.records import ClipRecord, RowSource
from mindspeed_wan.errors import DataError
from mindspeed_wan.models.vae import unit_range


def _settings(**changes):
    return ClipSettings(**{"num_frames": 49, "max_height": 480, "max_width": 832, **changes})


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "fps", "changes", "first", "take"),
    [
        (81, 24, {}, [0, 1, 2], 49),
        (48, 24, {}, [0, 1, 2], 45),
        (49, 24, {}, [0, 1, 2], 49),
        (1, 24, {}, [0], 1),
        (120, 60, {"auto_interval": True}, [0, 2, 5], 45),
        (120, 30, {"auto_interval": True}, [0, 1, 2, 3, 5], 49),
        (120, 24.05, {"auto_interval": True}, [0, 1, 2], 49),
        (60, 12, {"auto_interval": True}, [0, 0, 1, 1], 49),
        (120, 24, {"frame_interval": 3}, [0, 3, 6], 37),
        (200, 24, {"speed_factor": 2.0}, [0, 2, 4], 49),
        (60, 24, {"speed_factor": 2.0}, [0, 1, 2], 49),
    ],
)
def test_frames_after_resampling(num_frames, fps, changes, first, take):
    window = frame_window(_settings(**changes), num_frames, fps, None)
    assert list(window.indices[: len(first)]) == first and window.take == take
    assert max(window.indices) < num_frames


@given(st.integers(1, 400), st.floats(5, 120), st.integers(0, 12), st.booleans(), st.floats(0, 1, exclude_max=True),
       st.sampled_from(["random", "head", "center", "uniform"]))
@settings(max_examples=150, deadline=None)
def test_every_choice_gives_4k_plus_1_ascending_frames_inside_the_clip(frames, fps, quarter, auto, draw, choice):
    config = _settings(num_frames=4 * quarter + 1, auto_interval=auto)
    window = frame_window(config, frames, fps, None)
    chosen = choose_frames(window, choice, draw)
    assert len(chosen) == window.take and window.take % 4 == 1 and window.take <= config.num_frames
    assert chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < frames


def test_frame_choices():
    window = FrameWindow(tuple(range(10)), 5)
    assert choose_frames(window, "head", 0.9) == [0, 1, 2, 3, 4]
    assert choose_frames(window, "center", 0.9) == [2, 3, 4, 5, 6]
    assert choose_frames(window, "uniform", 0.9) == [0, 2, 4, 6, 9]
    starts = {choose_frames(window, "random", draw / 100)[0] for draw in range(100)}
    assert starts == set(range(6))


def test_a_window_of_the_annotation_is_kept():
    window = frame_window(_settings(num_frames=9), 100, 24, (20, 40))
    assert window.indices == tuple(range(20, 40)) and window.take == 9
    with pytest.raises(DataError, match="cut ends at frame 120"):
        frame_window(_settings(), 100, 24, (20, 120))


@pytest.mark.parametrize(("frames", "fps"), [(10**12, 24.0), (81, 1e-300), (81, 1e-9), (10**300, 24.0)])
def test_absurd_annotations_are_named_instead_of_counted(frames, fps):
    with pytest.raises(DataError, match="more than 10,000,000 frames"):
        frame_window(_settings(auto_interval=fps != 24.0), frames, fps, None)


def test_short_clips_and_missing_rates_are_named():
    with pytest.raises(DataError, match="min_num_frames is 9"):
        frame_window(_settings(min_num_frames=9), 8, 24, None)
    with pytest.raises(DataError, match="no frame rate"):
        frame_window(_settings(auto_interval=True), 80, 0, None)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [(480, 832, (480, 832)), (1080, 1920, (480, 853)), (720, 1280, (480, 853)), (960, 960, (832, 832)),
     (240, 416, (480, 832)), (500, 832, (500, 832))],
)
def test_exact_size(height, width, resized):
    plan = size_plan(_settings(), height, width)
    assert (plan.resized, plan.out) == (resized, (480, 832))


@pytest.mark.parametrize(
    ("height", "width", "resized", "out"),
    [
        (1080, 1920, (473, 842), (464, 832)),
        (480, 832, (480, 832), (480, 832)),
        (333, 555, (333, 555), (320, 544)),
        (1920, 1080, (842, 473), (832, 464)),
    ],
)
def test_free_size_keeps_the_ratio_within_max_pixels(height, width, resized, out):
    plan = size_plan(_settings(force_resolution=False), height, width)
    assert (plan.resized, plan.out) == (resized, out)


@given(st.integers(16, 3000), st.integers(16, 3000), st.booleans())
@settings(max_examples=200, deadline=None)
def test_sizes_are_legal_or_refused(height, width, force):
    config = _settings(force_resolution=force)
    try:
        plan = size_plan(config, height, width)
    except DataError:
        return
    assert all(side % 16 == 0 for side in plan.out) and plan.out[0] * plan.out[1] <= config.max_pixels
    assert all(cut <= have for cut, have in zip(plan.out, plan.resized))


@pytest.mark.parametrize(
    ("height", "width", "force", "message"),
    [(100, 2000, True, "side ratio"), (3000, 300, True, "side ratio"), (160, 160, False, "min_hxw"),
     (8, 2000, False, "min_hxw"), (400, 3000, False, "side ratio")],
)
def test_sizes_outside_the_settings_are_named(height, width, force, message):
    with pytest.raises(DataError, match=message):
        size_plan(_settings(force_resolution=force), height, width)


def test_a_crop_of_the_annotation_counts():
    record = ClipRecord(path="x.mp4", captions=("c",), source=RowSource("f", 3), num_frames=50, fps=24, height=1080,
                        width=1920, crop=(0, 960, 0, 540))
    assert sample_shape(_settings(force_resolution=False), record) == (49, 464, 832)
    with pytest.raises(DataError, match=r"f:3: crop .* outside"):
        sample_shape(_settings(), ClipRecord(path="x.mp4", captions=("c",), source=RowSource("f", 3), num_frames=50,
                                             fps=24, height=100, width=100, crop=(0, 200, 0, 50)))


@pytest.mark.parametrize("changes", [{"num_frames": 48}, {"hw_stride": 8}, {"max_height": 470}, {"max_width": 840}])
def test_illegal_settings_name_a_legal_value(changes):
    with pytest.raises(DataError):
        _settings(**changes)


def to_sample(*arguments):
    """Return the sample as the VAE reads it, fp32 in [-1, 1]."""
    return unit_range(transforms.to_sample(*arguments))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _frames(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, height, width, 3), np.uint8)


def test_pixels_follow_the_published_pipeline():
    """ResizeVideo on 8-bit frames without antialiasing, ToTensorVideo, norm_fun 0.5, CenterCropResizeVideo."""
    frames, config = _frames(540, 960), _settings()
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    clip = torch.nn.functional.interpolate(clip, size=(480, 853), mode="bilinear", align_corners=False)
    values = (clip.float() / 255.0 - 0.5) / 0.5
    left = round((853 - 832) / 2)
    expected = values[..., left : left + 832].permute(1, 0, 2, 3)
    sample = to_sample(frames, size_plan(config, 540, 960), config, (0.0, 0.0))
    assert torch.equal(sample, expected) and sample.dtype == torch.float32 and sample.shape == (3, 3, 480, 832)


def test_extremes_map_to_minus_one_and_one():
    frames = np.zeros((1, 64, 96, 3), np.uint8)
    frames[:, :, 48:] = 255
    config = _settings(max_height=64, max_width=96)
    sample = to_sample(frames, size_plan(config, 64, 96), config, (0, 0))
    assert sample.unique().tolist() == [-1.0, 1.0]


def test_a_random_crop_reaches_both_edges_and_follows_its_draw():
    frames = _frames(64, 200)
    config = _settings(max_height=64, max_width=96, crop="random")
    plan = size_plan(config, 64, 200)
    whole = (torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255 - 0.5) / 0.5
    assert torch.equal(to_sample(frames, plan, config, (0.0, 0.0)), whole[..., :96])
    assert torch.equal(to_sample(frames, plan, config, (0.0, 0.9999)), whole[..., -96:])
    assert torch.equal(to_sample(frames, plan, config, (0.5, 0.5)), to_sample(frames, plan, config, (0.5, 0.5)))


@pytest.mark.parametrize("changes", [{"interpolation": "bicubic"}, {"antialias": True}])
def test_other_filters_differ_from_the_default(changes):
    frames = _frames(200, 300)
    base, other = _settings(max_height=64, max_width=96), _settings(max_height=64, max_width=96, **changes)
    plan = size_plan(base, 200, 300)
    assert not torch.equal(to_sample(frames, plan, base, (0, 0)), to_sample(frames, plan, other, (0, 0)))
