"""The search: legal as ``ParallelDims`` is, best first, every refusal with its reason; scaling; the command."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import PRESETS, device
from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.layouts import USABLE, Search, search
from mindspeed_wan.planning.memory import plan_memory
from mindspeed_wan.planning.scaling import scaling

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def job() -> Job:
    return Job(model=WanConfig(), latent=(21, 60, 104), device=device("910B"))


def test_every_layout_found_is_legal_and_fits(job: Job) -> None:
    plan = search(job, Search(devices=16))
    assert plan.layouts
    for layout in plan.layouts:
        layout.job.dims.validate(num_heads=40, ffn_dim=13824)
        assert layout.memory.total <= USABLE * job.device.memory


def test_layouts_come_fastest_first(job: Job) -> None:
    rates = [layout.duration.clips_per_second for layout in search(job, Search(devices=16)).layouts]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("search_for", [{"tensor": 16}, {"context": 16, "ulysses": 16}, {"tensor": 3}, {"shard": 7}])
def test_refusals_say_what_the_trainer_says(job: Job, search_for: dict[str, int]) -> None:
    plan = search(job, Search(devices=16, **search_for))
    assert not plan.layouts
    assert plan.refused
    with pytest.raises(ConfigError) as error:
        dims = {"tensor": 1, "context": 1, **search_for}
        ParallelDims(world_size=16, sequence_parallel=dims["tensor"] > 1, **dims).validate(num_heads=40, ffn_dim=13824)
    assert error.value.message in {refusal.reason for refusal in plan.refused}


def test_no_more_blocks_are_recomputed_than_must_be(job: Job) -> None:
    best = search(job, Search(devices=16)).layouts[0]
    assert 0 < best.job.recomputed < 40
    fewer = best.job.with_changes(recomputed=best.job.recomputed - 1)
    assert plan_memory(fewer).total > USABLE * job.device.memory


def test_a_global_batch_is_kept_or_refused(job: Job) -> None:
    plan = search(job, Search(devices=16, global_batch=8))
    assert {layout.job.clips_per_step for layout in plan.layouts} == {8}
    assert any("not a multiple of 1 clips x 16 data ranks" in refusal.reason for refusal in plan.refused)


def test_weak_scaling_keeps_the_work_and_strong_scaling_the_batch(job: Job) -> None:
    best = search(job, Search(devices=16)).layouts[0].job
    weak = scaling(best, 1024, "weak")
    assert [row.devices for row in weak] == [16 * 2**i for i in range(7)]
    assert all(later.efficiency <= earlier.efficiency for earlier, later in pairwise(weak))
    strong = scaling(best.with_changes(accumulation=8), 1024, "strong")
    assert {row.global_batch for row in strong} == {best.clips_per_step * 8}
    assert len(strong) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_plans_training_and_generation(name: str, job: Job) -> None:
    for one in (job, job.with_changes(training=False)):
        plan = search(one.with_changes(device=device(name)), Search(devices=16))
        assert plan.layouts or all("GiB" in refusal.reason for refusal in plan.refused)


def test_thousands_of_devices_are_planned(job: Job) -> None:
    assert search(job, Search(devices=4096)).layouts


def test_command_prints_json_and_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    assert dispatch(["plan", "--device", "A3", "--devices", "32", "--size", "720x1280", "--json", "--scaling",
                     "--max-devices", "256", "--plot", str(plot)]) == 0
    values = json.loads(capsys.readouterr().out)
    best = values["layouts"][0]
    assert best["memory_bytes"] < 64 * 2**30
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert [row["devices"] for row in values["scaling"]["weak"]] == [32, 64, 128, 256]
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_the_start_line_reproduces_the_layout(job: Job) -> None:
    """Every degree of the plan is in it, in words that the launch script and the trainer know."""
    from mindspeed_wan.planning.report import start

    plan = search(job, Search(devices=32, tensor=2, context=4, ulysses=2, shard=8))
    line, *rest = start(plan.layouts[0], "t2v-A14B")
    for word in ("TP=2", "CP=4", "SP=1", "CP_ALGO=hybrid_cp_algo", "ULYSSES_DEGREE=2", "--recompute-method block"):
        assert word in line
    assert f"--recompute-num-layers {plan.layouts[0].job.recomputed}" in line
    assert rest == ["  with sharding_size: 8 in the FSDP2 file"]
    known = (ROOT / "docs" / "reference" / "flags.md").read_text(encoding="utf-8")
    assert all(word in known for word in line.split() if word.startswith("--"))
    readme = (ROOT / "examples" / "wan2.2" / "README.md").read_text(encoding="utf-8")
    assert all(word.partition("=")[0] in readme for word in line.split() if word.isupper() and "=" in word)


def test_attention_is_kept_where_that_is_faster(job: Job) -> None:
    """Running attention again costs more than its results take, as long as these fit."""
    best = search(job, Search(devices=16)).layouts[0].job
    assert best.keep_attention
    without = best.with_changes(keep_attention=False)
    assert plan_duration(without).step > plan_duration(best).step
    assert plan_memory(without).total < plan_memory(best).total


def test_command_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "--device", "h200", "--devices", "8", "--lora", "16"]) == 0
    text = capsys.readouterr().out
    assert "layouts, fastest first" in text and "start it: NPROC_PER_NODE=8 TP=" in text
    assert dispatch(["plan", "--infer", "--device", "H200", "--devices", "8", "--cfg", "2"]) == 0
    assert "CFG2" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["--device", "H20O"], "not a preset"),
    (["--task", "t2v-A14C"], "did you mean 't2v-A14B'"),
    (["--size", "480"], "HEIGHTxWIDTH"),
    (["--size", "480x830"], "multiples of 16"),
    (["--frames", "80"], "use 81"),
    (["--devices", "0"], "below 1"),
    (["--memory", "-3"], "positive"),
    (["--tp", "3"], "no layout of 8 devices is legal"),
    (["--infer", "--scaling", "--device", "H200"], "leave --infer out"),
    (["--infer", "--ema", "--lora", "8"], "--lora, --ema: only for planning training"),
    (["--cfg", "2"], "--cfg: only for planning a generation"),
    (["--tp", "0"], "--tp: 0 is below 1"),
    (["--lora", "-3"], "--lora: -3 is below 0"),
    (["--global-batch-size", "0"], "--global-batch-size: 0 is below 1"),
    (["--infer", "--steps", "-5"], "--steps: -5 is below 1"),
    (["--recompute", "41"], "more than the model's 40 blocks"),
    (["--memory", "nan"], "--memory: nan is not a positive number"),
    (["--scaling", "--devices", "8", "--max-devices", "4"], "below the job's 8 devices"),
    (["--pp", "2", "--tp", "1", "--cp", "1", "--global-batch-size", "7"], "not a multiple of 1 clips"),
    (["--task", "t2v-14B", "--expert-ranks", "even"], "t2v-14B has one expert"),
])
def test_command_refuses_what_cannot_be_meant(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["plan", *argv])


@pytest.mark.parametrize("argv", [["--devices", "1"], ["--devices", "8", "--tp", "4", "--memory", "24"]])
def test_command_says_what_is_closest_when_nothing_fits(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceError, match="nothing fits; what misses least") as error:
        dispatch(["plan", "--device", "910B", *argv])
    with pytest.raises(ResourceError):
        dispatch(["plan", "--device", "910B", "--json", *argv])
    refused = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["refused"]
    least = min((row for row in refused if row["needs_bytes"]), key=lambda row: row["needs_bytes"])
    assert least["name"] in error.value.message


def test_a_plot_without_a_place_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        dispatch(["plan", "--device", "H200", "--max-devices", "8", "--plot", str(tmp_path / "file" / "a.png")])


def test_a_generation_shards_over_the_ranks_of_a_video_and_has_no_sequence_parallelism(job: Job) -> None:
    """As ``inference.runtime.start`` cuts it: CFG x context ranks; videos beside each other share nothing."""
    generation = job.with_changes(training=False, device=device("H200"))
    plan = search(generation, Search(devices=8))
    assert {layout.job.dims.sequence_parallel for layout in plan.layouts} == {False}
    sharded = [layout.job for layout in plan.layouts if layout.job.fsdp2]
    assert sharded
    assert all(one.dims.shard_size == one.cfg * one.dims.context > 1 for one in sharded)
    refused = search(generation, Search(devices=8, context=2, shard=8)).refused
    assert any("shards over the 2 ranks (CFG x context) of a video" in refusal.reason for refusal in refused)


def test_a_generation_streams_blocks_where_no_expert_fits(job: Job) -> None:
    small = job.with_changes(training=False, device=device("910B", memory=24 * 2**30))
    (streamed,) = search(small, Search(devices=1)).layouts
    assert streamed.name == "blocks streamed" and streamed.memory.host > 50e9
    (whole,) = search(small.with_changes(device=device("910B")), Search(devices=1)).layouts
    assert whole.name == "one expert at a time"
    assert streamed.duration.step > whole.duration.step
    assert streamed.duration.parts["exposed streaming"] < 0.05 * streamed.duration.step  # a block hides its successor


def test_blocks_of_a_stage_are_recomputed_at_most(job: Job) -> None:
    plan = search(job.with_changes(device=device("H200")), Search(devices=16, pipeline=2, recomputed=30))
    assert {layout.job.recomputed for layout in plan.layouts} == {20}


@pytest.mark.parametrize(("argv", "words"), [
    (["--task", "t2v-14B"], "NPROC_PER_NODE=8 TP=1 .* bash examples/wan2.1/14B/t2v/pretrain.sh"),
    (["--task", "i2v-14B", "--lora", "8"], "wan2.1/14B/i2v/pretrain.sh --lora-r 8 --lora-alpha 8"),
    (["--task", "inp-A14B"], "A14B/i2v/pretrain_high.sh"),
    (["--ema", "--precision", "fp32"], "PRECISION=fp32 .*--ema-decay"),
    (["--devices", "32", "--size", "720x1280"],
     "on each of 4 nodes: NPROC_PER_NODE=8 NNODES=4(.|\n)*max_height 720 and max_width 1280 in the data file"),
    (["--devices", "16", "--expert-ranks", "even"], "2 nodes: NPROC_PER_NODE=8 NNODES=2 EXPERT_RANKS=even"),
])
def test_the_start_line_is_that_of_the_task(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "--device", "H200", "--devices", "8", *argv]) == 0
    text = capsys.readouterr().out
    assert re.search(words, text), text[-600:]
    script = next(word for word in text.split() if word.endswith(".sh"))
    assert (ROOT / script).is_file()
