"""Bytes on one rank at every moment of a step, by part. Every formula is read off the model's own code.

What a block keeps for its backward pass, with D hidden size, F feed-forward size, N heads of d channels, t tensor
ranks, n tokens of this context rank (n/t under sequence parallelism where marked *), e and r the bytes of a number in
the products and in the residual stream:

    residual stream and branch outputs   x, update, x, x, update        * n D (3 r + 2 e)
    inputs of the tensor regions         three                            n D 3 e
    self-attention                       q, k, v, out                     n D 4 e / t   (+ e / t: Ulysses' way back)
    cross-attention                      q, out                           n D 2 e / t
    before the q/k norms                 q, k, cross q                    n D 3 norm / t
    feed-forward                         before and after GELU            n F 2 e / t

``norm`` is e, but more where tensor parallelism computes the norm over all heads from fp32 copies. To these come the
rotation's table, statistics of norms and softmax, and the text's keys and values. A recomputed block keeps x alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.planning.job import Job

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
TRAVELLING_INPUTS = 2
"""Offloaded block inputs on the device: one is used while the other one travels."""
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
    """Return the moments of a training step, or of a generation."""
    moments = _training_moments(job) if job.training else _generation_moments(job)
    on_host = job.kernels == "cpu"
    return MemoryPlan(tuple(moments), 0.0 if on_host else RUNTIME_BYTES, 0.0 if on_host else FRAGMENTATION,
                      host_memory(job))


def host_memory(job: Job) -> float:
    """Bytes of page-locked host memory per device: offloaded block inputs and moments."""
    if not job.training:
        return 0.0
    inputs = job.recomputed * block_input(job) if job.offload else 0.0
    return inputs + (8.0 * job.trained.shard if job.states == "host" else 0.0)


# ---- saved for the backward pass ---------------------------------------------------------------------------------


def block_activations(job: Job) -> float:
    """Bytes one block keeps for its backward pass, its input x included."""
    model, e = job.model, job.element
    dim, tensor = model.dim, job.dims.tensor
    # A frozen gate (LoRA) needs no gradient, so the two branch outputs it multiplies are not kept.
    updates = 0 if job.lora_rank else 2 * e
    streams = dim * (2 * _saved_norm_input(job) + job.residual + updates) + _normed_copies(job) * dim * 4
    inside = 3 * dim * e + dim * e * (6 + (job.dims.ulysses_size > 1)) / tensor
    inside += 3 * dim * _saved_head_norm(job) / tensor + 2 * model.ffn_dim * e / tensor
    statistics = 3 * 8 + 3 * 4 + 2 * _softmax_bytes(job) * model.num_heads / tensor
    inside += 10 * job.lora_rank * e  # what A gives, of ten adapters
    n = job.local_tokens
    return n / job.sequence_parts * streams + n * (inside + _rotation_bytes(job) + statistics) + _text_activations(job)


def block_input(job: Job) -> float:
    """Bytes of the residual stream that enters a block."""
    return job.local_tokens / job.sequence_parts * job.model.dim * job.residual


def recomputed_block(job: Job) -> float:
    """Bytes a recomputed block keeps: its input, and with ``keep_attention`` what every attention operator gave.

    A ring runs the operator once per neighbour.
    """
    if not job.keep_attention:
        return block_input(job)
    one = (job.model.dim * job.element + _softmax_bytes(job) * job.model.num_heads) / job.dims.tensor
    return block_input(job) + (1 + job.dims.ring) * one * job.local_tokens


def _saved_norm_input(job: Job) -> int:
    """adaLN keeps its input; where the kernel wants fp32 and the stream is bf16, it keeps an fp32 copy instead."""
    fits = job.kernels == "cpu" and job.micro_batch == 1
    return job.residual if fits or job.residual == 4 else 4


def _normed_copies(job: Job) -> int:
    """adaLN's normalised fp32 input is kept where scale and shift are not the norm's own weights (per-clip values)."""
    return 2 if job.micro_batch > 1 or job.kernels == "npu" else 0


def _saved_head_norm(job: Job) -> int:
    """RMS norm keeps its input; over tensor ranks it keeps fp32 copies: of the input (bf16: two) and the quotient."""
    if job.dims.tensor == 1:
        return job.element
    return 8 if job.element == 4 else 12


def _softmax_bytes(job: Job) -> int:
    """Per head and token: the log-sum-exp, or the NPU kernel's maximum and sum, eight times each."""
    return 64 if job.kernels == "npu" else 4


def _rotation_bytes(job: Job) -> float:
    """Per token: the complex table of q and of k; the NPU's kernel keeps its fp32 inputs."""
    if job.kernels == "npu":
        return 8 * job.model.dim / job.dims.tensor
    return 8 * job.model.head_dim


def _text_activations(job: Job) -> float:
    rows = job.model.text_len * job.micro_batch
    keys = _saved_head_norm(job) + job.element
    return rows * job.model.dim * (keys + job.element) / job.dims.tensor


def outside_activations(job: Job) -> float:
    """Bytes kept by embeddings, head and loss; the head normalises and projects in fp32."""
    model, e = job.model, job.element
    per_token = 2 * 4 * model.dim + model.in_channels * model.patch_volume * e
    if job.lora_rank:
        per_token = 4 * model.dim  # frozen embeddings and head: the head's norm keeps its input
    velocity = 4 * model.out_channels * _voxels(job)
    return job.local_tokens / job.sequence_parts * per_token + velocity + _conditions(job)


