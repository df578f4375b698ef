"""I2V, Fun-InP and Wan2.1 training: one loss in every layout, resumed bit for bit, impossible requests refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_wan.errors import ConfigError
from tests.helpers.spawn import RankError, run_ranks
from tests.helpers.world import World, edit_json, losses, make_world, train_rank, write_json

FSDP2 = ["--use-torch-fsdp2"]
TP2, CP2 = ["--tensor-model-parallel-size", "2"], ["--context-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, TP2), "cp2": (2, CP2), "fsdp2_of_2": (2, FSDP2), "tp2_cp2": (4, [*TP2, *CP2]),
}
SMALL: dict[str, Any] = {"num_frames": 5, "size": (32, 48)}


def condition(world: World, **values: Any) -> None:
    """Set the conditioning of a world's model file."""
    path = world.files / "model_high.json"
    model = json.loads(path.read_text(encoding="utf-8"))
    model["ae"].setdefault("i2v_processor", {})["conditioning"] = values
    write_json(path, model)


def run(world: World, save: Path, *more: str, ranks: int = 1, iters: int = 3) -> list[float]:
    run_ranks(train_rank, ranks, world.flags(save, *more, iters=iters), init=ranks > 1)
    return losses(save)


@pytest.fixture(scope="module")
def first_last(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), task="i2v", **SMALL)
    condition(world, start_frames=[1, 2], last_frame=0.5)
    return world


@pytest.fixture(scope="module")
def reference(first_last: World, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(first_last, tmp_path_factory.mktemp("one"), iters=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_i2v_model(layout: str, first_last: World, reference: list[float], tmp_path: Path
                                                ) -> None:
    ranks, flags = LAYOUTS[layout]
    found = run(first_last, tmp_path, *flags, ranks=ranks)
    assert found[0] == pytest.approx(reference[0], rel=1e-5)
    assert found == pytest.approx(reference[:3], rel=1e-4)


def test_a_resumed_run_is_the_same_run(first_last: World, reference: list[float], tmp_path: Path) -> None:
    run(first_last, tmp_path, "--save-interval", "2", iters=2)
    assert run(first_last, tmp_path, "--save-interval", "2", iters=4) == reference


def test_conditioning_changes_what_is_trained(reference: list[float], tmp_path: Path) -> None:
    plain = run(make_world(tmp_path / "world", task="i2v", **SMALL), tmp_path / "plain", iters=1)
    assert plain[0] != reference[0]


def test_inpainting_masks_train_alike_in_two_layouts(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", task="i2v", **SMALL)
    condition(world, mode="masks")
    one = run(world, tmp_path / "one")
    assert run(world, tmp_path / "two", *TP2, ranks=2) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("task", ["wan2.1-t2v", "wan2.1-i2v"])
def test_wan21_trains_over_all_sigmas(task: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", task=task, **SMALL)
    one = run(world, tmp_path / "one")
    assert run(world, tmp_path / "two", *TP2, ranks=2) == pytest.approx(one, rel=1e-5)
    card = json.loads(next((tmp_path / "one").glob("iter_*/wan.json")).read_text())
    assert card["expert"] is None and card["boundary"] is None


def refused(world: World, save: Path, match: str, *more: str) -> None:
    with pytest.raises(RankError, match=match):
        run_ranks(train_rank, 1, world.flags(save, *more), init=False)
    assert not list(save.glob("iter_*"))


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    """Each in one error before anything is trained."""
    i2v = make_world(tmp_path / "i2v", task="i2v", **SMALL)
    t2v = make_world(tmp_path / "t2v", **SMALL)
    refused(World(t2v.model, i2v.data, i2v.files), tmp_path / "a", "T2V weights")
    condition(i2v, start_frames=[9])
    refused(i2v, tmp_path / "b", "9 start frames do not fit num_frames")
    condition(t2v, mode="masks")
    refused(t2v, tmp_path / "c", "task t2v has none")
    edit_json(i2v.files / "model_high.json", i2v.files / "model_high.json", load_video_features=True,
              load_text_features=True)
    refused(i2v, tmp_path / "d", "cached features hold the first frame")


def test_ti2v_5b_is_refused(tmp_path: Path) -> None:
    from mindspeed_wan.config import flags

    world = make_world(tmp_path / "world", **SMALL)
    model = json.loads((world.files / "model_high.json").read_text())
    model["predictor"]["seperated_timestep"] = True
    write_json(world.files / "model_high.json", model)
    with pytest.raises(ConfigError, match="TI2V-5B, which is out of scope"):
        flags.parse(world.flags(tmp_path / "run"))
