"""The resolved configuration of a training run.

``RunConfig`` is what the rest of the package reads: every value has one name, one unit and one meaning, whichever
spelling it came in (MindSpeed-MM JSON, FSDP2 YAML, Megatron flags; see ``load`` and ``flags``). Sections are frozen
and refuse unknown keys. Checks that need two sections live in ``rules``.

No torch here, and no import from ``models``: ``WanSection`` mirrors ``models.wan.config.WanConfig`` field by field
(a test compares them), so ``WanConfig.from_dict(config.model.wan.to_dict())`` builds the model's own configuration.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["fp32", "bf16"]
Task = Literal["t2v", "i2v"]
Expert = Literal["high", "low"]
Device = Literal["npu", "cuda", "cpu"]
ContextParallelAlgo = Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"]
LrDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
Weighting = Literal["none", "mm", "sigma_sqrt", "cosmap"]
Density = Literal["uniform", "logit_normal"]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON-ready types (tuples become lists)."""
        return self.model_dump(mode="json")


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
    pipeline: int = Field(default=1, ge=1)
    """Pipeline parallel degree. Above 1 is refused for now."""
    virtual_pipeline: int | None = Field(default=None, ge=1)
    """Model chunks per pipeline rank; None is one."""
    use_torch_fsdp2: bool = False
    """Shard parameters, gradients and optimizer state with torch's fully_shard, as the fsdp2 section says."""
    distributed_timeout_minutes: float = Field(default=10.0, gt=0)
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


class WanSection(Section):
    """Architecture of one expert; the same fields as ``models.wan.config.WanConfig``."""

    num_layers: int = Field(default=40, ge=1)
    """Transformer blocks."""
    dim: int = Field(default=5120, ge=1)
    """Hidden size (channels of the residual stream)."""
    ffn_dim: int = Field(default=13824, ge=1)
    """Hidden size of the feed-forward layers."""
    num_heads: int = Field(default=40, ge=1)
    """Attention heads; dim / num_heads channels each."""
    in_channels: int = Field(default=16, ge=1)
    """Latent plus conditioning channels: 16 for T2V, 36 for I2V (16 noisy + 4 mask + 16 first-frame latent)."""
    out_channels: int = Field(default=16, ge=1)
    """Latent channels of the predicted velocity."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent voxels per token: frames, height, width."""
    text_dim: int = Field(default=4096, ge=1)
    """Channels of the text encoder's states."""
    text_len: int = Field(default=512, ge=1)
    """Text tokens the model attends to; shorter prompts are padded with zeros."""
    freq_dim: int = Field(default=256, ge=2)
    """Channels of the timestep sinusoid."""
    eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every norm."""
    rope_max_len: int = Field(default=1024, ge=1)
    """Longest axis (in tokens) the rotary table covers."""
    image_dim: int | None = None
    """CLIP channels of Wan2.1 I2V (1280); None for every Wan2.2 model."""
    pos_embed_len: int | None = None
    """Learned image positions of Wan2.1's first-last-frame model; None otherwise."""


class VaeSection(Section):
    """The frozen video VAE."""

    path: str | None = None
    """Folder of AutoencoderKLWan (a Diffusers ``vae/``) or the file Wan2.1_VAE.pth."""
    dtype: DType = "fp32"
    """Precision it encodes in."""
    tiling: bool = False
    """Encode in overlapping tiles: less memory, slightly different latents at the seams."""
    tile_size: tuple[int, int] = (256, 256)
    """Tile height and width in pixels."""
    tile_stride: tuple[int, int] = (192, 192)
    """Distance between tiles, height and width in pixels."""
    do_sample: bool = False
    """Sample the latent posterior instead of taking its mean."""


class TextEncoderSection(Section):
    """The frozen UMT5 text encoder and its tokenizer."""

    path: str | None = None
    """Folder of the encoder weights (a Diffusers ``text_encoder/``)."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer; None looks for ``tokenizer/`` beside ``path``."""
    dtype: DType = "bf16"
    """Precision it encodes in."""
    max_length: int = Field(default=512, ge=1)
    """Captions are cut after this many tokens."""


class ModelSection(Section):
    """What is trained, and the frozen encoders that feed it."""

    task: Task = "t2v"
    """t2v, or i2v (first frame given; 36 input channels)."""
    wan: WanSection = WanSection()
    """Architecture of the expert."""
    fp32_residual: bool = False
    """Keep the residual stream in fp32 under bf16 compute (MindSpeed-MM: predictor.fp32_calculate)."""
    pipeline_num_layers: tuple[tuple[int, ...], ...] = ()
    """Blocks per stage and per virtual chunk; empty splits evenly. Only read with pipeline > 1."""
    vae: VaeSection = VaeSection()
    """Video VAE."""
    text_encoder: TextEncoderSection = TextEncoderSection()
    """Text encoder."""
    load_video_features: bool = False
    """Batches hold VAE latents from a feature folder; the VAE is not loaded."""
    load_text_features: bool = False
    """Batches hold text states from a feature folder; UMT5 is not loaded."""
    encoder_offload_interval: int = Field(default=1, ge=1)
    """Batches encoded at once before UMT5 moves to host memory; 1 keeps it on the device."""
    enable_encoder_dp: bool = False
    """Spread encoding over the tensor and context ranks instead of repeating it on each."""
    i2v_vae_encode_tiling: bool | Literal["auto"] = "auto"
    """I2V: tile the first-frame encoding; auto does what vae.tiling says."""
    image_encoder_path: str | None = None
    """CLIP vision folder, read by Wan2.1 I2V only (wan.image_dim set)."""


