"""Seconds of a training step or of a generation: compute, what communication cannot hide, and MFU.

Compute is matrix products and attention at the device's fitted share of its peak, plus the bytes that norms, rotation,
GELU and residual additions move. The backward pass is two forwards for products and 2.5 for fused attention, which
computes its scores again. Tensor and Ulysses collectives stand in the way of the next product; a ring hides behind
attention; FSDP2 hides behind the block that runs meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mindspeed_wan.models.wan.flops import forward_flops, training_flops
from mindspeed_wan.planning.activations import block_input
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import TEXT_ENCODER_PARAMETERS
from mindspeed_wan.planning.stages import most_trained, on_a_rank
from mindspeed_wan.planning.traffic import Collective, collectives

ATTENTION_BACKWARD = 2.5
UPDATE_BYTES = 40
"""Memory traffic of AdamW and gradient clipping per trained parameter."""
ENCODING_TRAFFIC = 120
"""Memory traffic of decoding and encoding both 8-bit moments, per parameter (passes counted, not fitted)."""
HOST_LINK = 25e9
"""Bytes per second between a device and page-locked host memory: what PCIe 4 x16 reaches; PCIe 5 has twice that."""
STATE_TRAVEL = 16
"""Bytes that offloaded moments travel per parameter and step: two of 4 bytes, there and back, on one stream."""
VAE_FLOPS_PER_PIXEL = 9.1e7
"""Decoding one pixel of one frame, as FLOP at the device's peak (SGLang: 720x1280x81 takes 6.9 s on an H100)."""
VAE_ENCODE_SHARE = 0.5
"""Encoding against decoding (half the layers at full resolution)."""
OVERLAP_COST = 0.15
"""Share of hidden communication that shows anyway: it competes for memory and cores. An assumption, not a fit."""
RING_MERGE_BYTES = 12
"""Memory traffic per channel of one merge of partial attention results in fp32 (twice that in the backward pass)."""
RANK_SPREAD = 0.005
"""Standard deviation of one rank's step time over ranks: a step waits for the slowest. An assumption, not a fit."""


@dataclass(frozen=True)
class Duration:
    """Seconds by part, and what they mean.

    ``step`` is one optimizer step, or one denoising step of a generation; ``total`` a whole generation.
    """

    parts: dict[str, float]
    mfu: float
    clips_per_second: float
    steps: int = 1
    once: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """Seconds of all steps and what is done once (text encoder, VAE)."""
        return self.step * self.steps + self.once

    @property
    def exposed(self) -> float:
        """Seconds of a step in which communication is all that happens."""
        return sum(seconds for name, seconds in self.parts.items() if name.startswith("exposed"))


@dataclass(frozen=True)
class _Pass:
    """One block, one direction: seconds of attention, of everything else, and of exposed collectives."""

    attention: float
    other: float
    exposed: dict[str, float]

    @property
    def compute(self) -> float:
        return self.attention + self.other


def plan_duration(job: Job) -> Duration:
    """Return the time of one step of ``job``."""
    return _training(job) if job.training else _generation(job)


# ---- one block -----------------------------------------------------------------------------------------------------


def _forward_compute(job: Job) -> tuple[float, float]:
    """Return seconds of (attention, everything else) of one block's forward pass on one rank."""
    flops, device, layers = forward_flops(job.model, job.latent), job.device, job.model.num_layers
    share = job.micro_batch / layers / (job.dims.tensor * job.dims.context)
    attention = (flops.self_attention + flops.cross_attention) * share / (device.peak_flops * device.attention)
    linear = flops.linear * share / (device.peak_flops * device.linear)
    return attention, linear + (_elementwise_bytes(job) + _decoded_bytes(job)) / device.bandwidth


def _decoded_bytes(job: Job) -> float:
    """A block's 8-bit layers are read, written in the compute type, and read again by the products."""
    return job.sizes.block * (1.0 + job.element) if job.base else 0.0


def _elementwise_bytes(job: Job) -> float:
    """Three norms, three residual additions on this rank's tokens; q/k norms, rotation, GELU, merges on its heads."""
    dim, e, r, tensor = job.model.dim, job.element, job.residual, job.dims.tensor
    streams = dim * (3 * (r + e) + 3 * (2 * r + e))
    merges = dim * RING_MERGE_BYTES * (job.dims.ring - 1)
    heads = (dim * (3 + 2) * 2 * e + job.model.ffn_dim * 2 * e + merges) / tensor
    return job.local_tokens * (streams / job.sequence_parts + heads)


