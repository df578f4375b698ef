"""Plans of a generation: the program's own rules, its memory modes, stages, PipeFusion and 8-bit weights."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_accuracy import GENERATIONS, planned_generation
from benchmarks.plan_memory import measure_generation
from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions
from mindspeed_wan.planning.devices import device
from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.layouts import Layout, Search, search
from mindspeed_wan.planning.memory import plan_memory, plan_stage
from mindspeed_wan.planning.report import start_generation
from mindspeed_wan.planning.stages import stages
from mindspeed_wan.planning.traffic import bytes_between_stages, collectives
from tests.helpers.spawn import run_ranks

ROOT = Path(__file__).resolve().parents[3]
MEASURED = ("1 rank, both experts", "1 rank, int8 weights, blocks streamed", "PP2, PipeFusion of 4")
JOB = Job(model=WanConfig(), latent=(21, 60, 104), device=device("H200"), training=False, fp32_residual=True)
FUSION = PipeFusionOptions(on=True)


def best(devices: int, **search_for: Any) -> Layout:
    return search(JOB, Search(devices=devices, **search_for)).layouts[0]


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case.name in MEASURED else pytest.mark.slow) for case in GENERATIONS
], ids=lambda case: case.name)
def test_planned_peak_is_within_ten_percent_of_the_measured_one(case: Any) -> None:
    assert planned_generation(case) == pytest.approx(measure_generation(case, run_ranks), rel=0.10)


MODES = {"resident": 2, "sequential": 1, "block": 0}
DEGREES = {"tensor": (1, 2), "ulysses": (1, 2, 3), "ring": (1, 2), "cfg": (1, 2), "pipeline": (1, 2, 3),
           "sharded": (False, True), "mode": tuple(MODES), "pipefusion": (False, True)}


def test_what_is_legal_is_what_the_program_accepts() -> None:
    """Each combination of eight ranks; lack of memory is another matter."""
    job = JOB.with_changes(device=device("H200", memory=2**50))
    different = []
    for values in itertools.product(*DEGREES.values()):
        asked = dict(zip(DEGREES, values))
        context = asked["ulysses"] * asked["ring"]
        if asked["sharded"] and asked["cfg"] * context == 1:
            continue  # nothing to shard over: the program wraps, the plan calls it unsharded
        plan = search(job, Search(
            devices=8, tensor=asked["tensor"], context=context, ulysses=asked["ulysses"], cfg=asked["cfg"],
            pipeline=asked["pipeline"], shard=asked["cfg"] * context * asked["sharded"], experts=MODES[asked["mode"]],
            pipefusion=PipeFusionOptions(on=asked["pipefusion"])))
        if bool(plan.layouts) != _accepted(asked):
            different.append(asked)
    assert different == []


def _accepted(asked: dict[str, Any]) -> bool:
    words = ["--ckpt_dir", "model", "--prompt", "a fox", "--num_videos", "8", "--memory", asked["mode"],
             "--tensor_size", asked["tensor"], "--ulysses_size", asked["ulysses"], "--ring_size", asked["ring"],
             "--cfg_size", asked["cfg"], "--pipeline_model_parallel_size", asked["pipeline"],
             *["--dit_fsdp"] * asked["sharded"], *["--pipefusion"] * asked["pipefusion"]]
    try:
        parse(list(map(str, words)), world_size=8).check(num_heads=40)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("argv", [
    ["--devices", "8"],
    ["--devices", "8", "--pp", "2", "--cp", "4", "--ulysses", "2"],
    ["--devices", "8", "--pipefusion", "--pipefusion-warmup", "3", "--quantize", "fp8_weight_only"],
    ["--devices", "4", "--cp", "4", "--shard", "4", "--memory-mode", "sequential", "--steps", "20"],
    ["--devices", "1", "--memory-mode", "block", "--quantize", "int8_weight_only", "--size", "720x1280"],
    ["--devices", "16", "--task", "i2v-A14B", "--pp", "2"],
    ["--devices", "2", "--task", "t2v-14B", "--precision", "fp32"],
])
def test_the_start_line_asks_the_program_for_the_plan(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "--infer", "--device", "H200", *argv]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("start it"))
    words = shlex.split(line.partition(": ")[2])
    script = next(word for word in words if word.endswith(".sh"))
    assert (ROOT / script).is_file()
    variables = dict(word.split("=") for word in words[: words.index("bash")])
    ranks = int(variables["NPROC_PER_NODE"]) * int(variables.get("NNODES", "1"))
    flags = [word if word != "FILE" else str(ROOT / "LICENSE") for word in words[words.index(script) + 1 :]]
    options = parse([*flags, "--num_videos", "16"], world_size=ranks)
    name = re.search(r"\n  (\S.*?)  +\d", text.partition("s/step")[2])
    assert name is not None
    for word, value in (("PP", options.layout.pipeline), ("TP", options.layout.tensor), ("CFG", options.layout.cfg),
                        ("CP", options.layout.context), ("PipeFusion of ", options.pipefusion.count(options.layout))):
        found = re.search(rf"{word}(\d+)", name[1])
        if word != "PipeFusion of " or options.pipefusion:
            assert (int(found[1]) if found else 1) == value, (word, name[1], line)
    assert options.layout.dit_fsdp == ("FSDP2" in name[1])
    assert ranks == int(argv[1])


def test_stages_add_up_and_wait_for_each_other() -> None:
    staged = best(2, pipeline=2, tensor=1, context=1, cfg=1)
    job, whole = staged.job, best(1)
    weights = sum(plan_stage(job, stage).moment("denoising").parts["weights"] for stage in stages(job))
    assert weights == pytest.approx(plan_memory(whole.job).moment("denoising").parts["weights"])
    busy = staged.duration.parts["attention"] + staged.duration.parts["other compute"]
    assert busy == pytest.approx((whole.duration.parts["attention"] + whole.duration.parts["other compute"]) / 2)
    # two passes over two stages: three pass times, one of them idle
    assert staged.duration.parts["pipeline bubble"] == pytest.approx(busy / 2, rel=0.01)
    one_branch = plan_duration(job.with_changes(guidance=1))
    assert one_branch.parts["pipeline bubble"] == pytest.approx(one_branch.step / 2, rel=0.02)


def test_bytes_between_stages_are_the_residual_stream_of_each_pass() -> None:
    job = best(2, pipeline=2, tensor=1, context=1, cfg=1).job
    assert bytes_between_stages(job) == 2 * 4 * 5120 * (job.tokens + 7)  # fp32 tokens, modulation and time; no text
    (shared,) = (c for c in collectives(job) if c.kind == "broadcast")
    assert shared.payload == 4 * 16 * 21 * 60 * 104


def test_pipefusion_shrinks_the_bubble_and_keeps_keys_and_values() -> None:
    plain = best(4, pipeline=4, tensor=1, context=1, cfg=1)
    fused = best(4, pipeline=4, tensor=1, context=1, cfg=1, pipefusion=FUSION)
    assert fused.job.patches == 8 and fused.job.whole_steps == 4
    assert fused.duration.step < plain.duration.step
    share = (1 - 4 / 40) / 8 + 4 / 40  # patched steps wait for patches, whole ones for passes
    bubbles = [layout.duration.parts["pipeline bubble"] for layout in (fused, plain)]
    assert bubbles[0] / bubbles[1] == pytest.approx(share, rel=0.01)
    kept = plan_memory(fused.job).moment("denoising").parts["PipeFusion's keys and values"]
    assert kept == pytest.approx((2 * 10 - 1) * 2 * 5120 * 2 * fused.job.tokens)  # both branches, 10 blocks, bf16
    always_whole = plan_duration(fused.job.with_changes(warmup=40))
    assert always_whole.total == pytest.approx(plain.duration.total)


def test_weights_in_8_bits_halve_and_cost_time() -> None:
    plain, eight = best(1), search(JOB.with_changes(base="fp8"), Search(devices=1)).layouts[0]
    weights = [plan_memory(layout.job).moment("denoising").parts["weights"] for layout in (plain, eight)]
    assert 0.50 < weights[1] / weights[0] < 0.53
    assert eight.duration.step > plain.duration.step
    assert "decoded weights" in plan_memory(eight.job).moment("denoising").parts


def test_memory_modes_trade_memory_for_time() -> None:
    plans = {mode: best(1, experts=count) for mode, count in MODES.items()}
    sizes = [plan.memory.moment("denoising").tensors for plan in plans.values()]
    assert sizes == sorted(sizes, reverse=True)
    expert = 14.288e9 * 2
    hosts = [plan.memory.host for plan in plans.values()]
    assert hosts[0] == 0 and hosts[1] == pytest.approx(2 * expert, rel=0.001) and 0 < hosts[2] < hosts[1]
    exchange = plans["sequential"].duration.once - plans["resident"].duration.once
    assert exchange == pytest.approx(2 * expert / 25e9, rel=0.001)  # to the other expert and back for the next video
    assert plans["block"].duration.parts["exposed streaming"] > 0


def test_stages_are_tried_where_the_job_is_one_video() -> None:
    layouts = search(JOB, Search(devices=8)).layouts
    assert {layout.job.dims.pipeline for layout in layouts} == {1, 2, 4, 8}
    assert all(layout.job.dims.data == layout.job.cfg for layout in layouts if layout.job.dims.pipeline > 1)
    fused = search(JOB, Search(devices=8, pipefusion=FUSION))
    assert {layout.job.dims.context for layout in fused.layouts} == {1}
    assert [refusal.name for refusal in fused.refused] == ["TP8 CP1 Ulysses 1"]  # no rank is left for a second stage
    assert start_generation(fused.layouts[0], "t2v-A14B")[0].count("--pipefusion") == 3


@pytest.mark.parametrize(("argv", "message"), [
    (["--pp", "2", "--memory-mode", "block", "--devices", "2"], "each stage holds its blocks"),
    (["--pp", "2", "--devices", "8", "--cp", "1", "--tp", "1"], "pipeline stages make one"),
    (["--pp", "2", "--devices", "2", "--shard", "2"], "--dit_fsdp with --pipeline_model_parallel_size"),
    (["--pp", "64", "--devices", "64", "--cp", "1", "--tp", "1", "--cfg", "1"], "64"),
    (["--pipefusion", "--cp", "2", "--devices", "4"], "--pipefusion cuts the tokens itself"),
    (["--pipefusion", "--pp", "1", "--devices", "4"], "give --pipeline_model_parallel_size 2 or more"),
    (["--pipefusion-patches", "4", "--pp", "2", "--devices", "2"], "does nothing without --pipefusion"),
    (["--memory-mode", "block", "--devices", "2", "--shard", "2"], "both move blocks around"),
    (["--pipefusion-warmup", "0"], "--pipefusion-warmup: 0 is below 1"),
    (["--tp", "3", "--devices", "8"], "does not divide it"),
    (["--cfg", "3", "--devices", "6"], "guidance has two branches"),
    (["--vp", "2"], "--vp: only for planning training"),
])
def test_what_the_program_refuses_is_refused_in_its_words(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["plan", "--infer", "--device", "H200", *argv])


def test_training_refuses_what_only_a_generation_has() -> None:
    with pytest.raises(ConfigError, match="--quantize, --memory-mode, --pipefusion: only for planning a generation"):
        dispatch(["plan", "--quantize", "int8_weight_only", "--memory-mode", "block", "--pipefusion"])
