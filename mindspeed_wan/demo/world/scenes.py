"""The scenes of the world and the split of their combinations.

A scene is (colour, shape, motion); its caption is "a red circle moves left". Size, start and background vary from
clip to clip and are not in the caption. Every colour, shape and motion is trained, but an eighth of the combinations
only ever appears in the evaluation.

Shapes: frames [F, H, W, 3] uint8.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_wan.demo.clips import MOTIONS, SHAPES, draw_frame, mm_data_settings, write_mp4

COLOURS = ("red", "green", "blue", "yellow", "white")
NEW_COLOUR = "purple"
"""Not in the base world: what the LoRA teaches."""

SIZE = (48, 48)
NUM_FRAMES = 9
FPS = 16
_BACKGROUNDS = ("dark", "grey")
_HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    colour: str
    shape: str
    motion: str

    @property
    def caption(self) -> str:
        """The caption that training and evaluation use."""
        return f"a {self.colour} {self.shape} moves {self.motion}"


def combinations(colours: tuple[str, ...] = COLOURS) -> list[Scene]:
    """Return every scene of these colours, in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(colours, SHAPES, MOTIONS)]


def held_out() -> list[Scene]:
    """Return the combinations that no training clip shows; each colour, shape and motion stays trained."""
    scenes = combinations()
    order = np.random.default_rng(2026).permutation(len(scenes))
    return [scenes[i] for i in sorted(order[: len(scenes) // _HELD_OUT_EVERY])]


def trained() -> list[Scene]:
    """Return the combinations that training clips show."""
    hidden = set(held_out())
    return [scene for scene in combinations() if scene not in hidden]


def render(scene: Scene, rng: np.random.Generator, *, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Draw one clip of ``scene`` with a random size, start and background; frames [F, H, W, 3] uint8."""
    height, width = SIZE
    radius = min(SIZE) * rng.uniform(0.16, 0.22)
    background = str(rng.choice(_BACKGROUNDS))
    middle, travel = rng.uniform(0.4, 0.6, 2) * (width, height), 0.45 * np.array([width, height])
    progress = np.arange(num_frames) / (NUM_FRAMES - 1) - 0.5
    centres = middle + progress[:, None] * travel * np.array(MOTIONS[scene.motion])
    colours = (scene.colour, background)
    return np.stack([draw_frame(SIZE, scene.shape, centre, radius, colours) for centre in centres])


def write_dataset(folder: Path, scenes: list[Scene], *, clips_per_scene: int, seed: int) -> Path:
    """Write clips with MindSpeed-MM annotations; return the path of ``data.json``."""
    root = folder.resolve()
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number, scene in enumerate(scenes * clips_per_scene):
        path = root / "videos" / f"{number:04d}_{scene.colour}_{scene.shape}_{scene.motion}.mp4"
        write_mp4(path, render(scene, rng), fps=FPS)
        rows.append({"path": f"videos/{path.name}", "cap": scene.caption, "num_frames": NUM_FRAMES, "fps": FPS,
                     "resolution": {"height": SIZE[0], "width": SIZE[1]}})
    annotation = root / "data.jsonl"
    annotation.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data_txt = root / "data.txt"
    data_txt.write_text(f"{root},{annotation}\n", encoding="utf-8")
    settings = mm_data_settings(data_txt, root, size=SIZE, num_frames=NUM_FRAMES, fps=FPS)
    (root / "data.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return root / "data.json"