def _exposed(job: Job, found: Iterable[Collective], attention: float, other: float) -> dict[str, float]:
    """Return the seconds of one block's collectives that nothing hides, by who causes them."""
    seconds = {"exposed tensor": 0.0, "exposed context": 0.0, "exposed FSDP2": 0.0}
    ring = fsdp2 = 0.0
    for collective in found:
        time = collective.seconds(job.device) * collective.calls
        if collective.hidden == "attention":
            ring += time
        elif collective.hidden == "block":
            fsdp2 += time
        else:
            seconds["exposed tensor" if collective.purpose.startswith("tensor") else "exposed context"] += time
    seconds["exposed context"] += _not_hidden(ring, attention * (job.dims.ring - 1) / job.dims.ring)
    covered = attention + other + seconds["exposed tensor"] + seconds["exposed context"]
    seconds["exposed FSDP2"] = _not_hidden(fsdp2, covered)
    return seconds


def _not_hidden(communication: float, work: float) -> float:
    return max(communication - work, OVERLAP_COST * communication)


def _forward(job: Job, found: list[Collective]) -> _Pass:
    attention, other = _forward_compute(job)
    scale = job.device.training if job.training else 1.0
    attention, other = attention / scale, other / scale
    mine = [c for c in found if c.phase == "forward" and c.per_block]
    return _Pass(attention, other, _exposed(job, mine, attention, other))


def _backward(job: Job, found: list[Collective], *, recomputed: bool) -> _Pass:
    forward = _forward_compute(job)
    again = 1.0 if recomputed else 0.0
    attention = forward[0] * (ATTENTION_BACKWARD + (0.0 if job.keep_attention else again)) / job.device.training
    # Frozen weights (LoRA) need the gradient of their input only.
    other = forward[1] * ((1.0 if job.lora_rank else 2.0) + again) / job.device.training
    mine = [c for c in found if c.phase == "backward" and c.per_block]
    if recomputed:
        mine += [c for c in found if c.phase == "forward" and c.per_block and c.hidden != "block"]
    return _Pass(attention, other, _exposed(job, mine, attention, other))


# ---- whole steps -----------------------------------------------------------------------------------------------------


def _training(job: Job) -> Duration:
    found, layers = collectives(job), job.blocks
    passes = [(_forward(job, found), layers), (_backward(job, found, recomputed=False), layers - job.recomputed),
              (_backward(job, found, recomputed=True), job.recomputed)]
    parts = _sum_passes(passes, job.accumulation)
    parts["exposed offload"] = job.accumulation * _exposed_offload(job, passes[0][0], passes[2][0])
    parts["exposed pipeline"], parts["pipeline bubble"] = _pipeline(job, found, sum(parts.values()))
    once = [c for c in found if not c.per_block and not c.between_stages]
    parts["exposed gradients"] = sum(c.seconds(job.device) * c.calls * (1 if c.phase == "step" else job.accumulation)
                                     for c in once)
    parts["optimizer"] = _optimizer(job)
    if job.encoders:
        parts["encoders"] = job.accumulation * job.micro_batch * (
            _text_seconds(job) + VAE_ENCODE_SHARE * _vae_seconds(job))
    parts["waiting for the slowest"] = _waiting(job, sum(parts.values()))
    step = sum(parts.values())
    # A frozen base has no weight gradients: two of the three passes' worth, as the training log counts it.
    useful = job.clips_per_step * training_flops(job.model, job.latent) * (2 / 3 if job.lora_rank else 1.0)
    mfu = useful / step / (job.device.peak_flops * job.dims.world_size)
    return Duration(parts, mfu, job.clips_per_step / step)


def _pipeline(job: Job, found: Iterable[Collective], work: float) -> tuple[float, float]:
    """Return the seconds of a step that stages wait for what others send, and for the first and last micro-batch.

    1F1B sends between passes; with virtual chunks the sends run beside the next chunk.
    """
    dims = job.dims
    if dims.pipeline == 1:
        return 0.0, 0.0
    sent = job.accumulation * sum(c.seconds(job.device) * c.calls for c in found if c.between_stages)
    sent = _not_hidden(sent, work) if dims.virtual > 1 else sent
    return sent, (work + sent) / job.accumulation * (dims.pipeline - 1) / dims.virtual


