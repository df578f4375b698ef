"""Typos in keys and flags: every one is refused, and nearly every message names the right word."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_wan.config.flag_table_inert import ALL_FLAGS
from mindspeed_wan.config.flags import parse, read_words
from mindspeed_wan.config.fsdp2_file import Fsdp2File
from mindspeed_wan.config.mm_files import DataFile, ModelFile
from mindspeed_wan.config.validate import dotted, key_paths
from mindspeed_wan.errors import ConfigError
from tests.unit.config.world import World

COUNT = 200
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def misspell(word: str, rng: random.Random) -> str:
    """Return ``word`` with one slip of the fingers: a letter dropped, doubled, swapped or replaced."""
    at = rng.randrange(1, len(word) - 1)
    slips = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :],
        word[:at] + rng.choice(LETTERS) + word[at + 1 :],
    )
    return next((slip for slip in rng.sample(slips, 4) if slip != word), word + "s")


def typo_in_file(world: World, rng: random.Random) -> tuple[tuple[str | int, ...], str]:
    """Misspell one key of one of a run's three files; returns its path and the wrong name."""
    fsdp2 = yaml.safe_load(world.fsdp2)
    file, kind = rng.choice([(world.model, ModelFile), (world.data, DataFile), (fsdp2, Fsdp2File)])
    known = {dotted(path) for path in key_paths(kind)}
    path = rng.choice([p for p in _paths(file) if _names(p) in known and len(p[-1]) > 3])
    block = file
    for key in path[:-1]:
        block = block[key]
    wrong = misspell(path[-1], rng)
    block[wrong] = block.pop(path[-1])
    world.fsdp2 = yaml.safe_dump(fsdp2)
    return path, wrong


def is_named(path: tuple[str | int, ...], message: str) -> bool:
    """Tell whether a message shows the right name of the key at ``path``."""
    return f"'{path[-1]}'" in message or f"'{dotted(path)}'" in message or f"'{_names(path)}'" in message


def _names(path: tuple[str | int, ...]) -> str:
    """Return a dotted path without the places in lists."""
    return dotted(tuple(key for key in path if isinstance(key, str)))


def _paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every key spelled out in a file, free-form blocks aside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[Any, ...]] = []
    for key, item in items:
        found += [(*prefix, key)] if isinstance(value, dict) else []
        if key != "patch":
            found += _paths(item, (*prefix, key))
    return found


def test_two_hundred_typos_in_files(tmp_path: Path):
    rng = random.Random(7)
    named = 0
    for number in range(COUNT):
        world = World(tmp_path / str(number))
        path, wrong = typo_in_file(world, rng)
        try:
            parse(world.argv(), {"WORLD_SIZE": "8"})
        except ConfigError as error:
            assert wrong in str(error)
            named += is_named(path, str(error))
        else:
            raise AssertionError(f"{dotted(path)} spelled {wrong} was accepted")
    assert named >= 0.95 * COUNT


def test_two_hundred_typos_in_flags():
    rng = random.Random(11)
    named = 0
    names = [name for name in ALL_FLAGS if len(name) > 5]
    for _ in range(COUNT):
        name = rng.choice(names)
        wrong = "--" + misspell(name[2:], rng)
        if wrong in ALL_FLAGS:
            named += 1  # --local_rank for --local-rank: another flag, with the same meaning
            continue
        errors = read_words([wrong, "1"]).errors
        assert errors and wrong in str(errors[0])
        named += f"'{name}'" in str(errors[0])
    assert named >= 0.95 * COUNT


def test_typos_in_fsdp2(tmp_path: Path):
    rng = random.Random(3)
    for number, name in enumerate(Fsdp2File.model_fields):
        world = World(tmp_path / str(number))
        wrong = misspell(name, rng)
        world.fsdp2 = f"{wrong}: 1\n"
        try:
            parse(world.argv(), {"WORLD_SIZE": "8"})
        except ConfigError as error:
            assert f"'{wrong}'" in str(error) and name in str(error)
        else:
            raise AssertionError(f"{wrong} was accepted")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*ALL_FLAGS, "--", "-1", "x", "", "1e-5", "--lr=", "=", "\u2014lr"]), max_size=8))
def test_any_words_give_errors_not_crashes(words: list[str]):
    line = read_words(words)
    for error in line.errors:
        assert error.where == "command line"
    for target in line.values:
        assert target.split(".")[0] != ""
