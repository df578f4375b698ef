"""Which pixels of a training clip an I2V model is told: start frames, a last frame, or Fun-InP's random masks.

A mask belongs to its sample (seed, index, epoch), so layouts, worker counts and resumed runs see the same ones. Kinds
and probabilities of ``masks`` are those of VideoX-Fun's ``get_random_mask``; there 1 means "generate", here True means
"known", as in ``models.conditioning``, which turns the mask into channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mindspeed_wan.config.schema import ConditioningSection
from mindspeed_wan.diffusion import randomness
from mindspeed_wan.errors import ConfigError

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""
_STREAM = "train.condition"
_DRAWS = 16


class Draws:
    """A few uniform numbers of one sample, taken one after the other."""

    def __init__(self, seed: int, index: int, epoch: int) -> None:
        self._values = iter(randomness.uniform(_DRAWS, seed=seed, sample_index=index, epoch=epoch,
                                               stream=_STREAM).tolist())
        # Enough bits for masks of many pixels; the kind and place of a mask come from the 128-bit stream above.
        self.pixels = randomness.generator(seed, index, epoch, f"{_STREAM}.pixels")

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        return next(self._values)

    def between(self, low: int, high: int) -> int:
        """Return a whole number in [low, high]; ``low`` where the range is empty."""
        return low + int(self.unit() * max(1, high - low + 1))


def known_pixels(section: ConditioningSection, size: Size, seed: int, key: tuple[int, int]) -> Tensor | None:
    """Return what of a clip is known: [F] bool for whole frames, [F, H, W] bool, or ``None`` for text alone.

    ``None`` is Fun-InP's 20 channels of exact zeros; a mask of nothing known gives an encoded grey video instead.

    Args:
        section: start frames, last frame or masks, with their probabilities.
        size: frames, height, width of the clip.
        seed: of the run.
        key: (sample index, epoch).

    Raises:
        ConfigError: more start frames than the clip has.
    """
    draws = Draws(seed, *key)
    if section.mode == "masks":
        return _random_mask(size, draws, section.grey_share)
    start = section.start_frames[draws.between(0, len(section.start_frames) - 1)]
    last = size[0] > 1 and draws.unit() < section.last_frame
    if start + last > size[0]:
        raise ConfigError(f"{start} start frames{' and a last one' if last else ''} do not fit a clip of {size[0]}",
                          fix="give fewer in conditioning.start_frames, or leave short clips out (min_num_frames)")
    known = torch.zeros(size[0], dtype=torch.bool)
    known[:start] = True
    known[size[0] - int(last):] = True
    return known


def mask_kind(size: Size, draw: float) -> str:
    """Return the kind of mask that a uniform number in [0, 1) selects for a clip, or for a single image."""
    table: Sequence[tuple[str, float]] = _VIDEO_KINDS if size[0] > 1 else _IMAGE_KINDS
    for kind, share in table:
        if draw < share:
            return kind
        draw -= share
    return table[-1][0]


def _random_mask(size: Size, draws: Draws, grey_share: float) -> Tensor | None:
    kind = mask_kind(size, draws.unit())
    if kind != "all":
        known = ~_GENERATED[kind](size, draws)
        if known.any():
            return known
    return torch.zeros(size[0], dtype=torch.bool) if draws.unit() < grey_share else None


def _frames(frames: Tensor, size: Size) -> Tensor:
    """Spread flags of frames [F] over pixels."""
    return frames[:, None, None].expand(size).clone()


def _first_given(size: Size, draws: Draws) -> Tensor:
    """Everything from frame 1 to 4 on is generated."""
    return _frames(torch.arange(size[0]) >= draws.between(1, min(4, size[0] - 1)), size)


def _ends_given(size: Size, draws: Draws) -> Tensor:
    """The frames between the first few and the last few are generated."""
    start, end = draws.between(1, min(4, size[0] - 2)), draws.between(1, min(4, size[0] - 2))
    frame = torch.arange(size[0])
    return _frames((frame >= start) & (frame < max(start + 1, size[0] - end)), size)


def _rectangle(size: Size, draws: Draws) -> Tensor:
    """A box of a quarter to three quarters of each side, the same in every frame."""
    result = torch.zeros(size, dtype=torch.bool)
    spans = []
    for side in size[1:]:
        length = draws.between(max(1, side // 4), max(1, side * 3 // 4))
        first = draws.between(0, side - length)
        spans.append(slice(first, first + length))
    result[:, spans[0], spans[1]] = True
    return result


def _rectangle_in_time(size: Size, draws: Draws) -> Tensor:
    """A box during part of the clip."""
    box = _rectangle(size, draws)
    first = draws.between(0, size[0] - 1)
    frame = torch.arange(size[0])
    return box & ((frame >= first) & (frame <= draws.between(first, size[0] - 1)))[:, None, None]


def _pixels(size: Size, draws: Draws) -> Tensor:
    """Each pixel of each frame by itself, with one probability per clip."""
    return torch.rand(size, generator=draws.pixels) < draws.unit()


def _blocks(size: Size, draws: Draws) -> Tensor:
    """Squares of 8 to 64 pixels, each generated or not, the same in every frame."""
    side, share = draws.between(8, 64), draws.unit()
    coarse = torch.rand(-(-size[1] // side), -(-size[2] // side), generator=draws.pixels) < share
    fine = coarse.repeat_interleave(side, 0).repeat_interleave(side, 1)[: size[1], : size[2]]
    return fine.expand(size).clone()


def _oval(size: Size, draws: Draws, *, round_: bool) -> Tensor:
    """An ellipse or a circle [H, W] somewhere in the picture."""
    _, height, width = size
    centre_y, centre_x = draws.between(0, height - 1), draws.between(0, width - 1)
    short = min(height, width)
    radius_y = draws.between(max(1, short // 8), max(1, short // 2))
    radius_x = radius_y if round_ else draws.between(max(1, short // 8), max(1, short // 2))
    y, x = torch.arange(height)[:, None] - centre_y, torch.arange(width)[None] - centre_x
    # Whole numbers, so that the edge is the same on every machine.
    return (y * radius_x) ** 2 + (x * radius_y) ** 2 < (radius_x * radius_y) ** 2


def _first_oval(size: Size, draws: Draws) -> Tensor:
    """An ellipse of the first frame only."""
    result = torch.zeros(size, dtype=torch.bool)
    result[0] = _oval(size, draws, round_=False)
    return result


def _circle(size: Size, draws: Draws) -> Tensor:
    """A circle in every frame."""
    return _oval(size, draws, round_=True).expand(size).clone()


def _some_frames(size: Size, draws: Draws) -> Tensor:
    """Each frame with probability one half."""
    return _frames(torch.rand(size[0], generator=draws.pixels) < 0.5, size)


_VIDEO_KINDS = (("box", 0.05), ("all", 0.2), ("first", 0.2), ("ends", 0.2), ("time box", 0.05), ("pixels", 0.05),
                ("blocks", 0.05), ("oval", 0.1), ("circle", 0.05), ("frames", 0.05))
_IMAGE_KINDS = (("all", 0.7), ("box", 0.2), ("oval", 0.05), ("circle", 0.05))
_GENERATED: dict[str, Callable[[Size, Draws], Tensor]] = {
    "box": _rectangle, "first": _first_given, "ends": _ends_given, "time box": _rectangle_in_time, "pixels": _pixels,
    "blocks": _blocks, "oval": _first_oval, "circle": _circle, "frames": _some_frames,
}
"""Every kind but ``all`` with the function that says what is generated, [F, H, W] bool."""
