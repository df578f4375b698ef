"""I2V's conditioning tensor against a slow implementation written from the definition, over random cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindspeed_wan.errors import ConfigError, DataError
from mindspeed_wan.models import conditioning


def slow_channels(known: list[bool], latents: np.ndarray) -> np.ndarray:
    """Channel c of latent frame j says whether video frame 4(j-1)+1+c is known; all of frame 0's say frame 0."""
    frames = latents.shape[1]
    out = np.zeros((20, *latents.shape[1:]), dtype=np.float32)
    for j in range(frames):
        for channel in range(4):
            frame = 0 if j == 0 else 4 * (j - 1) + 1 + channel
            out[channel, j] = 1.0 if known[frame] else 0.0
    out[4:] = latents
    return out


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_against_the_definition(data):
    frames = 4 * data.draw(st.integers(0, 6)) + 1
    height, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    known = data.draw(st.lists(st.booleans(), min_size=frames, max_size=frames))
    seed = data.draw(st.integers(0, 1000))
    latents = torch.randn(16, (frames - 1) // 4 + 1, height, width, generator=torch.Generator().manual_seed(seed))
    mask = conditioning.mask_channels(torch.tensor(known), (height, width))
    channels = conditioning.condition_channels(mask, latents)
    assert np.array_equal(channels.numpy(), slow_channels(known, latents.numpy()))
    batched = conditioning.condition_channels(mask, latents.expand(2, *latents.shape))
    assert torch.equal(batched[1], channels)
    video = torch.rand(3, frames, 8, 8, generator=torch.Generator().manual_seed(seed))
    seen = conditioning.visible_video(video, torch.tensor(known))
    for index, is_known in enumerate(known):
        assert torch.equal(seen[:, index], video[:, index] if is_known else torch.zeros(3, 8, 8))


def test_first_frame_and_last_frame_masks_are_the_official_ones():
    first = conditioning.mask_channels(conditioning.known_frames(9), (2, 3))
    assert first.shape == (4, 3, 2, 3) and first[:, 0].min() == 1 and first[:, 1:].max() == 0
    both = conditioning.mask_channels(conditioning.known_frames(9, last=True), (2, 3))
    assert both[3, 2].min() == 1 and both[:3, 2].max() == 0  # only the fourth channel of the last latent frame
    three = conditioning.mask_channels(conditioning.known_frames(9, start=3), (1, 1))
    assert three[:, 1, 0, 0].tolist() == [1, 1, 0, 0]


def test_whole_frame_pixel_masks_equal_frame_masks():
    known = conditioning.known_frames(13, start=2, last=True)
    pixels = known[:, None, None].float().expand(13, 32, 48)
    assert torch.equal(conditioning.mask_channels(pixels, (4, 6)), conditioning.mask_channels(known, (4, 6)))


def test_place_frames():
    start, last = torch.rand(3, 2, 8, 8), torch.rand(3, 8, 8)
    video, known = conditioning.place_frames(start, 9, last)
    assert torch.equal(video[:, :2], start) and torch.equal(video[:, -1], last) and video[:, 2:-1].abs().max() == 0
    assert known.tolist() == [True, True, *[False] * 6, True]
    assert torch.equal(conditioning.visible_video(video, known), video)
    small = torch.rand(3, 4, 4)
    for arguments, match in (((start, 8), "not 4k"), ((start, 1), "do not fit"), ((start, 9, small), "4x4")):
        with pytest.raises(ConfigError, match=match):
            conditioning.place_frames(*arguments)
    with pytest.raises(DataError, match="latent frames"):
        conditioning.condition_channels(torch.zeros(4, 2, 3, 3), torch.zeros(16, 3, 3, 3))


@pytest.mark.parametrize("image_size", [(1080, 1920), (500, 501), (480, 100), (33, 3000)])
@pytest.mark.parametrize("area", [720 * 1280, 480 * 832])
def test_official_sizes_keep_the_shape(image_size, area):
    height, width = conditioning.fit_area(image_size, area)
    assert height % 16 == 0 and width % 16 == 0 and height * width <= area * 1.1
    if min(height, width) >= 160:
        assert abs(height / width - image_size[0] / image_size[1]) / (image_size[0] / image_size[1]) < 0.2


def test_recipes_resize_as_their_sources_do():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    lanczos = np.asarray(image.resize((64, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(conditioning.image_to_frame(image, (32, 64), "diffusers"), lanczos, atol=1e-6)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    bicubic = torch.nn.functional.interpolate(tensor[None], size=(32, 64), mode="bicubic")[0]
    assert torch.equal(conditioning.image_to_frame(image, (32, 64), "official"), bicubic)
    assert conditioning.image_to_frame(image, (32, 64), "videox").shape == (3, 32, 64)


def test_unreadable_images(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        conditioning.open_image(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read"):
        conditioning.open_image(str(tmp_path / "b.png"))


def test_text_alone_is_exact_zeros():
    assert conditioning.nothing_known((3, 4, 5)).shape == (20, 3, 4, 5)
    assert not conditioning.nothing_known((3, 4, 5)).any()
