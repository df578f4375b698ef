"""Every layout trains the same model: same loss and gradient norm at step 1, same losses over ten steps.

The reference encodes its clips online on one rank; most layouts read the same features from a cache, which saves each
rank the imports of the encoders.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, make_world, metrics, train_rank, with_cached_features

ITERATIONS = 10
FSDP2 = ["--use-torch-fsdp2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "tp2_sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "tp2_cp2": (4, ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"]),
    "fsdp2_of_2": (2, FSDP2),
    "fsdp2_of_4": (4, FSDP2),
    "tp2_fsdp2": (4, [*FSDP2, "--tensor-model-parallel-size", "2"]),
    "cp2_fsdp2": (4, [*FSDP2, "--context-parallel-size", "2"]),
    "dp2": (2, []),
    "mbs2": (1, ["--micro-batch-size", "2"]),
    "mbs4": (1, ["--micro-batch-size", "4"]),
    "mbs2_fsdp2": (2, [*FSDP2, "--micro-batch-size", "2"]),
    "recompute": (1, ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]),
}
ONLINE = ("fsdp2_of_2", "tp2_sp")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cached(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return with_cached_features(world, tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One rank, micro-batches of one, four of them accumulated."""
    save = tmp_path_factory.mktemp("one")
    run_ranks(train_rank, 1, world.flags(save, iters=ITERATIONS), init=False)
    rows = metrics(save)
    assert len({row["loss"] for row in rows}) == ITERATIONS
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_the_same_model(layout: str, world: World, cached: World, reference: list[dict[str, float]],
                                      tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    job = world if layout in ONLINE else cached
    run_ranks(train_rank, ranks, job.flags(tmp_path, *flags, iters=ITERATIONS), init=ranks > 1)
    rows = metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=1e-4)
    assert [row["sigma"] for row in rows] == pytest.approx([row["sigma"] for row in reference], rel=1e-6)
    assert rows[-1]["consumed_samples"] == 4 * ITERATIONS


def test_cached_features_train_the_same_bits(cached: World, reference: list[dict[str, float]], tmp_path: Path) -> None:
    run_ranks(train_rank, 1, cached.flags(tmp_path, iters=ITERATIONS), init=False)
    for name in ("loss", "grad_norm", "sigma"):
        assert [row[name] for row in metrics(tmp_path)] == [row[name] for row in reference]
