"""The world's parts that need no training: the shipped VAE, stages that are done once, marks on true clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindspeed_wan.demo.clips import write_mp4
from mindspeed_wan.demo.world import judging, pages, scenes, training
from mindspeed_wan.demo.world.job import SHORT, Effort, World
from mindspeed_wan.demo.world.vae import ASSET, reconstruction_psnr
from mindspeed_wan.errors import ConfigError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path / "world", effort=SHORT)


def test_the_shipped_vae_is_small_and_good() -> None:
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 3_000_000
    assert reconstruction_psnr(ASSET, num_clips=4) >= 30.0


def test_a_stage_runs_once_and_a_failed_one_again(world: World) -> None:
    calls: list[str] = []

    def fails_once(_: World) -> dict[str, int]:
        calls.append("second")
        if calls.count("second") == 1:
            raise RuntimeError("interrupted")
        return {"found": 7}

    stages = [("first", "one", lambda _: calls.append("first")), ("second", "two", fails_once)]
    with pytest.raises(RuntimeError):
        world.walk(stages)
    world.walk(stages)
    assert calls == ["first", "second", "second"] and world.result("second")["found"] == 7


def test_a_short_world_is_not_taken_for_a_full_one(world: World) -> None:
    assert World.at(world.out, effort=SHORT) == world
    with pytest.raises(ConfigError, match="iterations_t2v 6, not 8000"):
        World.at(world.out, effort=Effort())


def _true_videos(world: World, name: str, chosen: list[scenes.Scene]) -> None:
    rng = np.random.default_rng(5)
    world.videos(name).mkdir(parents=True)
    for index, scene in enumerate(chosen):
        write_mp4(world.videos(name) / f"video_{index}.mp4", scenes.render(scene, rng))


def test_marks_follow_what_the_videos_show(world: World) -> None:
    held_out = scenes.held_out()
    _true_videos(world, "truth", held_out)
    assert judging.judge(world, "truth", held_out)["right"] == 1.0
    turned = [scenes.Scene(s.colour, s.shape, {"left": "right", "right": "left", "up": "down", "down": "up"}[s.motion])
              for s in held_out]
    marks = judging.judge(world, "truth", turned)
    assert (marks["right"], marks["colour"], marks["shape"], marks["motion"]) == (0.0, 1.0, 1.0, 0.0)
    assert len(marks["wrong"]) == len(held_out)


def test_the_sheet_shows_every_caption(world: World, tmp_path: Path) -> None:
    from PIL import Image

    held_out = scenes.held_out()
    _true_videos(world, "truth", held_out)
    picture = Image.open(pages.write_sheet(world, "truth", held_out, tmp_path / "frames.png"))
    assert picture.height == len(held_out) * (2 * scenes.SIZE[0] + 16) and picture.width >= 6 * scenes.SIZE[1]


def test_i2v_starts_as_the_t2v_model(world: World) -> None:
    """With further input channels at zero weight, the I2V expert predicts what the T2V expert does."""
    import torch
    from diffusers import WanTransformer3DModel

    from mindspeed_wan.demo.model_folder import write_model_folder
    from mindspeed_wan.demo.world.files import SIZES

    small = {**SIZES, "num_layers": 1}
    for name, task in (("t2v_trained", "t2v"), ("i2v", "i2v")):
        write_model_folder(world.model(name), task=task, **small)
    training.start_i2v(world)
    t2v, i2v = (WanTransformer3DModel.from_pretrained(world.model(name) / "transformer_2").eval()
                for name in ("t2v_trained", "i2v"))
    x, condition, text = torch.randn(1, 16, 3, 6, 6), torch.randn(1, 20, 3, 6, 6), torch.randn(1, 5, 64)
    t = torch.tensor([500.0])
    with torch.no_grad():
        ours = i2v(torch.cat([x, condition], dim=1), t, text, return_dict=False)[0]
        assert torch.allclose(ours, t2v(x, t, text, return_dict=False)[0], atol=1e-5)


@pytest.mark.slow
def test_every_stage_fits_together(tmp_path: Path) -> None:
    """A few steps of everything through the real launchers; nothing is learned, so nothing is right."""
    from mindspeed_wan.demo.world.build import STAGES, build

    world = World.at(tmp_path / "world", effort=SHORT)
    summary = build(world)
    assert "The world is complete." in summary
    assert all((world.out / "stages" / f"{name}.json").is_file() for name, _, _ in STAGES)
    assert (world.out / "world.html").stat().st_size > 100_000 and (world.out / "frames.png").is_file()
    assert world.result("accelerators")["variants"]["exact"]["speed_up"] == 1.0
