"""The schedule against Megatron's own class, at every iteration of every style."""

from __future__ import annotations

import itertools
from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.version import Version

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.training.lr_schedule import Schedule

GBS = 4
STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


def megatron_scheduler(schedule: Schedule) -> tuple[SimpleNamespace, object]:
    module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "default_config": True}])
    return optimizer, module.OptimizerParamScheduler(
        optimizer, schedule.init_lr, schedule.max_lr, schedule.min_lr, schedule.warmup_samples,
        schedule.decay_samples, schedule.decay_style, schedule.start_weight_decay, schedule.end_weight_decay,
        schedule.weight_decay_samples or schedule.decay_samples, schedule.weight_decay_style,
        wsd_decay_steps=schedule.wsd_samples, lr_wsd_decay_style=schedule.wsd_style,
    )


@pytest.mark.parametrize("style,warmup,increase", itertools.product(STYLES, [0, 3], ["linear", "cosine"]))
def test_matches_megatron(style: str, warmup: int, increase: str) -> None:
    anneals = ["linear", "cosine", "exponential", "minus_sqrt"] if style == "WSD" else ["linear"]
    if Version(metadata.version("megatron-core")) < Version("0.13") and style == "WSD":
        anneals.remove("minus_sqrt")  # accepted by that version's constructor, unknown to its step
    for anneal in anneals:
        schedule = Schedule(max_lr=1e-4, min_lr=1e-6, init_lr=1e-7, warmup_samples=warmup * GBS,
                            decay_samples=20 * GBS, decay_style=style, wsd_samples=6 * GBS, wsd_style=anneal,
                            start_weight_decay=0.01, end_weight_decay=0.1, weight_decay_style=increase)
        optimizer, theirs = megatron_scheduler(schedule)
        for iteration in range(25):
            group = optimizer.param_groups[0]
            assert schedule.learning_rate(iteration * GBS) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18)
            assert schedule.weight_decay(iteration * GBS) == pytest.approx(group["weight_decay"], rel=1e-12)
            theirs.step(GBS)


def test_first_iteration_of_a_warm_up_has_the_initial_rate() -> None:
    schedule = Schedule(max_lr=1.0, init_lr=0.25, warmup_samples=8, decay_samples=100)
    assert schedule.learning_rate(0) == 0.25
    assert schedule.learning_rate(4) == pytest.approx(0.625)
    assert schedule.learning_rate(8) == 1.0


@pytest.mark.parametrize("wrong", [
    {"min_lr": 2.0}, {"init_lr": 2.0}, {"decay_samples": 0}, {"warmup_samples": 100},
    {"decay_style": "WSD"}, {"start_weight_decay": 0.0},
])
def test_impossible_schedules_are_config_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Schedule(**{"max_lr": 1.0, "decay_samples": 100, **wrong})
