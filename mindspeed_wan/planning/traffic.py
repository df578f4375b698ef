"""What a step sends: every kind of collective with its bytes, its group, and the links that group spans.

Ranks are numbered as ``ParallelDims`` says (tensor fastest, then Ulysses, ring, data), so a group is ``size`` ranks
``stride`` apart. Bytes are the payload of one call on one rank: the whole tensor for gathers, reductions and
exchanges, what is passed on for a ring or to the next pipeline stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mindspeed_wan.planning.activations import voxels
from mindspeed_wan.planning.devices import Device
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.stages import most_trained, wire_bytes

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "hop"]
Phase = Literal["forward", "backward", "step"]

LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach (NCCL and HCCL bus bandwidth against the data sheet)."""
LATENCY_INTRA = 12e-6
"""Seconds of one collective inside a node, however small."""
LATENCY_INTER = 25e-6
"""Seconds added per doubling of the nodes in a group."""


@dataclass(frozen=True)
class Collective:
    """One kind of call.

    Attributes:
        purpose: what it does, for tables.
        size, stride: its group.
        payload: bytes of one call on one rank.
        calls: calls per phase and block (``per_block``), or per phase.
        phase: when: forward, backward, or once per step.
        hidden: behind which work it can run: ``attention`` (a ring), ``block`` (FSDP2), or nothing.
    """

    purpose: str
    kind: Kind
    size: int
    stride: int
    payload: float
    calls: int
    phase: Phase
    per_block: bool = True
    hidden: Literal["attention", "block"] | None = None

    @property
    def between_stages(self) -> bool:
        """It passes a micro-batch from stage to stage."""
        return self.kind == "hop"

    @property
    def sent(self) -> float:
        """Bytes that leave this rank in one call."""
        if self.kind in ("send", "hop", "broadcast"):
            return self.payload
        share = (self.size - 1) / self.size
        return self.payload * share * (2 if self.kind == "all_reduce" else 1)

    def latency(self, device: Device) -> float:
        """Return the time of one call without data."""
        nodes = self._nodes(device)
        return LATENCY_INTRA + (LATENCY_INTER * math.log2(nodes) if nodes > 1 else 0.0)

    def _nodes(self, device: Device) -> int:
        return math.ceil(self.size / ranks_per_node(device, self.size, self.stride))

    def seconds(self, device: Device) -> float:
        """Return the time of one call."""
        here, nodes, latency = ranks_per_node(device, self.size, self.stride), self._nodes(device), self.latency(device)
        if self.kind == "hop":  # one rank to one rank: the slowest pair has one adapter
            return latency + self.payload / (device.intra if nodes == 1 else device.inter) / LINK_SHARE
        if self.kind == "all_to_all":
            inside = self.payload * (here - 1) / self.size / device.intra
            outside = self.payload * (self.size - here) / self.size / device.inter
            return latency + max(inside, outside) / LINK_SHARE
        # A ring over k ranks of each node leaves the node through k adapters.
        speed = device.intra if nodes == 1 else min(device.intra, here * device.inter)
        return latency + self.sent / speed / LINK_SHARE