def _exposed_offload(job: Job, forward: _Pass, backward: _Pass) -> float:
    """Return what a block's computation does not hide of its input's way to the host and back."""
    if not job.offload:
        return 0.0
    travel = block_input(job) / HOST_LINK
    return job.recomputed * sum(_not_hidden(travel, one.compute) for one in (forward, backward))


def _optimizer(job: Job) -> float:
    """Return the seconds of the update; offloaded state is copied beside it, on a link that is slower by far."""
    traffic = UPDATE_BYTES + (ENCODING_TRAFFIC if job.states == "bytes" else 0)
    trained = most_trained(job)
    update = traffic * trained / job.device.bandwidth
    return update if job.states != "host" else max(update, STATE_TRAVEL * trained / HOST_LINK)


def _generation(job: Job) -> Duration:
    found, branches = collectives(job), job.branches
    block = _forward(job, found)
    parts = _sum_passes([(block, job.blocks)], branches)
    if job.experts == 0:
        travel = job.base_bytes.block / HOST_LINK
        parts["exposed streaming"] = branches * job.blocks * _not_hidden(travel, block.compute)
    parts.update(_stages_of_generation(job, found, sum(parts.values()) / branches))
    parts["exposed output"] = branches * sum(c.seconds(job.device) * c.calls for c in found
                                             if not c.per_block and not c.between_stages)
    parts["waiting for the slowest"] = _waiting(job, sum(parts.values()))
    once = job.micro_batch * (_vae_seconds(job) + _text_seconds(job)) if job.encoders else 0.0
    if job.takes_turns:  # to the low-noise expert, and back for the next video
        once += 2 * on_a_rank(job, job.base_bytes) / HOST_LINK
    videos = job.micro_batch * job.dims.data / job.cfg
    step = sum(parts.values())
    useful = videos * job.guidance * forward_flops(job.model, job.latent).total
    mfu = useful / step / (job.device.peak_flops * job.dims.world_size)
    return Duration(parts, mfu, videos / (step * job.steps + once), job.steps, once)


def _stages_of_generation(job: Job, found: Iterable[Collective], one_pass: float) -> dict[str, float]:
    """Return the seconds of a step that stages wait for each other, the mean over whole and patched steps.

    The passes of both guidance branches follow each other through the stages, so the last stage begins p - 1 passes
    late; with PipeFusion p - 1 patches, but each of the patches decodes 8-bit weights and starts its collectives anew.
    """
    if job.dims.pipeline == 1:
        return {}
    hop = sum(c.seconds(job.device) for c in found if c.between_stages)
    late, whole = job.dims.pipeline - 1, job.whole_steps / job.steps
    again = (job.patches - 1) * _per_patch(job, found)
    patched = (one_pass + again) / job.patches
    parts = {"pipeline bubble": late * (whole * one_pass + (1 - whole) * patched),
             "exposed pipeline": late * hop * (whole + (1 - whole) / job.patches)}
    return {**parts, "repeated by patches": (1 - whole) * job.branches * again} if job.patches > 1 else parts


def _per_patch(job: Job, found: Iterable[Collective]) -> float:
    """Return the seconds of a stage's pass that do not get shorter with fewer tokens."""
    latencies = sum(c.latency(job.device) * c.calls for c in found if c.per_block and c.hidden is None)
    return job.blocks * (_decoded_bytes(job) / job.device.bandwidth + latencies)


def _sum_passes(passes: list[tuple[_Pass, int]], repeats: float) -> dict[str, float]:
    parts = {"attention": sum(p.attention * n for p, n in passes), "other compute": sum(p.other * n for p, n in passes)}
    for name in passes[0][0].exposed:
        parts[name] = sum(p.exposed[name] * n for p, n in passes)
    return {name: seconds * repeats for name, seconds in parts.items()}


def _waiting(job: Job, seconds: float) -> float:
    """The expected maximum of N independent normal step times lies sqrt(2 ln N) deviations above their mean."""
    ranks = job.dims.world_size
    return seconds * RANK_SPREAD * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 0.0


def _text_seconds(job: Job) -> float:
    flops = 2.0 * TEXT_ENCODER_PARAMETERS * job.model.text_len
    return flops / (job.device.peak_flops * job.device.linear)


def _vae_seconds(job: Job) -> float:
    frames, height, width = job.latent
    return VAE_FLOPS_PER_PIXEL * (4 * frames - 3) * 64 * height * width / job.device.peak_flops
