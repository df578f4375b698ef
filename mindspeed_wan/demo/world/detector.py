"""Reads colour, shape and motion back from a clip by rules, so that a generated clip can be marked right or wrong.

Every pixel takes the nearest colour of the world (shapes' colours, and the backgrounds at several shades). The shape's
colour is the one with most pixels; the shape is the one whose ideal form, with the same area and centre, overlaps its
pixels best (edges that a VAE or a video codec softened matter little to that); the motion is the path of the centre.

Shapes: frames [F, H, W, 3] uint8; labels [F, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Return the form with the best mean overlap, over frames in which the shape is whole (touches no border)."""
    whole = [mask for mask in masks
             if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())]
    if not whole:
        return None
    overlaps = {name: np.mean([_overlap(mask, inside) for mask in whole]) for name, inside in _FORMS.items()}
    return max(overlaps, key=lambda name: overlaps[name])


def _overlap(mask: np.ndarray, inside: Form) -> float:
    """Intersection over union of ``mask`` with a form of its area around its centre."""
    rows, columns = np.indices(mask.shape)
    centre = np.argwhere(mask).mean(axis=0)
    form = inside(columns - centre[1], rows - centre[0], float(mask.sum()))
    return float((mask & form).sum() / (mask | form).sum())


Form = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(dx, dy, area in pixels) -> which pixels are inside; ``dy`` points down."""


def _circle(dx: np.ndarray, dy: np.ndarray, area: float) -> np.ndarray:
    return np.hypot(dx, dy) <= math.sqrt(area / math.pi)


def _square(dx: np.ndarray, dy: np.ndarray, area: float) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) <= math.sqrt(area) / 2


def _triangle(dx: np.ndarray, dy: np.ndarray, area: float) -> np.ndarray:
    """Equilateral, tip up: with circumradius r its area is 3 sqrt(3) / 4 r^2."""
    radius = math.sqrt(area * 4 / (3 * math.sqrt(3)))
    return (dy <= radius / 2) & (math.sqrt(3) * np.abs(dx) <= dy + radius)


_FORMS: dict[str, Form] = {"circle": _circle, "square": _square, "triangle": _triangle}


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
