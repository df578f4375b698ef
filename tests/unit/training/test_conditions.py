"""Masks of I2V training: probabilities as documented, a function of the sample, and channels by the definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.config.schema import ConditioningSection
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models import conditioning
from mindspeed_wan.training import conditions
from mindspeed_wan.training.conditions import known_pixels, mask_kind

SIZE = (9, 32, 48)
MASKS = ConditioningSection(mode="masks")


def slow_mask(known: np.ndarray, latent: tuple[int, int]) -> np.ndarray:
    """Channel c of latent frame j is video frame 4(j-1)+1+c (0 for j=0), sampled between its two middle pixels."""
    frames = 1 + (known.shape[0] - 1) // 4
    out = np.zeros((4, frames, *latent), dtype=np.float32)
    for channel in range(4):
        for j in range(frames):
            source = known[0 if j == 0 else 4 * (j - 1) + 1 + channel]
            for y in range(latent[0]):
                for x in range(latent[1]):
                    # Eight pixels to one: half-pixel centres fall between pixels 3 and 4 of the block.
                    out[channel, j, y, x] = source[8 * y + 3 : 8 * y + 5, 8 * x + 3 : 8 * x + 5].mean()
    return out


@settings(max_examples=100, deadline=None)
@given(frames=st.integers(0, 4), height=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 10**6),
       epoch=st.integers(0, 5))
def test_mask_channels_of_random_masks_follow_the_definition(frames, height, width, seed, epoch):
    size = (4 * frames + 1, 8 * height, 8 * width)
    known = known_pixels(MASKS, size, seed, (3, epoch))
    again = known_pixels(MASKS, size, seed, (3, epoch))
    if known is None:
        assert again is None
        return
    assert torch.equal(known, again)
    pixels = known if known.dim() == 3 else known[:, None, None].expand(size)
    expected = slow_mask(pixels.float().numpy(), (height, width))
    assert np.allclose(conditioning.mask_channels(known, (height, width)).numpy(), expected, atol=1e-6)
    seen = conditioning.visible_video(torch.ones(3, *size), known)
    assert torch.equal(seen[0].bool(), pixels) and torch.equal(seen[2], seen[0])


@pytest.mark.parametrize("frames", [1, 9])
def test_kinds_have_the_documented_probabilities(frames):
    documented = {1: {"all": 0.7, "box": 0.2, "oval": 0.05, "circle": 0.05},
                  9: {"box": 0.05, "all": 0.2, "first": 0.2, "ends": 0.2, "time box": 0.05, "pixels": 0.05,
                      "blocks": 0.05, "oval": 0.1, "circle": 0.05, "frames": 0.05}}[frames]
    counts = Counter(mask_kind((frames, 8, 8), (number + 0.5) / 2000) for number in range(2000))
    assert counts == {kind: pytest.approx(2000 * share, abs=1) for kind, share in documented.items()}


def test_kinds_are_what_they_are_called():
    for index in range(40):
        def draws(number: int = index) -> conditions.Draws:
            return conditions.Draws(0, number, 0)

        masks = {kind: make(SIZE, draws()) for kind, make in conditions._GENERATED.items()}
        whole = masks["first"].flatten(1).float().mean(1)
        start = int(9 - whole.sum())
        assert 1 <= start <= 4 and whole[:start].sum() == 0 and whole[start:].min() == 1
        ends = masks["ends"].flatten(1).float().mean(1)
        assert ends[0] == 0 and ends[-1] == 0 and ends.sum() >= 1 and set(ends.tolist()) == {0.0, 1.0}
        for still in ("box", "blocks", "circle"):
            assert torch.equal(masks[still][0], masks[still][-1])
        assert masks["box"].any() and not masks["box"].all()
        assert masks["oval"][0].any() and not masks["oval"][1:].any()
        assert torch.equal(masks["time box"].any(0), masks["time box"][masks["time box"].flatten(1).any(1)][0])
        assert masks["frames"].flatten(1).float().mean(1).unique().tolist() in ([0.0, 1.0], [0.0], [1.0])


def test_text_alone_is_zeros_nine_times_of_ten():
    outcomes = Counter()
    for index in range(1500):
        known = known_pixels(MASKS, (5, 16, 16), 1, (index, 0))
        outcomes["zeros" if known is None else "some" if known.any() else "grey"] += 1
    nothing = outcomes["zeros"] + outcomes["grey"]
    assert 0.17 < nothing / 1500 < 0.26 and 0.05 < outcomes["grey"] / nothing < 0.16


def test_start_and_last_frames():
    first = ConditioningSection()
    assert first.is_default and known_pixels(first, SIZE, 0, (0, 0)).tolist() == [True] + [False] * 8
    both = ConditioningSection(start_frames=(2,), last_frame=1.0)
    assert known_pixels(both, SIZE, 0, (0, 0)).tolist() == [True, True] + [False] * 6 + [True]
    mixed = ConditioningSection(start_frames=(1, 5), last_frame=0.5)
    found = Counter(tuple(known_pixels(mixed, SIZE, 0, (index, 0)).tolist()) for index in range(400))
    assert len(found) == 4 and min(found.values()) > 60
    assert known_pixels(both, (5, 8, 8), 0, (0, 0)).sum() == 3
    with pytest.raises(ConfigError, match="do not fit a clip of 1"):
        known_pixels(both, (1, 8, 8), 0, (0, 0))
