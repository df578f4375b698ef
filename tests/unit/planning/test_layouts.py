"""The search: legal as ``ParallelDims`` is, best first, every refusal with its reason; scaling; the command."""

from __future__ import annotations

import json
import time
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


def test_thousands_of_devices_are_planned_in_a_second(job: Job) -> None:
    started = time.process_time()
    assert search(job, Search(devices=4096)).layouts
    assert time.process_time() - started < 1.0


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
    line, *rest = start(plan.layouts[0], "t2v")
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
    assert "layouts, fastest first" in text and "start it: TP=" in text
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
])
def test_command_refuses_what_cannot_be_meant(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["plan", *argv])


def test_command_says_when_nothing_fits() -> None:
    with pytest.raises(ResourceError, match="nothing fits"):
        dispatch(["plan", "--devices", "1", "--device", "910B"])
