"""Planned times: published figures, identities that must hold, bytes against counted traffic."""

from __future__ import annotations

import pytest

from benchmarks.plan_accuracy import published
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.flops import forward_flops, training_flops
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import device
from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.traffic import Collective, collectives, ranks_per_node

EXPLAINED = {"32 x GB300, CP2, DDP", "8 x H100, FSDP2 (diffusers' model)"}
"""Off by more than 15 %, with the reason in the row's note."""


def a14b(dims: ParallelDims, **changes: object) -> Job:
    return Job(model=WanConfig(), latent=(21, 60, 104), device=device("H100"), dims=dims,
               encoders=False).with_changes(**changes)


def test_published_figures_that_nothing_was_fitted_to_are_met_within_fifteen_percent() -> None:
    rows = [row for row in published() if row["fitted"] is None]
    assert len(rows) >= 15
    off = {row["what"]: row["error"] for row in rows if abs(row["error"]) > 0.15}
    assert set(off) <= EXPLAINED, off
    assert all(row["note"] for row in rows if row["what"] in off)


def test_fitted_figures_are_reproduced() -> None:
    assert all(abs(row["error"]) < 0.02 for row in published() if row["fitted"])


def test_mfu_is_the_useful_work_over_peak() -> None:
    job = a14b(ParallelDims(world_size=8, context=4))
    time = plan_duration(job)
    useful = job.clips_per_step * training_flops(job.model, job.latent)
    assert time.mfu == pytest.approx(useful / time.step / (8 * 989e12))
    recomputing = plan_duration(job.with_changes(recomputed=40))
    assert recomputing.step > time.step and recomputing.mfu < time.mfu


def test_a_perfect_device_takes_the_arithmetic_time() -> None:
    perfect = device("H100", linear=1.0, attention=1.0, training=1.0, bandwidth=1e30)
    job = a14b(ParallelDims(), device=perfect, training=False, guidance=1)
    flops = forward_flops(job.model, job.latent)
    expected = (flops.total - flops.outside_blocks) / 989e12
    assert plan_duration(job).step == pytest.approx(expected, rel=1e-9)


def test_more_bandwidth_never_slows_a_job_down() -> None:
    job = a14b(ParallelDims(world_size=64, tensor=2, sequence_parallel=True, context=8))
    slow = job.with_changes(device=device("H100", inter=5e9))
    assert plan_duration(slow).step > plan_duration(job).step


def test_accumulation_repeats_the_pass_but_not_the_update() -> None:
    job = a14b(ParallelDims(world_size=8))
    one, four = plan_duration(job), plan_duration(job.with_changes(accumulation=4))
    assert four.parts["attention"] == pytest.approx(4 * one.parts["attention"])
    assert four.parts["optimizer"] == one.parts["optimizer"]
    assert four.clips_per_second > one.clips_per_second


def test_one_rank_sends_nothing() -> None:
    assert collectives(a14b(ParallelDims())) == []


def test_bytes_of_ulysses_and_ring_are_those_of_the_code() -> None:
    """Ulysses: q, k, v in one exchange, the output in another; ring: 2 (R-1) tensors forward, 4 (R-1) backward."""
    x = 32760 // 4 * 5120 * 2
    found = {(c.purpose, c.phase): c for c in collectives(a14b(ParallelDims(world_size=4, context=4)))}
    assert found["Ulysses: q, k, v to heads", "forward"].sent == 3 * x * 3 / 4
    assert found["Ulysses: output to tokens", "backward"].sent == x * 3 / 4
    ring = {c.phase: c for c in collectives(a14b(ParallelDims(world_size=4, context=4, ulysses=1)))
            if c.purpose.startswith("ring")}
    assert ring["forward"].sent * ring["forward"].calls == 2 * 3 * x
    assert ring["backward"].sent * ring["backward"].calls == 4 * 3 * x


def test_sequence_parallel_sends_what_all_reduce_sends() -> None:
    """An all-gather and a reduce-scatter are the two halves of an all-reduce."""
    def sent(sequence_parallel: bool) -> float:
        dims = ParallelDims(world_size=2, tensor=2, sequence_parallel=sequence_parallel)
        return sum(c.sent * c.calls for c in collectives(a14b(dims)) if c.purpose.startswith("tensor: ")
                   and "norm" not in c.purpose)

    assert sent(True) == sent(False) > 0


def test_lora_reduces_adapters_only() -> None:
    full = a14b(ParallelDims(world_size=8))
    lora = full.with_changes(lora_rank=16)
    reduce = [next(c for c in collectives(job) if c.kind == "reduce_scatter") for job in (full, lora)]
    assert reduce[1].payload < reduce[0].payload / 100


@pytest.mark.parametrize(("size", "stride", "expected"), [(8, 1, 8), (16, 1, 8), (4, 2, 4), (8, 4, 2), (4, 8, 1)])
def test_ranks_of_a_group_in_a_node(size: int, stride: int, expected: int) -> None:
    assert ranks_per_node(device("H100"), size, stride) == expected


def test_an_exchange_between_nodes_takes_the_slow_links() -> None:
    call = Collective("x", "all_to_all", 16, 1, 1e9, 1, "forward")
    inside = Collective("x", "all_to_all", 8, 1, 1e9, 1, "forward")
    h100 = device("H100")
    assert call.seconds(h100) == pytest.approx(1e9 * 8 / 16 / 50e9 / 0.8, rel=0.01)
    assert inside.seconds(h100) == pytest.approx(1e9 * 7 / 8 / 450e9 / 0.8, rel=0.01)
