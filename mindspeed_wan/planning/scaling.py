"""Weak and strong scaling of a layout, simulated: the same formulas at growing numbers of devices.

Weak: every model-parallel group keeps its clips, the global batch grows. Strong: the global batch stays, so gradient
accumulation shrinks until every data rank has one micro-batch left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import plan_memory

Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class ScalingRow:
    """One number of devices; ``efficiency`` is clips per second and device against the first row."""

    devices: int
    global_batch: int
    step_seconds: float
    clips_per_second: float
    mfu: float
    efficiency: float
    memory: float
    exposed_share: float


def scaling(job: Job, limit: int, mode: Mode) -> list[ScalingRow]:
    """Return the layout at its own size and every doubling up to ``limit`` devices.

    A sharding size over all data x context ranks grows with them; a fixed one makes replicas.
    """
    rows: list[ScalingRow] = []
    batch, devices = job.clips_per_step, job.dims.world_size
    while devices <= limit:
        grown = _grow(job, devices, batch if mode == "strong" else None)
        if grown is None:
            break
        rows.append(_row(grown, rows[0] if rows else None))
        devices *= 2
    return rows


def _grow(job: Job, devices: int, batch: int | None) -> Job | None:
    shard = None if job.dims.replicas == 1 else job.dims.shard_size
    dims = replace(job.dims, world_size=devices, shard=shard if job.fsdp2 else 1)
    if batch is None:
        return job.with_changes(dims=dims)
    per_pass = job.micro_batch * dims.data
    if batch % per_pass or (dims.virtual > 1 and batch // per_pass % dims.pipeline):
        return None
    return job.with_changes(dims=dims, accumulation=batch // per_pass)


def _row(job: Job, first: ScalingRow | None) -> ScalingRow:
    time = plan_duration(job)
    per_device = time.clips_per_second / job.dims.world_size
    base = first.clips_per_second / first.devices if first else per_device
    return ScalingRow(job.dims.world_size, job.clips_per_step, time.step, time.clips_per_second, time.mfu,
                      per_device / base, plan_memory(job).total, time.exposed / time.step)
