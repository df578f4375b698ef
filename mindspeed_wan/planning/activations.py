"""What a training step keeps between forward and backward pass, bytes on one rank; read off the model's own code.

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

from mindspeed_wan.planning.job import Job

TRAVELLING_INPUTS = 2
"""Offloaded block inputs on the device: one is used while the other one travels."""


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
    """Bytes kept by embeddings, head and loss."""
    return embedding_activations(job) + head_activations(job)


def embedding_activations(job: Job) -> float:
    """Bytes kept by the embeddings: patches, and the text and time branches."""
    per_token = 0 if job.lora_rank else job.model.in_channels * job.model.patch_volume * job.element
    return job.local_tokens / job.sequence_parts * per_token + conditions(job)


def head_activations(job: Job) -> float:
    """Bytes kept by head and loss. The head normalises and projects in fp32; frozen, its norm keeps the input only."""
    per_token = (1 if job.lora_rank else 2) * 4 * job.model.dim
    return job.local_tokens / job.sequence_parts * per_token + 4.0 * job.model.out_channels * voxels(job)


def conditions(job: Job) -> float:
    """What the text and time branches keep until the very end: activations, and fp32 copies of bf16 time weights."""
    model, e = job.model, job.element
    rows = model.text_len * job.micro_batch
    if job.lora_rank:
        return float(rows * model.dim * e)  # the embedded text, input of every block's adapters
    text = rows * (model.text_dim + 3 * model.dim) * e
    time = 0 if e == 4 else 4 * (7 * model.dim * model.dim + model.dim * model.out_channels * model.patch_volume)
    return float(text + time)


def voxels(job: Job) -> int:
    frames, height, width = job.latent
    return frames * height * width * job.micro_batch


def saved_activations(job: Job) -> float:
    """Bytes kept between forward and backward: every block's, recomputed ones their input."""
    kept = job.model.num_layers - job.recomputed
    away = max(job.recomputed - TRAVELLING_INPUTS, 0) if job.offload else 0
    return kept * block_activations(job) + job.recomputed * recomputed_block(job) - away * block_input(job) \
        + outside_activations(job)
