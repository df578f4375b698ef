"""Layouts with pipeline stages, what PipeFusion does not go with, and who sits where."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions

LINE = ["--ckpt_dir", "model", "--prompt", "a fox"]
STAGES = ["--pipeline-model-parallel-size", "2"]


def test_stages_come_last_in_rank_order() -> None:
    layout = InferenceLayout(world_size=8, cfg=2, ulysses=2, pipeline=2)
    assert (layout.replicas, layout.replica_size, layout.replica_ranks(0)) == (1, 8, list(range(8)))
    assert [layout.cfg_ranks(rank) for rank in (0, 3, 5)] == [[0, 2], [1, 3], [5, 7]]
    assert [layout.place(rank) for rank in (1, 2, 5, 7)] == [(0, 0), (0, 1), (0, 0), (0, 1)]
    assert layout.describe() == "8 ranks = 1 video at a time x stages 2 x CFG 2 x Ulysses 2"


@pytest.mark.parametrize(("words", "world_size", "message"), [
    ([*STAGES, "--dit_fsdp"], 2, "--dit_fsdp with --pipeline_model_parallel_size"),
    (STAGES, 4, "pipeline stages make one"),
    (STAGES, 3, "x pipeline stages 2 = 2 does not divide it"),
    ([*STAGES, "--memory", "block"], 2, "--memory block with --pipeline_model_parallel_size"),
    (["--memory", "block", "--dit_fsdp", "--ulysses_size", "2"], 2, "--memory block with --dit_fsdp"),
    ([*STAGES, "--calibrate_cache", "table.json"], 2, "--calibrate_cache measures whole models"),
    (["--pipefusion"], 1, "give --pipeline_model_parallel_size 2 or more"),
    ([*STAGES, "--pipefusion", "--ulysses_size", "2"], 4, "--pipefusion cuts the tokens itself"),
    ([*STAGES, "--pipefusion", "--step_cache", "taylorseer"], 2, "--pipefusion with --step_cache"),
    ([*STAGES, "--pipefusion", "--compile"], 2, "--pipefusion with --compile"),
    ([*STAGES, "--pipefusion", "--pipefusion_patches", "0"], 2, "--pipefusion_patches is 0"),
    ([*STAGES, "--pipefusion", "--pipefusion_warmup", "0"], 2, "--pipefusion_warmup is 0"),
    ([*STAGES, "--pipefusion_patches", "4"], 2, "does nothing without --pipefusion"),
])
def test_what_is_refused(words: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([*LINE, *words], world_size=world_size)


@pytest.mark.parametrize(("words", "expected"), [
    ([], {"on": False}),
    (["--pipefusion"], {"on": True, "warmup": 2}),
    (["--pipefusion", "--pipefusion_patches", "6", "--pipefusion_warmup", "3"],
     {"on": True, "patches": 6, "warmup": 3}),
])
def test_flags(words: list[str], expected: dict[str, Any]) -> None:
    options = parse([*LINE, *STAGES, *words], world_size=2)
    assert options.layout.pipeline == 2
    assert options.pipefusion == PipeFusionOptions(**expected)
    assert options.pipefusion.count(options.layout) == expected.get("patches", 4)
