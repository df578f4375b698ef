"""Planned memory against peaks of real steps, and against what is known of A14B."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from benchmarks.plan_accuracy import CASES, planned_peaks
from benchmarks.plan_memory import measure
from mindspeed_wan.models.wan.config import PRESETS as MODELS
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import GIB, device
from mindspeed_wan.planning.job import Job, lora_sizes, unit_sizes
from mindspeed_wan.planning.memory import block_activations, plan_memory
from tests.helpers.spawn import run_ranks

MEASURED = ("1 rank", "1 rank, bf16, recompute", "LoRA, FSDP2 of 2, bf16, recompute",
            "1 rank, recompute but attention", "TP2 SP", "CP2 Ulysses", "FSDP2 of 2", "FSDP2 of 2, bf16, recompute",
            "1 rank, recompute, 8-bit moments")


@pytest.mark.parametrize("name", MEASURED)
def test_planned_peak_is_within_ten_percent_of_the_measured_one(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    peaks, planned = measure(case, run_ranks), planned_peaks(case)
    assert planned["step"] == pytest.approx(peaks["step"], rel=0.10)
    assert planned["update"] == pytest.approx(peaks["update"], rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in MEASURED], ids=lambda case: case.name)
def test_every_other_measured_case_too(case) -> None:  # type: ignore[no-untyped-def]
    peaks, planned = measure(case, run_ranks), planned_peaks(case)
    assert planned["step"] == pytest.approx(peaks["step"], rel=0.10)


def test_unit_sizes_count_every_parameter_once() -> None:
    for model in MODELS.values():
        sizes = unit_sizes(model, 1, 1)
        assert sizes.whole == sizes.shard == sum(math.prod(p.shape) for p in parameter_table(model))


def test_shards_are_what_fsdp2_cuts_from_dim_0() -> None:
    """[1, 6, D] modulation tables cannot be cut: rank 0 keeps them whole, everything else is divided."""
    model = WanConfig()
    modulation = model.num_layers * 6 * model.dim + 2 * model.dim
    whole, eighth = unit_sizes(model, 1, 1).shard, unit_sizes(model, 1, 8).shard
    assert eighth == (whole - modulation) // 8 + modulation


def test_tensor_parallel_keeps_replicated_parameters() -> None:
    model = WanConfig()
    half = sum(math.prod(p.shape) // (2 if p.tp_axis is not None else 1) for p in parameter_table(model))
    assert unit_sizes(model, 2, 1).whole == half


def test_lora_sizes_are_those_of_the_adapters() -> None:
    """r (in + out) per target: eight attention linears and two of the feed-forward in 40 blocks."""
    model = WanConfig()
    expected = 40 * 16 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    assert lora_sizes(model, 16, 1, 1).shard == expected


def a14b(**changes: object) -> Job:
    base = Job(model=WanConfig(), latent=(21, 90, 160), device=device("H200"),
               dims=ParallelDims(world_size=8), recomputed=40)
    return base.with_changes(**changes)


def test_states_of_a14b_over_eight_ranks_are_sixteen_bytes_a_parameter() -> None:
    """fp32 weights, two moments and gradients, as DFM and Megatron count them."""
    update = plan_memory(a14b(encoders=False)).moment("update").parts
    states = update["weights (fp32)"] + update["Adam moments"] + update["gradients"]
    assert states == pytest.approx(16 * 14.288e9 / 8, rel=0.002)


def test_recompute_keeps_one_tensor_per_block() -> None:
    with_recompute, without = plan_memory(a14b()), plan_memory(a14b(recomputed=0))
    saved = without.moment("backward begins").parts["activations"] - \
        with_recompute.moment("backward begins").parts["activations"]
    input_bytes = 75600 * 5120 * 2
    assert saved == pytest.approx(40 * (block_activations(a14b()) - input_bytes))
    assert with_recompute.total < without.total


def test_offloaded_inputs_leave_two_on_the_device() -> None:
    kept, away = plan_memory(a14b()), plan_memory(a14b(offload=True))
    one = 75600 * 5120 * 2
    saved = kept.moment("backward begins").parts["activations"] - away.moment("backward begins").parts["activations"]
    assert saved == pytest.approx(38 * one)
    assert (kept.host, away.host) == (0, 40 * one)


def test_optimizer_state_on_the_host_or_in_bytes() -> None:
    trained = 14.288e9 / 8
    plans = {states: plan_memory(a14b(encoders=False, states=states)) for states in ("device", "host", "bytes")}
    moments = {states: plan.moment("update").parts.get("Adam moments", 0) for states, plan in plans.items()}
    assert moments["device"] == pytest.approx(8 * trained, rel=0.002)
    assert moments["host"] == 0 and plans["host"].host == pytest.approx(8 * trained, rel=0.002)
    assert moments["bytes"] == pytest.approx(2.03 * trained, rel=0.003)
    assert plans["host"].total < plans["bytes"].total < plans["device"].total


def test_constants_are_the_trainers() -> None:
    from mindspeed_wan.planning import memory
    from mindspeed_wan.training import byte_states, optimizer

    assert memory.STATE_BATCH_BYTES == optimizer.BATCH_BYTES
    assert memory.BYTE_MOMENT == 1 + 4 / byte_states.BLOCK


@pytest.mark.parametrize("less", [
    {"dims": ParallelDims(world_size=8, context=2)},
    {"dims": ParallelDims(world_size=8, tensor=2, sequence_parallel=True)},
    {"dims": ParallelDims(world_size=16)},
    {"latent": (21, 60, 104)},
    {"lora_rank": 16},
    {"offload": True},
    {"states": "host"},
    {"states": "bytes"},
], ids=["context", "tensor", "more ranks", "480p", "LoRA", "offload", "host states", "8-bit states"])
def test_memory_falls_with_every_means_against_it(less: dict[str, object]) -> None:
    assert plan_memory(a14b(**less)).total < plan_memory(a14b()).total


def test_generation_agrees_with_the_published_peak_of_one_gpu() -> None:
    """Official code, one H100, T2V 480p: 41.3 GB with one expert and the text encoder on the device in turn."""
    job = Job(model=WanConfig(), latent=(21, 60, 104), device=device("H100"), training=False, fsdp2=False)
    assert 28.6e9 < plan_memory(job).moment("denoising").tensors < 41.3e9
    both = plan_memory(job.with_changes(experts=2))
    assert both.moment("denoising").parts["weights"] / GIB == pytest.approx(53.2, abs=0.3)


def test_planning_needs_no_torch() -> None:
    code = ("import sys, mindspeed_wan.cli.plan, mindspeed_wan.cli.main; from mindspeed_wan.cli.main import dispatch;"
            "dispatch(['plan', '--json', '--device', 'H200']); assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
