"""Module names as the two dialects of fsdp2_config.yaml write them."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel.patterns import matching, select_modules
from tests.helpers.oracle import TINY


@pytest.fixture(scope="module")
def model() -> WanDiT:
    with torch.device("meta"):
        return WanDiT(TINY.with_changes(num_layers=6))


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("predictor.blocks.{*}", [0, 1, 2, 3, 4, 5]),
        ("blocks.{*}", [0, 1, 2, 3, 4, 5]),
        ("predictor.blocks.{0-2,5}", [0, 1, 2, 5]),
        ("predictor.blocks.{ 1 , 3-4 }", [1, 3, 4]),
        ("predictor.blocks.{4-99}", [4, 5]),
        ("predictor.blocks.3", [3]),
        ("mindspeed_mm.models.predictor.dits.wan_dit.WanDiTBlock", [0, 1, 2, 3, 4, 5]),
        ("mindspeed_wan.models.wan.block.WanBlock", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_blocks_by_pattern(model: WanDiT, pattern: str, blocks: list[int]) -> None:
    assert select_modules(model, [pattern], where="here") == [model.blocks[i] for i in blocks]


def test_other_modules_and_the_model_itself(model: WanDiT) -> None:
    assert select_modules(model, ["predictor.head"], where="here") == [model.head]
    assert select_modules(model, ["predictor"], where="here") == [model]
    assert matching(model, "predictor.blocks.{1}.self_attn", where="here") == [model.blocks[1].self_attn]
    assert matching(model, "text_encoder", where="here") == []


def test_overlapping_patterns_name_a_module_once(model: WanDiT) -> None:
    chosen = select_modules(model, ["predictor.blocks.{1-2}", "predictor.head", "predictor.blocks.{2-3}"], where="here")
    assert chosen == [model.blocks[1], model.blocks[2], model.blocks[3], model.head]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("predictor.block.{*}", r"here: 'predictor.block.\{\*\}' matches no module(.|\n)*predictor.blocks.\{\*\}"),
        ("predictor.blocks.{7}", "matches no module"),
        ("predictor.blocks.{2-1}", "malformed"),
        ("predictor.blocks.{a}", "malformed"),
        ("predictor.blocks.{*", "malformed"),
        ("predictor.{*}.{*}", "malformed"),
        ("package.NoSuchBlock", "matches no module(.|\n)*WanBlock"),
    ],
)
def test_wrong_patterns_are_refused(model: WanDiT, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_modules(model, [pattern], where="here")
