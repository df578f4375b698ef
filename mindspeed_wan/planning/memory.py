"""Bytes on one rank at every moment of a step, by part. Every formula is read off the model's own code.

``activations`` has what is kept for the backward pass. With pipeline stages every stage is planned for itself
(``stages`` says what it holds) and the largest one decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.planning.activations import (
    TRAVELLING_INPUTS,
    block_activations,
    block_input,
    conditions,
    embedding_activations,
    head_activations,
    outside_activations,
    recomputed_block,
    saved_activations,
    voxels,
)
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.stages import Stage, extra_rows, held, stages, under_way, wire_bytes

VAE_PIXEL_BYTES = 20e3
"""Working memory of the VAE per pixel of a frame, fp32 (measured: decoding 480x832 took 7.3 GiB beside the weights)."""
VAE_PARAMETERS = 127e6
TEXT_ENCODER_PARAMETERS = 5.68e9
"""UMT5-XXL's encoder."""
RUNTIME_BYTES = 1.5 * (1 << 30)
"""Context, library handles and communication buffers of an accelerator; nothing of it is a tensor."""
STATE_BATCH_BYTES = 256 << 20
"""State that is not on the device in fp32 comes there in batches of this size (training.optimizer.BATCH_BYTES)."""
STATE_BATCHES = {"host": 3, "bytes": 1}
"""Batches on the device at a time: one comes, one is updated, one goes; 8-bit moments are decoded one by one."""
BYTE_MOMENT = 1 + 4 / 256
"""Bytes of an 8-bit moment: its code, and a fp32 scale for 256 of them."""
ENCODING_BYTES = 46
"""Working memory of encoding one 8-bit moment, per element of the tensor at hand."""
ROTATION_BYTES = 16
"""Bytes per token and channel of a head: cosine and sine, and the complex table made of them."""
SOLVER_LATENTS = 8
"""Latents of a denoising step, fp32: the sample, both velocities, and what a multistep solver remembers."""
FRAGMENTATION = 0.04
"""Share of the allocator's memory that is lost between blocks (expandable segments on)."""


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, bytes by part; only parts that are there are listed."""

    name: str
    parts: dict[str, float]

    @property
    def tensors(self) -> float:
        """Bytes of all tensors."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The moments of a step; the largest decides."""

    moments: tuple[Moment, ...]
    runtime: float
    fragmentation: float
    host: float = 0.0
    """Page-locked host memory per device, bytes."""

    @property
    def peak(self) -> Moment:
        """The largest moment."""
        return max(self.moments, key=lambda moment: moment.tensors)

    @property
    def total(self) -> float:
        """Bytes a device needs."""
        return self.peak.tensors * (1 + self.fragmentation) + self.runtime

    def moment(self, name: str) -> Moment:
        """Return a moment by name."""
        return next(moment for moment in self.moments if moment.name == name)


def plan_memory(job: Job) -> MemoryPlan:
    """Return the moments of a training step (with pipeline stages: of the largest stage), or of a generation."""
    if job.dims.pipeline > 1:
        # The first stage has most blocks, most micro-batches under way, and the embeddings; the last one has the head.
        found = stages(job)
        return max((plan_stage(job, stage) for stage in (found[0], found[-1])), key=lambda plan: plan.total)
    moments = _training_moments(job) if job.training else _generation_moments(job)
    return _on_device(job, moments, host_memory(job))


def plan_stage(job: Job, stage: Stage) -> MemoryPlan:
    """Return the moments of a training step, or of a generation, on one pipeline stage."""
    if not job.training:
        return _on_device(job, _generation_moments(job, stage), host_memory(job, stage))
    alive = max(_under_way(job, stage), key=lambda counts: _stage_activations(job, stage, counts))
    inputs = _dot(alive, stage.recomputed(job.recomputed)) * block_input(job) if job.offload else 0.0
    moments_there = 8.0 * held(job.trained, stage) if job.states == "host" else 0.0
    return _on_device(job, _stage_moments(job, stage, alive), inputs + moments_there)


