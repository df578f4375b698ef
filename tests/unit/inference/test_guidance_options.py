"""Guidance at some steps only: the plan, what it saves, and that it means the same in a real run as on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.diffusion.schedule import sigmas
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.inference.guidance_options import GuidanceOptions, GuidancePlan
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.inference.step_cache import CachePlan, StepCache
from tests.helpers.tiny import tiny_pipeline_folder

SCALES = {"high": 4.0, "low": 3.0}
T2V = sigmas(10, 12.0, "official", "unipc")  # 7 high, 3 low at boundary 0.875
ASK = {"size": (32, 48), "num_frames": 5, "steps": 10, "seed": 1, "decode": False, "prompt": "a red circle moves left"}


def _marks(options: GuidanceOptions, scales: dict[str, float] = SCALES, boundary: float | None = 0.875) -> str:
    return options.plan(T2V, boundary, scales).describe().split("(")[1].rstrip(")")


@pytest.mark.parametrize(("options", "marks"), [
    (GuidanceOptions(), "##########"),
    (GuidanceOptions(skip_ratio=0.2), "########.."),
    (GuidanceOptions(skip_ratio=0.25), "########.."),  # step >= 7.5: VideoX-Fun compares, it does not round
    (GuidanceOptions(steps=(2, 6)), "..####...."),
    (GuidanceOptions(sigmas=(T2V.sigmas[8], T2V.sigmas[3])), "...#####.."),  # LOW is outside, HIGH inside
    (GuidanceOptions(gate=4), "####===#=="),  # the low expert computes its own difference first
    (GuidanceOptions(gate=1, steps=(2, 9)), "..#====#=."),
    (GuidanceOptions(gate=4, skip_ratio=0.1), "####===#=."),
])
def test_plans(options: GuidanceOptions, marks: str) -> None:
    assert _marks(options) == marks


def test_an_expert_without_guidance_has_none() -> None:
    assert _marks(GuidanceOptions(), {"high": 4.0, "low": 1.0}) == "#######..."
    assert _marks(GuidanceOptions(gate=3), {"high": 1.0, "low": 3.0}) == ".......#=="
    assert _marks(GuidanceOptions(gate=4), boundary=None) == "####======"


@settings(max_examples=80, deadline=None)
@given(steps=st.integers(2, 60), shift=st.sampled_from([3.0, 5.0, 12.0]), boundary=st.sampled_from([None, 0.875, 0.9]),
       first=st.integers(0, 30), length=st.integers(1, 60), gate=st.none() | st.integers(1, 40),
       skip=st.floats(0, 0.9))
def test_no_difference_crosses_the_switch(steps, shift, boundary, first, length, gate, skip) -> None:
    schedule = sigmas(steps, shift, "official", "unipc")
    try:
        plan = GuidanceOptions(steps=(first, first + length), gate=gate, skip_ratio=skip).plan(
            schedule, boundary, SCALES)
    except ConfigError as error:  # limits outside the run, or around all of it
        assert "none of the" in str(error)
        return
    computed: str | None = None
    for step, mode in enumerate(plan.modes):
        expert = schedule.expert(step, boundary)
        assert mode != "reused" or computed == expert
        computed = expert if mode == "guided" else computed
        before = step > 0 and schedule.expert(step - 1, boundary) == expert and plan.modes[step - 1] == "plain"
        assert (step in plan.starts) == (mode == "guided" and before)
    assert 0 < plan.num_guided < steps


@pytest.mark.parametrize(("flags", "message"), [
    ("--cfg_skip_ratio 1", "a share in"),
    ("--cfg_sigmas 0.9,0.1", "not LOW,HIGH"),
    ("--cfg_sigmas 0.9", "not a valid LOW,HIGH"),
    ("--cfg_steps 5,5", "FIRST < END"),
    ("--cfg_gate 0", "at least 1"),
    ("--cfg_skip_ratio 0.2 --sample_guide_scale 1", "guidance is off"),
    ("--cfg_gate 3 --sample_preset lightx2v", "--cfg_gate: guidance is off"),
    ("--cfg_gate 3 --calibrate_cache t.json", "drop --cfg_gate"),
])
def test_limits_that_make_no_sense_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([*flags.split(), "--ckpt_dir", "w", "--prompt", "x"], world_size=1)


@pytest.mark.parametrize(("options", "message"), [
    (GuidanceOptions(skip_ratio=0.01), "leaves out none of the 10 steps"),
    (GuidanceOptions(sigmas=(0.0, 1.0)), "leaves out none of the 10 steps"),
    (GuidanceOptions(gate=40), "leaves out none"),
    (GuidanceOptions(steps=(10, 20)), "leaves none of the 10 steps with guidance"),
])
def test_limits_without_an_effect_are_refused(options: GuidanceOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.plan(T2V, 0.875, SCALES)


def test_flags_reach_the_options_and_the_settings() -> None:
    words = ["--ckpt_dir", "w", "--prompt", "x"]
    flags = ["--cfg_skip_ratio", "0.25", "--cfg_sigmas", "0.1,0.9", "--cfg_steps", "1,30", "--cfg_gate", "20"]
    options = parse([*words, *flags], world_size=1)
    assert options.guidance_limits == GuidanceOptions(skip_ratio=0.25, sigmas=(0.1, 0.9), steps=(1, 30), gate=20)
    assert not parse([*words, "--cfg_skip_ratio", "0"], world_size=1).guidance_limits  # VideoX-Fun's "off"
    known = options.resolve("t2v-A14B").settings(options.jobs()[0], "w")
    assert known["guidance_limits"]["gate"] == 20


def test_a_restart_forgets_the_unconditional_branch_and_computes() -> None:
    cache = StepCache(CachePlan("magcache", (True, False, False, False)))
    cache.restart_at(frozenset({2}))
    x, seen = torch.zeros(1, 1, 1), []
    for step in range(4):
        cache.begin(step, "high", None)  # type: ignore[arg-type]
        for branch in ("cond", "uncond"):
            cache.around(branch)(x, lambda y: y + 1)
            seen.append(cache.computed)
    assert seen == [True, True, False, False, True, True, False, False]
    assert "1 of" not in cache.plan.describe() and cache.plan.compute == (True, False, True, False)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> WanGenerator:
    return WanGenerator.from_pretrained(tiny_pipeline_folder(), dtype="fp32", device="cpu")


def test_a_plan_saves_evaluations_and_is_what_it_says(generator: WanGenerator) -> None:
    exact = generator(**ASK)
    assert exact.evaluations == 20
    plain = generator(**ASK, guidance=(1.0, 1.0))
    assert plain.evaluations == 10
    low_plain = generator(**ASK, guidance_limits=GuidanceOptions(skip_ratio=0.3))  # exactly the low expert's steps
    assert low_plain.evaluations == 17
    torch.testing.assert_close(low_plain.latents, generator(**ASK, guidance=(1.0, 4.0)).latents, rtol=0, atol=0)
    gated = generator(**ASK, guidance_limits=GuidanceOptions(gate=4))
    assert gated.evaluations == 15
    distance = [float((made.latents - exact.latents).norm()) for made in (gated, plain)]
    assert 0 < distance[0] < distance[1]  # an old difference is better than none
    assert generator(**ASK, guidance_limits=GuidanceOptions(steps=(2, 5))).evaluations == 13


def test_plans_and_step_caches_work_together(generator: WanGenerator) -> None:
    limits, cache = GuidanceOptions(steps=(2, 9), gate=5), CacheOptions(method="taylorseer", interval=2)
    made = generator(**ASK, guidance_limits=limits, cache=cache)
    plan = generator.guidance_plan(generator.options.__class__(
        **{**vars(generator.options), "steps": 10, "guidance_limits": limits}))
    assert isinstance(plan, GuidancePlan) and plan.starts == {2}
    computed = cache.build("t2v-A14B", T2V, shift=12.0, boundary=0.875, grid="official", solver="unipc")
    assert isinstance(computed, StepCache)
    computed.restart_at(plan.starts)
    expected = sum(c * (2 if mode == "guided" else 1) for c, mode in zip(computed.plan.compute, plan.modes))
    assert made.evaluations == expected < 17


def test_generating_says_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindspeed_wan.inference.generate import main

    main(["--ckpt_dir", str(tiny_pipeline_folder()), "--prompt", "x", "--size", "48*32", "--frame_num", "5", "--device",
          "cpu", "--dtype", "fp32", "--sample_steps", "10", "--cfg_skip_ratio", "0.3", "--save_path", str(tmp_path)])
    assert "guidance: 7 of 10 steps run the unconditional branch (#######...)" in capsys.readouterr().out
