"""Runs over pipeline stages train the model of one rank, and their checkpoints are read by any layout."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, make_world, metrics, train_rank, with_cached_features, write_json

ITERATIONS = 6
BLOCKS = 4
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP2 = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "pp2": (2, PP2),
    "pp2_vpp2_recompute": (2, [*VPP2, *RECOMPUTE]),
    "pp2_dp2": (4, PP2),
    "pp2_tp2_sp": (4, [*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2_cp2": (4, [*PP2, "--context-parallel-size", "2"]),
}
EVALUATE = ["--eval-interval", "3", "--eval-iters", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job whose model has two blocks and weights."""
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def world(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same job with a model of four blocks."""
    files = tmp_path_factory.mktemp("world")
    values = json.loads((tiny.files / "model_high.json").read_text(encoding="utf-8"))
    values["predictor"].update(num_layers=BLOCKS)
    write_json(files / "model_high.json", values)
    write_json(files / "data.json", json.loads((tiny.files / "data.json").read_text(encoding="utf-8")))
    return World(tiny.model, tiny.data, files)


def flags(world: World, save: Path, *more: str) -> list[str]:
    """Return the command line of a run from random weights."""
    line = world.flags(save, *EVALUATE, *more, iters=ITERATIONS)
    place = line.index("--load")
    return [*line[:place], "--from-scratch", *line[place + 2:]]


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    save = tmp_path_factory.mktemp("one")
    run_ranks(train_rank, 1, flags(world, save), init=False)
    return metrics(save)


def assert_same(rows: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float = 1e-4) -> None:
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted):
        assert row.keys() == other.keys()
        for key in ("loss", "grad_norm", "sigma", "validation_loss"):
            if key in other:
                assert row[key] == pytest.approx(other[key], rel=tolerance), (row["iteration"], key)


@pytest.mark.parametrize("layout", [
    pytest.param(layout, marks=() if layout == "pp2_vpp2_recompute" else pytest.mark.slow) for layout in LAYOUTS])
def test_stages_train_the_same_model(layout: str, world: World, reference: list[dict[str, Any]],
                                     tmp_path: Path) -> None:
    ranks, more = LAYOUTS[layout]
    run_ranks(train_rank, ranks, flags(world, tmp_path, *more))
    rows = metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=1e-5)
    assert_same(rows, reference)


def test_a_run_moves_from_stages_to_one_rank_and_back(world: World, reference: list[dict[str, Any]],
                                                      tmp_path: Path) -> None:
    for until, ranks, more in ((2, 2, PP2), (4, 1, []), (6, 2, VPP2)):
        line = flags(world, tmp_path, *more, "--train-iters", str(until))
        run_ranks(train_rank, ranks, line, init=ranks > 1)
    assert_same(metrics(tmp_path), reference)


def test_stages_in_bf16_follow_the_run_of_one_rank(world: World, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(train_rank, 1, flags(world, one, "--bf16"), init=False)
    run_ranks(train_rank, 2, flags(world, two, "--bf16", *PP2))
    assert_same(metrics(two), metrics(one), tolerance=1e-2)


@pytest.mark.parametrize("base", [[], ["--base-dtype", "int8"], pytest.param(
    ["--base-dtype", "fp8", "--bf16"], marks=pytest.mark.slow)], ids=" ".join)
def test_adapters_of_every_stage_are_trained_and_written(base: list[str], tiny: World, tmp_path: Path) -> None:
    lora = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "proj_q,proj_v,ffn.0", *base]
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(train_rank, 1, tiny.flags(one, *lora), init=False)
    run_ranks(train_rank, 2, tiny.flags(two, *lora, *PP2))
    assert_same(metrics(two), metrics(one))
    wanted, found = (load_file(save / "iter_0000003" / "adapter.safetensors") for save in (one, two))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=partial("{}: {}".format, name))