def _on_device(job: Job, moments: list[Moment], host: float) -> MemoryPlan:
    on_host = job.kernels == "cpu"
    return MemoryPlan(tuple(moments), 0.0 if on_host else RUNTIME_BYTES, 0.0 if on_host else FRAGMENTATION, host)


def host_memory(job: Job, stage: Stage | None = None) -> float:
    """Bytes of page-locked host memory per device: offloaded block inputs and moments, a generation's experts."""
    if not job.training:
        expert = job.base_bytes.shard if stage is None else held(job.base_bytes, stage)
        blocks = job.model.num_layers * job.base_bytes.block
        return float(job.experts_of_model * (blocks if job.experts == 0 else expert if job.takes_turns else 0))
    inputs = job.recomputed * block_input(job) if job.offload else 0.0
    return inputs + (8.0 * job.trained.shard if job.states == "host" else 0.0)


# ---- moments -----------------------------------------------------------------------------------------------------


def _state_parts(job: Job, stage: Stage | None = None) -> dict[str, float]:
    """Return what is there between steps: fp32 weights (a frozen base in its own type) and moments.

    A pipeline stage computes with bf16 parameters of its own beside the fp32 masters, and holds all micro-batches.
    """
    trained = job.trained.shard if stage is None else held(job.trained, stage)
    moment = {"device": 4.0, "host": 0.0, "bytes": BYTE_MOMENT}[job.states]
    parts = {"weights (fp32)": 4.0 * trained, "Adam moments": 2 * moment * trained}
    if job.lora_rank:
        parts["frozen weights"] = float(job.base_bytes.shard if stage is None else held(job.base_bytes, stage))
    elif stage is not None and job.precision == "bf16":
        parts["weights (bf16)"] = 2.0 * trained
    if job.ema:
        parts["EMA"] = 4.0 * trained
    parts["rotary tables"] = job.local_tokens / job.micro_batch * job.model.head_dim * 8.0
    batch = 4.0 * (job.model.in_channels + job.model.out_channels) * voxels(job) \
        + 4.0 * job.micro_batch * job.model.text_len * job.model.text_dim
    parts["batch"] = batch * (1 if stage is None else job.accumulation)
    return parts


def _gathered_parts(job: Job) -> dict[str, float]:
    """Whole parameters that FSDP2 has gathered: a block is used while the next one arrives.

    A generation gathers it ahead, which takes the buffer it arrives in besides.
    """
    if not job.wrapped:
        return {}
    sizes, blocks = job.base_bytes, 2 if job.training else 3
    return {"gathered parameters": float(sizes.outside + sizes.head + blocks * sizes.block)}


def _decoded_layer(job: Job) -> dict[str, float]:
    """An 8-bit layer is decoded while it runs; the feed-forward's are the largest."""
    largest = job.model.dim * job.model.ffn_dim / job.dims.tensor
    return {"decoded weights": largest * job.element} if job.base else {}


def _gradient_buffers(job: Job) -> dict[str, float]:
    """One block's gradients in the compute type, and the fp32 buffer in which they are reduced."""
    return {"gradient buffers": float(job.trained.block * (job.element + 4))} if job.wrapped else {}


def _head_temporaries(job: Job) -> float:
    """Gradients of the head's norm, fp32: the first thing a backward pass makes."""
    return 2 * 4.0 * job.local_tokens / job.sequence_parts * job.model.dim


def _block_temporaries(job: Job) -> float:
    """Gradients that flow inside a block: of the residual stream, and of the feed-forward's hidden channels."""
    model, e, n = job.model, job.element, job.local_tokens
    return n / job.sequence_parts * model.dim * (job.residual + 4) + n * model.ffn_dim * e / job.dims.tensor


