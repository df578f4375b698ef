"""The world's split, and the detector on ground truth: it must be right where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindspeed_wan.demo.clips import MOTIONS, SHAPES
from mindspeed_wan.demo.world import scenes
from mindspeed_wan.demo.world.detector import Sighting, detect


def test_held_out_combinations_hide_no_single_property() -> None:
    hidden, shown = scenes.held_out(), scenes.trained()
    assert len(hidden) >= 7 and not set(hidden) & set(shown)
    assert len(hidden) + len(shown) == len(scenes.COLOURS) * len(SHAPES) * len(MOTIONS)
    for field in ("colour", "shape", "motion"):
        assert {getattr(s, field) for s in hidden} <= {getattr(s, field) for s in shown}


def test_detector_is_right_on_ground_truth() -> None:
    rng = np.random.default_rng(1)
    everything = scenes.combinations((*scenes.COLOURS, scenes.NEW_COLOUR)) * 4
    right = sum(detect(scenes.render(scene, rng)).matches(scene) for scene in everything)
    assert right / len(everything) >= 0.99


def test_detector_survives_noise_and_compression(tmp_path: Path) -> None:
    from mindspeed_wan.demo.clips import write_mp4
    from mindspeed_wan.evaluation.frames import read_frames

    rng = np.random.default_rng(2)
    everything = scenes.combinations()
    right = 0
    for scene in everything:
        frames = scenes.render(scene, rng).astype(np.float32) + rng.normal(0, 12, (scenes.NUM_FRAMES, *scenes.SIZE, 3))
        write_mp4(tmp_path / "clip.mp4", np.clip(frames, 0, 255).astype(np.uint8), quality=23)
        right += detect(read_frames(tmp_path / "clip.mp4")[0]).matches(scene)
    assert right / len(everything) >= 0.97


@pytest.mark.parametrize("level", [20, 110, 128])
def test_detector_sees_nothing_in_an_empty_picture(level: int) -> None:
    assert detect(np.full((scenes.NUM_FRAMES, *scenes.SIZE, 3), level, np.uint8)) == Sighting(None, None, None)


def test_detector_refuses_what_the_caption_does_not_say() -> None:
    rng = np.random.default_rng(3)
    frames = scenes.render(scenes.Scene("red", "circle", "left"), rng)
    assert detect(frames[::-1]).matches(scenes.Scene("red", "circle", "right"))
    assert not detect(frames).matches(scenes.Scene("red", "square", "left"))
    assert detect(frames[:1].repeat(scenes.NUM_FRAMES, axis=0)).motion is None


def test_dataset_has_the_asked_for_clips(tmp_path: Path) -> None:
    some = scenes.trained()[:3]
    data_json = scenes.write_dataset(tmp_path / "data", some, clips_per_scene=2, seed=0)
    rows = (data_json.parent / "data.jsonl").read_text().splitlines()
    assert len(rows) == 6 and len(list((data_json.parent / "videos").glob("*.mp4"))) == 6
