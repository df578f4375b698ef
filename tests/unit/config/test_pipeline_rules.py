"""What pipeline stages need and do not go with, said before any model is built."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_wan.config import rules_run
from mindspeed_wan.config.describe import describe
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.config.translate import _stages


def config(parallel: dict[str, Any], *, num_layers: int = 8, rows: Any = (), **sections: Any) -> RunConfig:
    """Return a configuration with a small model."""
    wan = {"num_layers": num_layers, "dim": 48, "ffn_dim": 96, "num_heads": 4}
    return RunConfig(parallel=parallel, model={"wan": wan, "pipeline_num_layers": rows}, **sections)


def problems(checked: RunConfig, ranks: int | None = None) -> list[str]:
    """Return what the pipeline's rules say."""
    rules = (rules_run.pipeline_combines, rules_run.pipeline_splits_blocks, rules_run.interleaving_divides)
    return [mistake.message for rule in rules for mistake in rule(checked, ranks)]


PP2 = {"pipeline": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}


@pytest.mark.parametrize(("checked", "ranks", "message"), [
    (config({"virtual_pipeline": 2}), 2, "without pipeline stages"),
    (config({**PP2, "use_torch_fsdp2": True}), 2, "with --use-torch-fsdp2"),
    (config(PP2, lora={"r": 4, "dropout": 0.1, "target_modules": ["proj_q"]}), 2, "--lora-dropout with pipeline"),
    (config({"pipeline": 16}), 16, "8 blocks cannot be split into 16 pipeline stages x 1 chunks"),
    (config({"pipeline": 4, "virtual_pipeline": 3}, training={"global_batch_size": 4}), 4,
     "8 blocks cannot be split into 4 pipeline stages x 3 chunks"),
    (config(PP2, rows=((4, 2, 2),)), 2, "[4, 2, 2] is not 1 x 2 numbers"),
    (config(VPP, rows=((4, 4),), training={"global_batch_size": 2}), 2, "[4, 4] is not 2 x 2 numbers"),
    (config(PP2, rows=((8, 0),)), 2, "[8, 0] has a stage without blocks"),
    (config(PP2, rows=((4, 5),)), 2, "[4, 5] adds up to 9 blocks, the model has 8"),
    (config(VPP, training={"global_batch_size": 6}), 4, "3 micro-batches per step are not a multiple of 2"),
])
def test_what_is_refused(checked: RunConfig, ranks: int, message: str) -> None:
    (found,) = problems(checked, ranks)
    assert message in found


@pytest.mark.parametrize("checked", [
    config({}, rows=((1, 2, 3),)),  # not read without stages
    config(PP2),
    config(PP2, rows=((3, 5),)),
    config({"pipeline": 3}),
    config(VPP, rows=((1, 2), (3, 2)), training={"global_batch_size": 4}),
    config(PP2, training={"global_batch_size": 3}),
    config({**PP2, "tensor": 2, "context": 2}),
])
def test_what_is_fine(checked: RunConfig) -> None:
    assert problems(checked, checked.parallel.model_parallel) == []


@pytest.mark.parametrize(("given", "rows"), [
    (None, ()), ([20, 20], ((20, 20),)), ([[10, 10], [10, 10]], ((10, 10), (10, 10))),
])
def test_mindspeed_mm_writes_stages_or_rows_of_stages(given: Any, rows: Any) -> None:
    assert _stages(given) == rows


def test_the_description_says_how_long_stages_wait() -> None:
    described = describe(config(VPP, training={"global_batch_size": 8}), 4)
    assert "pipeline 2 x 2 chunks (idle 11%)" in described  # (2 - 1) / (4 micro-batches x 2 chunks + 2 - 1)