def _training_moments(job: Job) -> list[Moment]:
    states, gradients = _state_parts(job), 4.0 * job.trained.shard
    gathered = {**_gathered_parts(job), **_decoded_layer(job)}
    standing = gradients if job.accumulation > 1 else 0.0
    begin = {**states, **gathered, "activations": saved_activations(job), "gradients": standing,
             "temporaries": _head_temporaries(job)}
    last = {**states, **gathered, **_gradient_buffers(job), "temporaries": _block_temporaries(job),
            "activations": _activations_at_last_block(job),
            "gradients": standing or gradients * _share_of_later_blocks(job)}
    update = {**states, "gradients": gradients}
    update["optimizer temporaries"] = _update_temporaries(job, job.trained.shard)
    moments = [Moment("backward begins", begin), Moment("backward of block 0", last), Moment("update", update)]
    if job.recomputed == job.model.num_layers:
        again = saved_activations(job) + block_activations(job) - recomputed_block(job) - outside_activations(job)
        moments.append(Moment("backward of the last block", {
            **begin, "activations": again, "temporaries": _block_temporaries(job)}))
    return _with_encoders(job, moments, states)


def _with_encoders(job: Job, moments: list[Moment], states: dict[str, float]) -> list[Moment]:
    if job.encoders:
        moments = [*moments, *_encoding_moments(job, states)]
    encoders = _resident_encoders(job)
    return [Moment(m.name, _present({**m.parts, **encoders})) for m in moments]


def _under_way(job: Job, stage: Stage) -> tuple[tuple[int, ...], ...]:
    return under_way(job.dims.pipeline, job.dims.virtual, job.accumulation, stage.number)


