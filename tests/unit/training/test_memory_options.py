"""From the configuration to what is recomputed and where optimizer state lives, on an accelerator and on a CPU."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.training import memory_options
from mindspeed_wan.training.byte_states import ByteStates
from mindspeed_wan.training.host_states import HostStates
from mindspeed_wan.training.optimizer import ResidentStates

CPU: Any = SimpleNamespace(device_type="cpu")
NPU: Any = SimpleNamespace(device_type="npu")
BLOCKS = ("predictor.blocks.{*}",)


@pytest.mark.parametrize(("sections", "plan"), [
    ({}, None),
    ({"training": {"recompute": {"granularity": "full", "offload": True}}}, RecomputePlan(offload=True)),
    ({"training": {"recompute": {"granularity": "full", "method": "block", "num_layers": 3, "every_k": 2}}},
     RecomputePlan(first=3, every_k=2)),
    ({"training": {"precision": "bf16", "recompute": {"offload": True}}, "fsdp2": {"recompute_modules": BLOCKS}},
     RecomputePlan(patterns=BLOCKS, offload=True)),
    ({"training": {"recompute": {"offload": True}}, "fsdp2": {"recompute_modules": BLOCKS}}, None),
], ids=["none", "flags", "first blocks", "FSDP2 file", "FSDP2 file that is not in use"])
def test_recompute_plan(sections: dict[str, Any], plan: RecomputePlan | None) -> None:
    assert memory_options.recompute_plan(RunConfig(**sections), NPU) == plan
    on_cpu = memory_options.recompute_plan(RunConfig(**sections), CPU)
    assert on_cpu is None if plan is None else on_cpu is not None and not on_cpu.offload


def test_optimizer_states() -> None:
    def states(platform: Any, **section: Any) -> Any:
        return memory_options.optimizer_states(RunConfig(optimizer=section, training={"seed": 7}), platform)

    assert states(NPU) is ResidentStates
    offloaded = states(NPU, cpu_offload=True, offload_fraction=0.5)
    assert isinstance(offloaded, partial) and offloaded.func is HostStates and offloaded.keywords == {"fraction": 0.5}
    assert states(CPU, cpu_offload=True) is ResidentStates
    for platform in (CPU, NPU):
        in_bytes = states(platform, name="adam8bit")
        assert in_bytes.func is ByteStates and in_bytes.keywords == {"seed": 7}


def test_a_cpu_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(training={"recompute": {"granularity": "full", "offload": True}})
    memory_options.say_what_is_left_out(config, NPU)
    assert capsys.readouterr().out == ""
    memory_options.say_what_is_left_out(config, CPU)
    memory_options.say_what_is_left_out(RunConfig(optimizer={"cpu_offload": True}), CPU)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["--recompute-offload", "--optimizer-cpu-offload"]
