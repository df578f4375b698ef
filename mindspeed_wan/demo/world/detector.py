"""Reads colour, shape and motion back from a clip by rules, so that a generated clip can be marked right or wrong.

Every pixel takes the nearest colour of the world (shapes' colours, and the backgrounds at several shades). The shape's
colour is the one with most pixels; the shape is read from how its pixels fill their bounding box, the motion from the
path of their centre.

Shapes: frames [F, H, W, 3] uint8; labels [F, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindspeed_wan.demo.clips import BACKGROUNDS, COLOURS
from mindspeed_wan.demo.world.scenes import Scene

_SHADES = (1.0, 0.92, 0.83, 0.75)
"""Backgrounds darken downwards; see ``clips.draw_frame``."""
_MIN_PIXELS = 30
"""Fewer coloured pixels than this in a frame are noise, not a shape."""
_MIN_TRAVEL = 0.08
"""Share of the picture the centre must cross to count as motion."""


@dataclass(frozen=True)
class Sighting:
    """What the rules see; ``None`` where they see nothing clear."""

    colour: str | None
    shape: str | None
    motion: str | None

    def matches(self, scene: Scene) -> bool:
        """True when colour, shape and motion are all as the caption says."""
        return (self.colour, self.shape, self.motion) == (scene.colour, scene.shape, scene.motion)


def detect(frames: np.ndarray) -> Sighting:
    """Return what a clip shows."""
    names = list(COLOURS)
    labels = _nearest_colour(frames)
    counts = np.array([(labels == i).sum() for i in range(len(names))])
    best = int(counts.argmax())
    masks = labels == best
    visible = masks.reshape(len(frames), -1).sum(axis=1) >= _MIN_PIXELS
    if visible.sum() < 2:
        return Sighting(None, None, None)
    return Sighting(names[best], _shape(masks[visible]), _motion(masks, visible))


def _nearest_colour(frames: np.ndarray) -> np.ndarray:
    """Label every pixel with the index of a shape colour; backgrounds get indices above those."""
    backgrounds = [np.array(rgb) * shade for rgb in BACKGROUNDS.values() for shade in _SHADES]
    palette = np.array([*COLOURS.values(), *backgrounds], np.float32)
    pixels = frames.astype(np.float32)
    distance = ((pixels[..., None, :] - palette) ** 2).sum(axis=-1)
    return distance.argmin(axis=-1)


def _shape(masks: np.ndarray) -> str | None:
    """Vote over frames in which the shape is whole (touches no border)."""
    votes = []
    for mask in masks:
        if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
            continue
        votes.append(_shape_of(mask))
    if not votes:
        return None
    return max(set(votes), key=votes.count)


def _shape_of(mask: np.ndarray) -> str:
    """Tell the shapes apart by how they fill their bounding box: square 1, circle 0.785, triangle 0.5."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    fill = mask.sum() / (height * width)
    if fill > 0.9:
        return "square"
    return "circle" if fill > 0.65 else "triangle"


def _motion(masks: np.ndarray, visible: np.ndarray) -> str | None:
    """Follow the centre from the first to the last visible frames."""
    size = np.array(masks.shape[1:])
    centres = np.array([np.argwhere(mask).mean(axis=0) / size for mask in masks[visible]])
    third = max(1, len(centres) // 3)
    down, right = centres[-third:].mean(axis=0) - centres[:third].mean(axis=0)
    if max(abs(down), abs(right)) < _MIN_TRAVEL:
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"