class DiffusionSection(Section):
    """Flow matching: x_sigma = (1 - sigma) x0 + sigma noise; the model predicts noise - x0 at t = 1000 sigma."""

    num_train_timesteps: int = Field(default=1000, ge=1)
    """Entries of the index grid, and the factor from sigma to the model's timestep."""
    shift: float = Field(default=5.0, gt=0)
    """Flow shift s in sigma = s u / (1 + (s - 1) u)."""
    sigma_min: float = Field(default=0.0, ge=0, lt=1)
    """Unshifted sigma at the clean end of the grid."""
    expert: Expert | None = None
    """Which expert is trained; None for a model with one expert (Wan2.1) or a free range."""
    boundary: float | None = Field(default=None, gt=0, lt=1)
    """Sigma at which the experts change: high owns [boundary, 1], low [0, boundary)."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """Sigmas that are drawn, (low, high); derived from expert and boundary."""
    weighting: Weighting = "none"
    """Loss weight by sigma: none, mm (MindSpeed-MM's and DiffSynth's bell), sigma_sqrt (1/sigma^2), cosmap."""
    normalize_weighting: bool = True
    """Scale the weights to mean 1 over the expert's own range."""
    density: Density = "uniform"
    """Density of u before the shift: uniform, or logit-normal."""
    density_mean: float = 0.0
    """Mean of the logit-normal density (in logits)."""
    density_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal density (in logits)."""
    grid: Literal["continuous", "index"] = "continuous"
    """continuous: any sigma of the range; index: only the num_train_timesteps grid points, as MindSpeed-MM does."""


class DataSection(Section):
    """Clips, captions and how they become tensors."""

    kind: Literal["video", "feature"] = "video"
    """video: mp4 files and captions; feature: a folder of encoded samples."""
    data_path: str | None = None
    """data.txt (lines ``folder,annotation``), or data.jsonl of a feature folder."""
    data_folder: str | None = None
    """Root that relative sample paths are joined to; empty uses the folder named in each data.txt line."""
    num_frames: int = Field(default=49, ge=1)
    """Frames per clip, 4k+1."""
    min_num_frames: int = Field(default=1, ge=1)
    """Shorter clips are dropped (and counted)."""
    frame_interval: int = Field(default=1, ge=1)
    """Take every n-th frame."""
    auto_interval: bool = False
    """Derive the interval from the clip's own frame rate and train_fps."""
    max_height: int = Field(default=480, ge=16)
    """Target height in pixels."""
    max_width: int = Field(default=832, ge=16)
    """Target width in pixels."""
    max_hxw: int | None = Field(default=None, ge=1)
    """Largest height x width in pixels; None is max_height x max_width."""
    min_hxw: int | None = Field(default=None, ge=1)
    """Smaller clips are dropped; None is a quarter of max_hxw."""
    force_resolution: bool = True
    """Bring every clip to exactly max_height x max_width; false keeps the aspect ratio within max_hxw."""
    hw_stride: int = Field(default=16, ge=16, multiple_of=16)
    """Height and width are multiples of this (8 of the VAE x 2 of the patch at least)."""
    hw_aspect_thr: float = Field(default=5.0, ge=1)
    """Clips with a longer side ratio are dropped."""
    train_fps: float = Field(default=24.0, gt=0)
    """Frames per second the model sees when auto_interval is on."""
    speed_factor: float = Field(default=1.0, gt=0)
    """Playback speed applied before sampling frames."""
    drop_short_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of clips shorter than num_frames that is dropped instead of being trained at their own length."""
    crop: Literal["center", "random"] = "center"
    """Where the resized frame is cut."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resize filter."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability of an empty caption (MindSpeed-MM: cfg)."""
    clean_captions: bool = True
    """Undo HTML escapes and mojibake and collapse white space, as the official model does."""
    reader: Literal["auto", "pyav", "decord"] = "auto"
    """Video decoder; auto takes decord when it is installed, else PyAV."""
    shuffle: bool = True
    """New order every epoch, from the seed; false keeps the file order."""
    drop_last: bool = True
    """Drop the tail of an epoch that does not fill a global batch; false lets the batch run into the next epoch."""
    group_by_shape: bool = True
    """Put clips of one size and length in one global batch."""
    pin_memory: bool = True
    """Copy batches to page-locked memory where the device gains from it."""
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of clips that may be unreadable before the run stops; 0 stops at the first."""

    @property
    def max_pixels(self) -> int:
        """Largest height x width."""
        return self.max_hxw or self.max_height * self.max_width

    @property
    def min_pixels(self) -> int:
        """Smallest height x width that is kept."""
        return self.min_hxw if self.min_hxw is not None else self.max_pixels // 4


