"""Who encodes and who reads which sample of which batch, and what two experts in one job must agree on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_wan.config import flags
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.training.both import read, sizes, split
from mindspeed_wan.training.joint_order import Events, Reader, encoder_of, ever_encodes, share, shared_keys
from tests.helpers.joint import both_flags
from tests.helpers.world import World, edit_json, make_world

LAYOUTS = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
"""tensor x context, data, stages."""


def events(batch: int, interval: int = 0, rounds: int = 0, **options: object) -> Events:
    training = GlobalBatchSampler(10, 3, shapes=[n % 3 == 0 for n in range(10)], multiples={True: 3})
    return Events(training, GlobalBatchSampler(10, 3, shuffle=False), batch, interval=interval, rounds=rounds,
                  **options)  # type: ignore[arg-type]


@given(high=LAYOUTS, low=LAYOUTS, times=st.integers(1, 6))
def test_every_sample_has_one_encoder_and_the_readers_of_one_data_rank(
        high: tuple[int, int, int], low: tuple[int, int, int], times: int) -> None:
    count = [model * data * stages for model, data, stages in (high, low)]
    world, length = sum(count), 12 * times
    shares = [share(length, rank, world) for rank in range(world)]
    assert sorted(p for positions in shares for p in positions) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for (model, data, stages), ranks in zip((high, low), (range(count[0]), range(count[0], world))):
        reader = Reader(ranks, model, data, 0, 1)
        for position in range(length):
            readers = reader.readers(position, length)
            assert len(readers) == model * stages and set(readers) <= set(ranks)
            assert {reader.data_rank(rank) for rank in readers} == {position // (length // data)}


@pytest.mark.parametrize(("world", "batch", "encoders"), [
    (4, 1, [0, 1, 2]), (8, 2, [0, 1, 2, 4, 5, 6]), (4, 4, [0, 1, 2, 3]),
])
def test_only_ranks_that_encode_hold_encoders(world: int, batch: int, encoders: list[int]) -> None:
    plain = Events(GlobalBatchSampler(10), GlobalBatchSampler(10), batch)
    wanted = [rank for rank in range(world) if any(encoder_of(p, batch, world) == rank for p in range(batch))]
    assert [rank for rank in range(world) if ever_encodes(plain, rank, world)] == wanted
    # batches of small clips are three times as large, and then more ranks encode
    assert [rank for rank in range(world) if ever_encodes(events(batch), rank, world)] == encoders


def test_events_are_training_batches_with_evaluations_between() -> None:
    order = events(4, interval=3, rounds=2)
    assert [order.before(iteration) for iteration in (0, 1, 2, 3, 4, 6, 7)] == [0, 1, 2, 5, 6, 10, 11]
    training, step = [], 0
    for event in range(12):
        if order.evaluates(event):
            continue
        assert order.before(step) <= event
        training.append(order.keys(event))
        step += 1
    assert training == [order.training.indices(4 * n, 4) for n in range(step)]
    assert [order.keys(event) for event in (3, 4)] == [order.keys(event) for event in (8, 9)]
    assert order.keys(3) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert events(4).before(7) == 7 and not events(4).evaluates(3)
    assert events(4, offset=8).keys(0) == order.training.indices(8, 4)


def test_shares_are_the_events_in_order() -> None:
    order, span = events(4, interval=2, rounds=1), range(1, 9)
    for evaluation in (False, True):
        wanted = [order.keys(event) for event in span if order.evaluates(event) == evaluation]
        dealt = [list(shared_keys(order, span, rank, 4, evaluation=evaluation)) for rank in range(4)]
        assert [[*itertools.chain(*parts)] for parts in zip(*dealt)] == wanted


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_frames=5, size=(32, 48))


def read_line(world: World, tmp_path: Path, *more: str, ranks: int = 4) -> str:
    """Return what is wrong with a line."""
    with pytest.raises(ConfigError) as error:
        read(world.flags(tmp_path, *both_flags(world), *more), {"WORLD_SIZE": str(ranks)})
    return str(error.value)


def test_ranks_are_divided(world: World, tmp_path: Path) -> None:
    argv = world.flags(tmp_path, *both_flags(world), "--expert-ranks=1,3", "--low:global-batch-size", "3",
                       "--high:global-batch-size=3")
    (high, low), ranks = read(argv, {"WORLD_SIZE": "4"})
    assert ranks == (1, 3) and (high.world_size, low.world_size) == (1, 3)
    assert (high.diffusion.expert, low.diffusion.expert) == ("high", "low")
    assert (high.checkpoint.save, low.checkpoint.save) == (str(tmp_path / "high"), str(tmp_path / "low"))
    line = [*both_flags(world), "--expert-ranks", "even"]
    assert sizes(line, {"WORLD_SIZE": "6"}) == (3, 3)
    assert sizes([*line, "--world-size", "8"], {}) == (4, 4)
    assert sizes(both_flags(world), {"WORLD_SIZE": "4"}) is None
    configs, none = read(world.flags(tmp_path, *both_flags(world)), {"WORLD_SIZE": "4"})
    assert none is None and [config.world_size for config in configs] == [4, 4]


@pytest.mark.parametrize(("asked", "ranks", "message"), [
    ("even", 3, "cannot halve 3 ranks"), ("even", 1, "cannot halve 1 rank\n"),
    ("2,1", 4, "is for 3 ranks, the job has 4"),
    ("2", 4, "neither 'even' nor two numbers"), ("4,0", 4, "neither 'even' nor two numbers"),
    ("a,b", 4, "neither 'even' nor two numbers"),
])
def test_ranks_that_cannot_be_divided(world: World, tmp_path: Path, asked: str, ranks: int, message: str) -> None:
    assert message in read_line(world, tmp_path, "--expert-ranks", asked, ranks=ranks) + "\n"


def test_flags_of_one_expert_and_folders_of_each(world: World, tmp_path: Path) -> None:
    line = [*both_flags(world), "--expert-ranks", "even", "--save", "runs", "--tensorboard-dir", "events",
            "--high:sequence-parallel", "--low:lr", "2e-5", "--low:save=elsewhere", "--bf16"]
    high, low = split(line)
    assert "--expert-ranks" not in high + low and high[-2:] == ["--sequence-parallel", "--bf16"]
    assert low[-5:] == ["--lr", "2e-5", "--save", "elsewhere/low", "--bf16"]
    assert [words[words.index("--tensorboard-dir") + 1] for words in (high, low)] == ["events/high", "events/low"]


def test_what_experts_must_share_is_named(world: World, tmp_path: Path) -> None:
    even = ["--expert-ranks", "even"]
    told = read_line(world, tmp_path, *even, "--high:global-batch-size", "2", "--low:seed", "8")
    assert "global batch size (high: 2, low: 4)" in told and "--seed (high: 7, low: 8)" in told
    edit_json(world.files / "data.json", tmp_path / "data.json", dataloader_param={"shuffle": False})
    told = read_line(world, tmp_path, *even, "--low:mm-data", str(tmp_path / "data.json"))
    assert "data.shuffle (high: True, low: False)" in told and "features build" in told
    assert "--eval-interval (high: None, low: (5, 10))" in read_line(world, tmp_path, *even, "--low:eval-interval", "5")


def test_one_expert_has_no_ranks_to_divide(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one is trained"):
        flags.parse(world.flags(tmp_path, "--expert-ranks", "even"), {"WORLD_SIZE": "2"})