def _conditions(job: Job) -> float:
    """What the text and time branches keep until the very end: activations, and fp32 copies of bf16 time weights."""
    model, e = job.model, job.element
    rows = model.text_len * job.micro_batch
    if job.lora_rank:
        return float(rows * model.dim * e)  # the embedded text, input of every block's adapters
    text = rows * (model.text_dim + 3 * model.dim) * e
    time = 0 if e == 4 else 4 * (7 * model.dim * model.dim + model.dim * model.out_channels * model.patch_volume)
    return float(text + time)


def _voxels(job: Job) -> int:
    frames, height, width = job.latent
    return frames * height * width * job.micro_batch


def saved_activations(job: Job) -> float:
    """Bytes kept between forward and backward: every block's, recomputed ones their input."""
    kept = job.model.num_layers - job.recomputed
    away = max(job.recomputed - TRAVELLING_INPUTS, 0) if job.offload else 0
    return kept * block_activations(job) + job.recomputed * recomputed_block(job) - away * block_input(job) \
        + outside_activations(job)


# ---- moments -----------------------------------------------------------------------------------------------------


def _state_parts(job: Job) -> dict[str, float]:
    """Return what is there between steps: fp32 weights (a frozen base in the compute type) and moments."""
    trained = job.trained.shard
    moment = {"device": 4.0, "host": 0.0, "bytes": BYTE_MOMENT}[job.states]
    parts = {"weights (fp32)": 4.0 * trained, "Adam moments": 2 * moment * trained}
    if job.lora_rank:
        parts["frozen weights"] = float(job.element * job.sizes.shard)
    if job.ema:
        parts["EMA"] = 4.0 * trained
    parts["rotary tables"] = job.local_tokens / job.micro_batch * job.model.head_dim * 8.0
    parts["batch"] = 4.0 * (job.model.in_channels + job.model.out_channels) * _voxels(job) \
        + 4.0 * job.micro_batch * job.model.text_len * job.model.text_dim
    return parts


def _gathered_parts(job: Job) -> dict[str, float]:
    """Whole parameters that FSDP2 has gathered: a block is used while the next one arrives."""
    if not job.wrapped:
        return {}
    sizes = job.sizes
    return {"gathered parameters": float((sizes.outside + sizes.head + 2 * sizes.block) * job.element)}


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
    states, gathered, gradients = _state_parts(job), _gathered_parts(job), 4.0 * job.trained.shard
    standing = gradients if job.accumulation > 1 else 0.0
    begin = {**states, **gathered, "activations": saved_activations(job), "gradients": standing,
             "temporaries": _head_temporaries(job)}
    last = {**states, **gathered, **_gradient_buffers(job), "temporaries": _block_temporaries(job),
            "activations": _activations_at_last_block(job),
            "gradients": standing or gradients * _share_of_later_blocks(job)}
    update = {**states, "gradients": gradients}
    temporaries = _update_temporaries(job)
    if temporaries:
        update["optimizer temporaries"] = temporaries
    moments = [Moment("backward begins", begin), Moment("backward of block 0", last), Moment("update", update)]
    if job.recomputed == job.model.num_layers:
        again = saved_activations(job) + block_activations(job) - recomputed_block(job) - outside_activations(job)
        moments.append(Moment("backward of the last block", {
            **begin, "activations": again, "temporaries": _block_temporaries(job)}))
    if job.encoders:
        moments += _encoding_moments(job, states)
    encoders = _resident_encoders(job)
    return [Moment(m.name, _present({**m.parts, **encoders})) for m in moments]


def _update_temporaries(job: Job) -> float:
    """fp32 copies of moments that live elsewhere, a batch at a time; one number per parameter of an unfused update.

    Encoding a moment works on one tensor at a time; the largest are the feed-forward's.
    """
    trained = job.trained.shard
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
    return block_activations(job) + _conditions(job)


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


def _generation_moments(job: Job) -> list[Moment]:
    sizes, e, model, n = job.sizes, job.element, job.model, job.local_tokens
    tensor = job.dims.tensor
    branches = job.guidance // job.cfg
    weights = {"weights": float(job.experts * sizes.shard * e)}
    context = job.experts * branches * model.num_layers * model.text_len * job.micro_batch * model.dim * 2 * e / tensor
    inside = 3 * model.dim * e + 2 * 4 * model.dim  # q, k, v of the attention and the rotation's fp32 copies
    widest = max(inside / tensor, (2 * model.ffn_dim / tensor + model.dim) * e)
    per_token = widest + (model.dim * (2 * job.residual + e + 4)) / job.sequence_parts
    denoise = {**weights, "text context": float(context), "activations": n * per_token,
               "latents": 6 * 4.0 * model.out_channels * _voxels(job), **_gathered_parts(job)}
    moments = [Moment("denoising", _present(denoise))]
    if job.encoders:
        vae = {"VAE": VAE_PARAMETERS * 4.0, **_vae_parts(job)}
        moments += [Moment("decoding video", {**weights, **vae}),
                    Moment("encoding text", {"text encoder": TEXT_ENCODER_PARAMETERS * e})]
    return moments


def _present(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}