class OptimizerSection(Section):
    """AdamW and the schedules of learning rate and weight decay. All schedule lengths are in iterations."""

    name: Literal["adamw"] = "adamw"
    """Optimizer; every --optimizer-selection of MindSpeed-MM that means AdamW."""
    fused: bool = False
    """Use torch's fused kernel where the device has one."""
    lr: float = Field(default=1e-5, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    decay_style: LrDecayStyle = "constant"
    """Shape of the decay after the warm-up."""
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

    granularity: Literal["none", "full", "selective"] = "none"
    """none; full: only a block's input is kept; selective: attention is kept, the rest recomputed."""
    method: Literal["uniform", "block"] = "uniform"
    """uniform: one checkpoint per num_layers consecutive blocks; block: the first num_layers blocks, each alone."""
    num_layers: int = Field(default=1, ge=1)
    """Read with method."""


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
    eval_interval: int | None = Field(default=None, ge=1)
    """Iterations between evaluations of the validation loss; None never evaluates."""
    eval_iters: int = Field(default=0, ge=0)
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
    no_load_rng: bool = False
    """Accepted and recorded; randomness follows from the seed and the data position, not from a saved state."""
    no_save_optim: bool = False
    """Do not save optimizer state: smaller checkpoints that cannot be resumed exactly."""
    no_save_rng: bool = False
    """Accepted and recorded; there is no generator state to save."""
    ckpt_format: Literal["torch_dcp", "torch"] = "torch_dcp"
    """torch_dcp: sharded folder any layout loads; torch: MindSpeed-MM's mp_rank files."""
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
    """Cast floating-point inputs of each unit to param_dtype."""
    ignored_modules: tuple[str, ...] = ("ae", "text_encoder")
    """Modules FSDP does not touch."""
    recompute_modules: tuple[str, ...] = ()
    """Modules whose activations are recomputed in the backward pass."""
    use_reentrant: bool = False
    """Recorded; recomputation here is non-reentrant, which gives the same gradients and needs no input hook."""
    num_to_forward_prefetch: int = Field(default=0, ge=0)
    """Units whose parameters are gathered ahead in the forward pass."""
    num_to_backward_prefetch: int = Field(default=0, ge=0)
    """Units whose parameters are gathered ahead in the backward pass."""
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
    tensorboard_log_interval: int = Field(default=1, ge=1)
    """Iterations between TensorBoard points."""
    log_throughput: bool = True
    """Print TFLOP/s and, where the peak is known, MFU."""


class LoraSection(Section):
    """Low-rank adapters; the base weights are frozen."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the A matrix."""
    target_modules: tuple[str, ...] = ("proj_q", "proj_k", "proj_v", "proj_out", "ffn.0", "ffn.2")
    """Names (last parts of a module path) that get an adapter."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    rank_pattern: dict[str, int] = {}
    """Rank of single modules or name endings, instead of r."""


class RunConfig(Section):
    """Everything a training run reads."""

    parallel: ParallelSection = ParallelSection()
    """Ranks."""
    model: ModelSection = ModelSection()
    """Expert and encoders."""
    diffusion: DiffusionSection = DiffusionSection()
    """Noise, expert range, loss weight."""
    data: DataSection = DataSection()
    """Clips and captions."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW and schedules."""
    training: TrainingSection = TrainingSection()
    """Batches, length, precision."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Load and save."""
    fsdp2: Fsdp2Section = Fsdp2Section()
    """Read when parallel.use_torch_fsdp2 is true."""
    logging: LoggingSection = LoggingSection()
    """Reports."""
    lora: LoraSection | None = None
    """Adapters; None trains all weights."""
    notes: tuple[str, ...] = ()
    """Things the reader of the log should know once: inert flags, translated values, likely mistakes."""
    sources: dict[str, str] = {}
    """Which file each part came from (absolute paths)."""

    def resolved(self) -> dict[str, Any]:
        """Return the JSON-ready dict that is written beside the run; ``RunConfig(**it)`` reads it back."""
        return self.to_dict()

    def global_batch(self, world_size: int) -> int:
        """Return the clips per optimizer step of a job with ``world_size`` ranks."""
        training = self.training
        return training.global_batch_size or training.micro_batch_size * self.parallel.data(world_size)

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the forward passes per optimizer step on each rank."""
        per_pass = self.training.micro_batch_size * self.parallel.data(world_size)
        return math.ceil(self.global_batch(world_size) / per_pass)

    def shard_size(self, world_size: int) -> int:
        """Return the ranks that share one copy of the parameters under FSDP2 (1 without it)."""
        if not self.parallel.use_torch_fsdp2 or self.fsdp2.sharding_size is None:
            return 1
        if self.fsdp2.sharding_size == "auto":
            return self.parallel.data(world_size) * self.parallel.context
        return self.fsdp2.sharding_size