def ranks_per_node(device: Device, size: int, stride: int) -> int:
    """Return how many ranks of a group share a node."""
    return max(1, min(size, device.per_node // stride))


def collectives(job: Job) -> list[Collective]:
    """Return every kind of collective of one micro-batch (forward, backward) and of one step; empty on one rank."""
    return [c for c in (*_tensor(job), *_context(job), *_fsdp2(job), *_pipeline(job),
                      *_gradients(job)) if c.size > 1]


def _phases(job: Job) -> tuple[Phase, ...]:
    return ("forward", "backward") if job.training else ("forward",)


def _tensor(job: Job) -> list[Collective]:
    dims, tokens = job.dims, job.local_tokens
    size, hidden = dims.tensor, float(tokens * job.model.dim * job.element)
    found = []
    for phase in _phases(job):
        if dims.sequence_parallel:
            found += [
                Collective("tensor: gather tokens", "all_gather", size, 1, hidden, 3, phase),
                Collective("tensor: scatter sums", "reduce_scatter", size, 1, hidden, 3, phase),
            ]
        else:
            found.append(Collective("tensor: add parts", "all_reduce", size, 1, hidden, 3, phase))
        found.append(Collective("tensor: norm over all heads", "all_reduce", size, 1, 4.0 * 2 * tokens, 3, phase))
    return found


def _context(job: Job) -> list[Collective]:
    dims = job.dims
    heads = float(job.local_tokens * job.model.dim * job.element) / dims.tensor
    found = []
    for phase in _phases(job):
        ulysses = (dims.ulysses_size, dims.tensor)
        found += [
            Collective("Ulysses: q, k, v to heads", "all_to_all", *ulysses, 3 * heads, 1, phase),
            Collective("Ulysses: output to tokens", "all_to_all", *ulysses, heads, 1, phase),
        ]
        passes = (2 if phase == "forward" else 4) * (dims.ring - 1)
        found.append(Collective("ring: keys and values", "send", dims.ring, dims.tensor * dims.ulysses_size, heads,
                                passes, phase, hidden="attention"))
    velocity = 4.0 * job.tokens * job.micro_batch * job.model.out_channels * job.model.patch_volume
    found.append(Collective("context: gather the output", "all_gather", dims.context, dims.tensor, velocity, 1,
                            "forward", per_block=False))
    return found


def _fsdp2(job: Job) -> list[Collective]:
    if not job.wrapped:
        return []
    group = (job.dims.shard_size if job.fsdp2 else 1, job.dims.tensor)
    parameters, trained = float(job.base_bytes.block), 4.0 * job.trained.block
    found = [Collective("FSDP2: gather a block", "all_gather", *group, parameters, 1, phase, hidden="block")
             for phase in _phases(job)]
    if job.training:
        copies = job.dims.data * job.dims.context // group[0]
        found.append(Collective("FSDP2: reduce a block's gradients", "reduce_scatter", *group, trained, 1, "backward",
                                hidden="block"))
        found.append(Collective("FSDP2: add the replicas' gradients", "all_reduce", copies, group[0] * group[1],
                                trained / group[0], 1, "backward", hidden="block"))
    return found


def _pipeline(job: Job) -> list[Collective]:
    """A stage in the middle, per micro-batch: every chunk sends its output on, and its input's gradient back.

    In a generation the last stage gives all stages the velocities of a step.
    """
    dims = job.dims
    shared = [] if job.training else [
        Collective("pipeline: share the velocities", "broadcast", dims.pipeline, dims.stage_ranks,
                   4.0 * job.model.out_channels * voxels(job), 1, "forward", per_block=False)]
    names = {"forward": "pipeline: to the next stage", "backward": "pipeline: back to the one before"}
    return [Collective(names[phase], "hop", dims.pipeline, dims.stage_ranks, wire_bytes(job), dims.virtual, phase,
                       per_block=False) for phase in _phases(job)] + shared


def bytes_between_stages(job: Job) -> float:
    """Return the bytes that one rank of a stage in the middle sends to other stages in one step."""
    passes = job.accumulation if job.training else job.branches
    return passes * sum(c.sent * c.calls for c in collectives(job) if c.between_stages)


def _gradients(job: Job) -> list[Collective]:
    """Without FSDP2's hooks gradients are reduced after the backward pass, in the open."""
    if not job.training:
        return []
    dims, found = job.dims, []
    whole = job.trained.whole if dims.pipeline == 1 else most_trained(job)
    if not job.wrapped:
        found.append(Collective("data: average gradients", "all_reduce", dims.data * dims.context, dims.tensor,
                                4.0 * whole, 1, "step", per_block=False))
    everyone = dims.world_size
    found.append(Collective("loss, gradient norm", "all_reduce", everyone, 1, 12.0, 3, "step", per_block=False))
    return found
