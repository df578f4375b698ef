"""``finetune_lora_*.sh``: LoRA's defaults, variables and flags reach the ranks; both experts are two command lines."""

from __future__ import annotations

import pytest

from mindspeed_wan.training.both import split
from tests.launches.test_launch_shell import EXAMPLES, arguments, place

__all__ = ["place"]  # a fixture


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_defaults_and_variables(task: str, expert: str, place) -> None:
    script = EXAMPLES / "A14B" / task / f"finetune_lora_{expert}.sh"
    assert len(script.read_text("utf-8").splitlines()) <= 15
    values, _ = arguments(place, script=script)
    assert (values["--lora-r"], values["--lora-alpha"], values["--lr"]) == ("32", "32", "1e-4")
    assert values["--lora-target-modules"] == "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2"
    assert values["--mm-model"].endswith(f"A14B/{task}/pretrain_model_{expert}.json")
    changed, _ = arguments(place, "--lora-dropout", "0.1", script=script, LORA_R="8", LR="2e-5")
    assert (changed["--lora-r"], changed["--lr"], changed["--lora-dropout"]) == ("8", "2e-5", "0.1")


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_both_experts(task: str, place) -> None:
    for name in ("transformer", "transformer_2"):
        (place / "weights here" / name).mkdir()
    values, _ = arguments(place, script=EXAMPLES / "A14B" / task / "finetune_lora_both.sh")
    words = [part for item in values.items() for part in item if isinstance(part, str)]
    high, low = (dict(zip(line[::2], line[1::2])) for line in split([w for w in words if w != "--bf16"]))
    assert high["--expert"] == "high" and low["--expert"] == "low"
    assert low["--mm-model"].endswith(f"A14B/{task}/pretrain_model_low.json")
    assert low["--load"].endswith("weights here/transformer_2") and high["--save"].endswith("saved here/high")
