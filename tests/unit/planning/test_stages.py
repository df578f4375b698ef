"""Pipeline stages: the bubble, what each stage holds and has under way, refusals; 8-bit bases; both experts."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.models.quantization_spec import QuantizationSpec, expert_bytes
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.pipeline import PipelinePlan
from mindspeed_wan.planning.devices import device
from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job, frozen_bytes, unit_sizes
from mindspeed_wan.planning.joint import plan_joint
from mindspeed_wan.planning.layouts import USABLE, Search, search
from mindspeed_wan.planning.memory import plan_memory, plan_stage
from mindspeed_wan.planning.stages import bubble, held, stages, under_way, wire_bytes
from mindspeed_wan.planning.traffic import bytes_between_stages, collectives


def staged(pipeline: int = 4, virtual: int = 1, **changes: object) -> Job:
    """A14B at 480p on 32 devices without FSDP2."""
    dims = ParallelDims(world_size=max(32, 8 * pipeline), tensor=2, sequence_parallel=True, context=4,
                        pipeline=pipeline, virtual=virtual, shard=1)
    base = Job(model=WanConfig(), latent=(21, 60, 104), device=device("910B"), dims=dims, fsdp2=False,
               accumulation=16, recomputed=5, encoders=False)
    return base.with_changes(**changes)


def test_bubble_by_hand() -> None:
    """Two stages, three micro-batches: four slots, one of them idle on each stage; chunks of half a slot: 1 of 7."""
    assert bubble(2, 1, 3) == 1 / 4
    assert bubble(2, 2, 3) == 1 / 7
    assert bubble(1, 1, 1) == 0


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (4, 2)])
def test_the_step_has_that_bubble(pipeline: int, virtual: int) -> None:
    parts = plan_duration(staged(pipeline, virtual)).parts
    work = sum(parts[name] for name in parts if name.startswith(("attention", "other", "exposed")))
    work -= parts["exposed gradients"]
    assert parts["pipeline bubble"] / (work + parts["pipeline bubble"]) == pytest.approx(bubble(pipeline, virtual, 16))


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (3, 1), (4, 2), (8, 5)])
@pytest.mark.parametrize("task", PRESETS)
def test_stages_hold_the_whole_model_once(task: str, pipeline: int, virtual: int) -> None:
    model, dims = PRESETS[task], ParallelDims(world_size=pipeline, pipeline=pipeline, virtual=virtual)
    if model.num_layers < pipeline * virtual:
        return
    job, sizes = staged().with_changes(model=model, dims=dims), unit_sizes(model, 1, 1)
    found = stages(job)
    assert sum(held(sizes, stage) for stage in found) == sizes.whole
    plan = PipelinePlan.even(model.num_layers, pipeline, virtual)
    for stage in found:
        assert list(stage.chunks) == [len(chunk.blocks) for chunk in plan.chunks(stage.number)]
    assert job.blocks == max(stage.blocks for stage in found) == found[0].blocks


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow() -> None:
    assert [under_way(4, 1, 16, number) for number in range(4)] == [((4,),), ((3,),), ((2,),), ((1,),)]
    assert under_way(4, 1, 2, 0) == ((2,),)


def test_interleaving_by_hand() -> None:
    """Two stages, two chunks, four micro-batches. Stage 0: F0 F0 F1 F1 F0, B1, F0, B1, F1, B0, ...; stage 1 has two
    fewer in its warm-up."""
    assert max(map(sum, under_way(2, 2, 4, 0))) == 2 * 1 + 1 * 2 + 1
    assert (3, 2) in under_way(2, 2, 4, 0)
    assert max(map(sum, under_way(2, 2, 4, 1))) == 3
    assert under_way(2, 2, 2, 0) == ((2, 2),)


def test_memory_falls_from_stage_to_stage_and_with_more_of_them() -> None:
    job = staged()
    plans = [plan_stage(job, stage).total for stage in stages(job)]
    assert all(later < earlier for earlier, later in pairwise(plans))
    assert plan_memory(job).total == max(plans)
    assert plan_memory(staged(4)).total < plan_memory(staged(2, recomputed=10)).total


@pytest.mark.parametrize("virtual", [1, 2])
def test_memory_falls_with_every_recomputed_block(virtual: int) -> None:
    totals = [plan_memory(staged(4, virtual, recomputed=count)).total for count in range(11)]
    assert all(later <= earlier for earlier, later in pairwise(totals))
    assert totals[-1] < totals[0] / 1.5


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (8, 1), (4, 2), (8, 5)])
def test_no_stage_is_larger_than_the_first_and_the_last(pipeline: int, virtual: int) -> None:
    job = staged(pipeline, virtual, dims=ParallelDims(world_size=pipeline, pipeline=pipeline, virtual=virtual))
    assert plan_memory(job).total == max(plan_stage(job, stage).total for stage in stages(job))


def test_a_stage_holds_eighteen_bytes_a_parameter() -> None:
    """bf16 parameters, fp32 masters, gradients and two moments; nothing is sharded."""
    job = staged()
    first = stages(job)[0]
    parts = plan_stage(job, first).moment("update").parts
    states = sum(parts[name] for name in ("weights (fp32)", "weights (bf16)", "Adam moments", "gradients"))
    assert states == 18 * held(job.sizes, first)


def test_what_travels_between_stages() -> None:
    """32,760 tokens in eight parts, 512 text rows and 14 half rows of modulation, bf16; there and back, 16 times."""
    job = staged()
    assert wire_bytes(job) == (32760 / 8 + 512 + 14) * 5120 * 2
    assert bytes_between_stages(job) == 16 * 2 * wire_bytes(job)
    assert bytes_between_stages(staged(4, 2)) == 2 * bytes_between_stages(job)
    assert not any(c.between_stages for c in collectives(job.with_changes(dims=ParallelDims(world_size=32))))


def test_pipelines_are_ranked_with_the_others() -> None:
    job = staged()
    plan = search(job, Search(devices=32, global_batch=64))
    kinds = {layout.job.dims.pipeline for layout in plan.layouts}
    assert kinds > {1} and all(layout.memory.total <= USABLE * job.device.memory for layout in plan.layouts)
    rates = [layout.duration.clips_per_second for layout in plan.layouts]
    assert rates == sorted(rates, reverse=True)
    assert not any(layout.job.fsdp2 for layout in plan.layouts if layout.job.dims.pipeline > 1)


@pytest.mark.parametrize(("wanted", "reason"), [
    ({"pipeline": 4, "shard": 8}, "FSDP2 would gather its parameters anew"),
    ({"pipeline": 5}, "do not factor"),
    ({"pipeline": 4, "virtual": 16}, "40 blocks cannot be split into 4 stages x 16 chunks"),
    ({"pipeline": 1, "virtual": 2}, "without pipeline stages"),
    ({"pipeline": 4, "virtual": 2, "global_batch": 8 * 3, "tensor": 1, "context": 1},
     "3 micro-batches per step are not a multiple of 4 pipeline stages"),
])
def test_refused_pipelines_say_why(wanted: dict[str, int], reason: str) -> None:
    plan = search(staged(), Search(devices=32, **wanted))
    assert not plan.layouts
    assert any(reason in refusal.reason for refusal in plan.refused)


def test_pipelines_beside_fsdp2_are_named_as_refused() -> None:
    refused = search(staged(), Search(devices=32)).refused
    assert {"PP2 with FSDP2", "PP4 with FSDP2", "PP8 with FSDP2"} <= {refusal.name for refusal in refused}


def test_command_plans_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--devices", "32", "--pp", "4", "--vp", "2", "--features"]
    assert dispatch(argv) == 0
    text = capsys.readouterr().out
    assert "PP=4 VP=2" in text and "FSDP_CONFIG=" in text and "stage 3: 5+5 blocks" in text
    assert dispatch([*argv, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["layouts"][0]
    assert max(stage["memory_bytes"] for stage in best["stages"]) == best["memory_bytes"]
    assert best["bubble"] == bubble(4, 2, best["accumulation"])


@pytest.mark.parametrize("base", ["fp8", "int8"])
def test_an_8_bit_base_is_counted_as_it_is_stored(base: str) -> None:
    model = WanConfig()
    expected = expert_bytes(model, element=2, quantization=QuantizationSpec(f"{base}_weight_only"))
    sizes = frozen_bytes(model, 1, 1, 2, base)
    assert sizes.whole == sizes.shard == expected
    assert expected == pytest.approx(14.5e9, rel=0.01)
    assert frozen_bytes(model, 1, 1, 2, None).whole == expert_bytes(model, element=2)


def test_an_8_bit_base_saves_memory_and_gathers_less() -> None:
    job = staged(1, dims=ParallelDims(world_size=8), fsdp2=True, lora_rank=16, accumulation=1)
    eight = job.with_changes(base="fp8")
    assert plan_memory(eight).total < plan_memory(job).total
    gathered = [next(c.payload for c in collectives(one) if c.purpose == "FSDP2: gather a block")
                for one in (eight, job)]
    assert gathered[0] == pytest.approx(gathered[1] / 2, rel=0.01)
    rows = frozen_bytes(WanConfig(), 2, 1, 2, "fp8")
    assert rows.whole < 0.52 * frozen_bytes(WanConfig(), 2, 1, 2, None).whole


def test_even_parts_are_sensible_and_uneven_ones_with_uneven_iterations() -> None:
    job = staged(1, device=device("H200"))
    plan = plan_joint(job, Search(devices=16, tensor=1, context=1, pipeline=1, global_batch=48), "auto")
    assert plan.sensible is not None and plan.sensible.sizes == (8, 8)
    assert plan.sensible.idle == 0
    uneven = plan_joint(job, Search(devices=16, tensor=1, context=1, pipeline=1, global_batch=48), "auto", (3000, 1000))
    assert uneven.chosen.sizes == (12, 4)
    assert uneven.chosen.idle < 0.1
    batches = {layout.job.clips_per_step for split in plan.splits for layout in split.best}
    assert batches == {48}


def test_each_part_is_planned_as_a_job_of_its_own() -> None:
    job, wanted = staged(1, device=device("H200")), Search(devices=16, tensor=2, pipeline=1, global_batch=8)
    split = plan_joint(job, wanted, "even").chosen
    alone = search(job, Search(devices=8, tensor=2, pipeline=1, global_batch=8)).layouts[0]
    assert [layout.memory.total for layout in split.best] == [alone.memory.total] * 2


def test_command_plans_both_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "--device", "H200", "--devices", "16", "--expert-ranks", "even", "--features",
                     "--cp", "1"]) == 0
    text = capsys.readouterr().out
    assert "sensible: --expert-ranks 8,8 (both experts cost the same per step" in text
    assert "EXPERT_RANKS=even" in text and "pretrain_both.sh" in text
    assert dispatch(["plan", "--device", "H200", "--devices", "16", "--expert-ranks", "12,4", "--json",
                     "--expert-iters", "3,1", "--features", "--lora", "16", "--cp", "1", "--tp", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["chosen"] == [12, 4] and set(values["experts"]) == {"high", "low"}


@pytest.mark.parametrize(("argv", "message"), [
    (["--base-dtype", "fp8"], "without --lora"),
    (["--infer", "--vp", "2", "--expert-iters", "1,1"], "--vp, --expert-iters: only for planning training"),
    (["--pp", "2", "--shard", "4"], "FSDP2 with pipeline stages"),
    (["--expert-ranks", "5,5"], "the job has 8"),
    (["--expert-ranks", "half"], "not even, auto or HIGH,LOW"),
    (["--devices", "7", "--expert-ranks", "even"], "cannot be halved"),
    (["--expert-iters", "1,2"], "without --expert-ranks"),
    (["--expert-ranks", "even", "--expert-iters", "3"], "not HIGH,LOW"),
    (["--expert-ranks", "even", "--scaling"], "plan the scaling of one expert"),
])
def test_command_refuses(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["plan", *argv])


def test_both_experts_that_fit_nowhere() -> None:
    with pytest.raises(ResourceError, match="nothing fits"):
        dispatch(["plan", "--devices", "2", "--expert-ranks", "even"])
