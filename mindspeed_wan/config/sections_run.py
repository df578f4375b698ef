"""Sections about how it is trained: ranks, optimizer, pace, checkpoints, FSDP2, logging, LoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mindspeed_wan.config.base import (
    Attention,
    ContextParallelAlgo,
    Device,
    DType,
    LrDecayStyle,
    Section,
    WsdDecayStyle,
)


class ParallelSection(Section):
    """How one model spreads over the ranks. world = tensor x context x pipeline x data."""

    tensor: int = Field(default=1, ge=1)
    """Tensor parallel degree: ranks that share each weight matrix."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions over the tensor group (needs tensor > 1)."""
    context: int = Field(default=1, ge=1)
    """Context parallel degree: ranks that share the tokens of one clip."""
    context_parallel_algo: ContextParallelAlgo = "ulysses_cp_algo"
    """How attention spans the context group: Ulysses (all-to-all over heads), ring, or both."""
    ulysses_degree_in_cp: int | None = Field(default=None, ge=1)
    """Ranks of the Ulysses part when the algorithm is hybrid; the ring part is context / this."""
    ulysses_chunks: int = Field(default=1, ge=1)
    """Groups of heads whose exchange overlaps the attention of other groups; 1 is no overlap."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline parallel degree: stages that each hold a part of the blocks."""
    virtual_pipeline: int | None = Field(default=None, ge=1)
    """Chunks of blocks per pipeline stage, run interleaved; None is one."""
    use_torch_fsdp2: bool = False
    """Shard parameters, gradients and optimizer state with torch's fully_shard, as the fsdp2 section says."""
    distributed_timeout_minutes: float = Field(default=10.0, gt=0, le=1e6)
    """Minutes a collective may wait for another rank before the job fails."""

    @property
    def ulysses(self) -> int:
        """Ranks over which attention heads are exchanged."""
        if self.context_parallel_algo == "ulysses_cp_algo":
            return self.context
        return (self.ulysses_degree_in_cp or 1) if self.context_parallel_algo == "hybrid_cp_algo" else 1

    @property
    def ring(self) -> int:
        """Ranks around which keys and values travel."""
        return max(self.context // self.ulysses, 1)

    @property
    def model_parallel(self) -> int:
        """Ranks that work on one clip together (tensor x context x pipeline)."""
        return self.tensor * self.context * self.pipeline

    def data(self, world_size: int) -> int:
        """Return the data parallel degree of a job with ``world_size`` ranks (``rules`` checks that it divides)."""
        return max(world_size // self.model_parallel, 1)


class OptimizerSection(Section):
    """AdamW and the schedules of learning rate and weight decay. All schedule lengths are in iterations."""

    name: Literal["adamw", "adam8bit"] = "adamw"
    """AdamW (every --optimizer-selection of MindSpeed-MM means it), or the same with its moments in 8 bits."""
    cpu_offload: bool = False
    """Keep the optimizer's state in host memory; it visits the device for the update."""
    offload_fraction: float = Field(default=1.0, ge=0, le=1)
    """How much of the state that is."""
    fused: bool = False
    """Use torch's fused kernel where the device has one."""
    lr: float = Field(default=1e-5, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    decay_style: LrDecayStyle = "linear"
    """Shape of the decay after the warm-up (linear is Megatron's default)."""
    decay_iters: float | None = Field(default=None, gt=0)
    """Iterations until min_lr is reached, warm-up included; None is train_iters."""
    warmup_iters: float = Field(default=0.0, ge=0)
    """Iterations of linear warm-up (fractional when given as a fraction or in samples)."""
    warmup_init: float = Field(default=0.0, ge=0)
    """Learning rate at the start of the warm-up."""
    wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of the final decay of WSD (warm-up, stable, decay)."""
    wsd_decay_iters: float | None = Field(default=None, ge=0)
    """Iterations of that final decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """First-moment decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Second-moment decay."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    start_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay at the first iteration when it is scheduled."""
    end_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay at the last iteration when it is scheduled."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape between start_weight_decay and end_weight_decay."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm is cut to this; 0 does not clip."""


class RecomputeSection(Section):
    """Activation recomputation (gradient checkpointing) of transformer blocks."""

    granularity: Literal["none", "full"] = "none"
    """none; full: of a recomputed block only the input is kept."""
    method: Literal["uniform", "block"] = "uniform"
    """uniform: every block; block: the first num_layers blocks. Each block is recomputed alone."""
    num_layers: int = Field(default=1, ge=1)
    """Read with block."""
    every_k: int = Field(default=1, ge=1)
    """Of these blocks, recompute number 0, k, 2k ...; 1 is all of them."""
    keep_attention: bool = False
    """Keep the results of attention, which is most of a block's work at video lengths, and recompute the rest."""
    offload: bool = False
    """Keep the inputs of recomputed blocks in host memory between the passes."""


class TrainingSection(Section):
    """Batches, length, precision and pace of the run."""

    micro_batch_size: int = Field(default=1, ge=1)
    """Clips per forward pass and data-parallel rank."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Clips per optimizer step over all ranks; None is micro_batch_size x data-parallel ranks."""
    train_iters: int = Field(default=1, ge=1)
    """Optimizer steps of the whole run (a resumed run counts from the first start)."""
    seed: int = Field(default=1234, ge=0)
    """Seed of initialisation, data order, noise, sigmas, crops and caption dropout."""
    precision: DType = "fp32"
    """Compute type; master weights, optimizer state and gradient reduction are fp32 in both."""
    recompute: RecomputeSection = RecomputeSection()
    """Activation recomputation when FSDP2's recompute_modules does not ask for it."""
    compile_blocks: bool = False
    """Compile the transformer blocks with torch.compile."""
    attention: Attention = "auto"
    """Attention kernel; auto is PyTorch's choice on CUDA and CPU, the fused kernel on an NPU."""
    eval_interval: int | None = Field(default=None, ge=1)
    """Iterations between evaluations of the validation loss; None never evaluates."""
    eval_iters: int = Field(default=10, ge=0)
    """Global batches per evaluation."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; None keeps none."""
    exit_interval: int | None = Field(default=None, ge=1)
    """Stop (after saving) at an iteration divisible by this."""
    exit_duration_minutes: float | None = Field(default=None, gt=0)
    """Stop (after saving) after this many minutes."""
    num_workers: int = Field(default=2, ge=0)
    """Data loader processes per rank; the batches do not depend on it."""
    deterministic: bool = False
    """Use deterministic kernels only; the same job gives the same bits."""
    bad_step_policy: Literal["stop", "skip", "rollback"] = "stop"
    """After a loss or gradient that is no number, or a spike: stop; leave the step out; also undo the updates since
    the last save."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Bad steps in a row that end the run, whatever the policy."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """A loss above this many times its moving average is a bad step; None does not look for spikes."""
    device: Device | None = None
    """Asked-for device; None takes npu, cuda, cpu in that order."""
    dry_run: bool = False
    """Resolve and check everything, print it, train nothing."""


class CheckpointSection(Section):
    """What is loaded, what is saved, and how strictly."""

    load: str | None = None
    """Checkpoint root to start or resume from."""
    save: str | None = None
    """Checkpoint root to write to."""
    save_interval: int | None = Field(default=None, ge=1)
    """Iterations between saves; the end of the run is always saved when save is set."""
    load_base_model: str | None = None
    """Base weights of a LoRA run (load then holds the adapter, if anything)."""
    from_scratch: bool = False
    """Initialise at random; without it a missing checkpoint is an error."""
    finetune: bool = False
    """Take only the weights from load: iteration, optimizer and data position start at zero."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_save_optim: bool = False
    """Do not save optimizer state: smaller checkpoints that cannot be resumed exactly."""
    ckpt_format: Literal["torch_dcp"] = "torch_dcp"
    """Sharded folder that any layout loads."""
    ckpt_step: int | None = Field(default=None, ge=0)
    """Load this iteration instead of the newest."""
    strict_resume: bool = False
    """Refuse to fall back to an older checkpoint when the newest is damaged."""
    verify: bool = False
    """Check SHA-256 of every file on load (size and CRC are always checked)."""
    async_save: bool = False
    """Write in the background while training goes on."""
    keep_last: int | None = Field(default=None, ge=1)
    """Keep this many newest checkpoints; None keeps all."""


class Fsdp2Section(Section):
    """MindSpeed-MM's fsdp2_config.yaml, key for key. Patterns: dotted paths with one ``{*}`` or ``{0-20,25}``."""

    sharding_size: int | Literal["auto"] | None = "auto"
    """Ranks over which parameters are sharded; auto: all of data x context; null: 1 (replicate)."""
    sub_modules_to_wrap: tuple[str, ...] = ("predictor.blocks.{*}", "predictor.head")
    """Modules that become one FSDP unit each."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass."""
    param_dtype: DType | None = None
    """Type parameters are gathered and computed in; null keeps the run's precision."""
    reduce_dtype: DType | None = "fp32"
    """Type gradients are reduced in; null is param_dtype."""
    output_dtype: DType | None = None
    """Type unit outputs are cast to; null leaves them."""
    cast_forward_inputs: bool = True
    """Recorded; the model casts its inputs where its numerics want it."""
    ignored_modules: tuple[str, ...] = ("ae", "text_encoder")
    """Modules FSDP does not touch."""
    recompute_modules: tuple[str, ...] = ()
    """Modules whose activations are recomputed in the backward pass."""
    use_reentrant: bool = False
    """Recorded; recomputation here is non-reentrant, which gives the same gradients and needs no input hook."""
    num_to_forward_prefetch: int = Field(default=1, ge=0)
    """Units whose parameters are gathered ahead in the forward pass; 0 leaves it to torch."""
    num_to_backward_prefetch: int = Field(default=1, ge=0)
    """Units whose parameters are gathered ahead in the backward pass; 0 leaves it to torch, which does one."""
    offload_to_cpu: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    pin_memory: bool = True
    """Page-lock that host memory."""


class LoggingSection(Section):
    """What is reported, how often, and where."""

    log_interval: int = Field(default=1, ge=1)
    """Iterations between log lines."""
    tensorboard_dir: str | None = None
    """TensorBoard folder; None is <save>/tensorboard."""


class ValidationSection(Section):
    """Videos sampled while training goes on (the validation loss needs no setting but eval_interval)."""

    prompts: str | None = None
    """File of prompts: one a line, or a JSON object a line with prompt and, for I2V, image."""
    video_interval: int | None = Field(default=None, ge=1)
    """Iterations between validation videos; None makes none."""
    other_expert: str | None = None
    """Weights of the expert that is not trained, for its range; None stops at the boundary."""
    steps: int | None = Field(default=None, ge=2)
    """Sampling steps; None is the task's official number."""
    shift: float | None = Field(default=None, gt=0)
    """Flow shift of sampling; None is the task's official one."""
    guidance: float | None = Field(default=None, ge=1)
    """Guidance scale of both experts, 1 is without; None is the task's official pair."""
    negative_prompt: str = ""
    """What guidance leads away from."""


class LoraSection(Section):
    """Low-rank adapters; the base weights are frozen."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the A matrix."""
    target_modules: tuple[str, ...] = ("proj_q", "proj_k", "proj_v", "proj_out", "ffn.0", "ffn.2")
    """Linear layers that get an adapter, by MindSpeed-MM's, DiffSynth's or Diffusers' names, matched exactly."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Rank of single modules or name endings, instead of r."""
    base_dtype: Literal["bf16", "fp32", "fp8", "int8"] | None = None
    """How the frozen base is held; None is the compute type. fp8 and int8 hold the blocks' linear layers in 8 bits."""
    base_keep: tuple[str, ...] = ()
    """Block layers that fp8 and int8 leave in the compute type: blocks.0, ffn.2."""
    format: Literal["diffusers", "kohya", "kohya2", "comfy", "diffsynth", "lightx2v", "mm"] = "diffusers"
    """Format of the adapter file that every save writes."""