def _dot(counts: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    return sum(count * size for count, size in zip(counts, sizes))


def _stage_activations(job: Job, stage: Stage, alive: tuple[int, ...]) -> float:
    """Bytes kept by ``alive[c]`` micro-batches of chunk c: their blocks', what arrived with them, both ends'."""
    again = _dot(alive, stage.recomputed(job.recomputed))
    away = max(again - TRAVELLING_INPUTS, 0) if job.offload else 0
    kept = (_dot(alive, stage.chunks) - again) * block_activations(job)
    ends = alive[0] * embedding_activations(job) * stage.first + alive[-1] * head_activations(job) * stage.last
    arrived = sum(alive) * extra_rows(job) * job.model.dim * job.residual
    return kept + again * recomputed_block(job) - away * block_input(job) + ends + arrived


def _stage_moments(job: Job, stage: Stage, alive: tuple[int, ...]) -> list[Moment]:
    """The fullest moment of the schedule, a forward pass just ended and a backward pass begins; and the update."""
    states, trained = _state_parts(job, stage), held(job.trained, stage)
    gradients, recomputed = 4.0 * trained, stage.recomputed(job.recomputed)
    activations = _stage_activations(job, stage, alive)
    if any(again == size for again, size in zip(recomputed, stage.chunks)):
        activations += block_activations(job) - recomputed_block(job)
    temporaries = max(_block_temporaries(job), _head_temporaries(job) if stage.last else 0.0)
    backward = {**states, **_decoded_layer(job), "activations": activations, "temporaries": temporaries,
                "gradients": gradients if job.accumulation > 1 else 0.0}
    update = {**states, "gradients": gradients, "optimizer temporaries": _update_temporaries(job, trained)}
    return _with_encoders(job, [Moment("backward, most micro-batches under way", backward), Moment("update", update)],
                          states)


def _update_temporaries(job: Job, trained: float) -> float:
    """fp32 copies of moments that live elsewhere, a batch at a time; one number per parameter of an unfused update.

    Encoding a moment works on one tensor at a time; the largest are the feed-forward's.
    """
    unfused = 0.0 if job.fused_optimizer else 4.0 * trained
    if job.states == "device":
        return unfused
    batch = min(8.0 * trained, STATE_BATCHES[job.states] * STATE_BATCH_BYTES)
    if job.states == "host":
        return batch + min(unfused, STATE_BATCH_BYTES / 2)
    largest = trained if job.lora_rank else job.model.dim * job.model.ffn_dim / job.dims.tensor
    shard = job.dims.shard_size if job.fsdp2 else 1
    return batch + max(min(unfused, STATE_BATCH_BYTES / 2), ENCODING_BYTES * min(largest / shard, trained))


def _activations_at_last_block(job: Job) -> float:
    """Block 0 is whole (kept or recomputed); later blocks are gone, and so is the head."""
    return block_activations(job) + conditions(job)


def _share_of_later_blocks(job: Job) -> float:
    """Share of the gradients that exist when block 0's activations are whole: all but its own and the embeddings'."""
    trained = job.trained
    return 1.0 - (trained.block + trained.outside) / trained.whole if trained.whole else 0.0


def _resident_encoders(job: Job) -> dict[str, float]:
    if not job.encoders:
        return {}
    parts = {"VAE": VAE_PARAMETERS * job.element}
    if not job.text_encoder_on_host:
        parts["text encoder"] = TEXT_ENCODER_PARAMETERS * job.element
    return parts


def _encoding_moments(job: Job, states: dict[str, float]) -> list[Moment]:
    text = {} if not job.text_encoder_on_host else {"text encoder": TEXT_ENCODER_PARAMETERS * job.element}
    return [Moment("encoding text", {**states, **text}), Moment("encoding video", {**states, **_vae_parts(job)})]


def _vae_parts(job: Job) -> dict[str, float]:
    frames, height, width = job.latent
    pixels = 64 * height * width
    video = 3 * 4.0 * pixels * (4 * frames - 3)
    return {"VAE working memory": VAE_PIXEL_BYTES * pixels * job.element / 4, "video": video}


def _generation_moments(job: Job, stage: Stage | None = None) -> list[Moment]:
    """Return the moments of a generation, on one pipeline stage where there are stages."""
    weights = {"weights": _generation_weights(job, stage)}
    denoise = {**weights, **_gathered_parts(job), **_decoded_layer(job), **_denoising_parts(job, stage)}
    moments = [Moment("denoising", _present(denoise))]
    if job.encoders:
        vae = {"VAE": VAE_PARAMETERS * 4.0, **_vae_parts(job)}
        moments += [Moment("decoding video", {**weights, **vae}),
                    Moment("encoding text", {"text encoder": TEXT_ENCODER_PARAMETERS * job.element})]
    return moments


def _generation_weights(job: Job, stage: Stage | None) -> float:
    """All experts, the one in use, or two blocks of it beside what is outside the blocks of all."""
    sizes = job.base_bytes
    if job.experts == 0:
        return float(job.experts_of_model * (sizes.outside + sizes.head) + 2 * sizes.block)
    return float(job.experts * (sizes.shard if stage is None else held(sizes, stage)))


def _denoising_parts(job: Job, stage: Stage | None) -> dict[str, float]:
    """Return what a step holds beside weights: the prompts' keys and values, a block's tensors, the solver's latents.

    Stages add what they send and receive, PipeFusion the keys and values of its blocks for all tokens.
    """
    model, e, n, tensor = job.model, job.element, job.local_tokens, job.dims.tensor
    blocks = model.num_layers if stage is None else stage.blocks
    keys_and_values = job.branches * blocks * 2 * model.dim * e / tensor
    inside = 3 * model.dim * e + 2 * 4 * model.dim  # q, k, v of the attention and the rotation's fp32 copies
    if job.dims.ring > 1:  # two chunks of keys and values; two partial results in fp32, and both weighted
        inside = 3 * model.dim * e + 4 * model.dim * e + 4 * 4 * model.dim
    widest = max(inside / tensor, (2 * model.ffn_dim / tensor + model.dim) * e)
    per_token = widest + (model.dim * (2 * job.residual + e + 4)) / job.sequence_parts
    parts = {"text context": keys_and_values * model.text_len * job.micro_batch, "activations": n * per_token,
             "rotary tables": n * model.head_dim * ROTATION_BYTES,
             "latents": SOLVER_LATENTS * 4.0 * model.out_channels * voxels(job),
             "text": job.guidance * 4.0 * model.text_len * model.text_dim * job.micro_batch}
    if stage is not None:
        parts["between stages"] = wire_bytes(job) * (not stage.first) + \
            wire_bytes(job) * (not stage.last) * (job.branches - 1)
    if job.patches > 1:  # those of the block at hand are counted as its own
        parts["PipeFusion's keys and values"] = (keys_and_values - 2 * model.dim * e / tensor) * n
    return parts


def _present(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}
