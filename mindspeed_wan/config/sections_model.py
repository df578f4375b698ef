"""Sections about what is trained: the expert and its encoders, flow matching, clips and captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mindspeed_wan.config.base import Density, DType, Expert, Section, Task, Weighting

PatchSide = Annotated[int, Field(ge=1)]


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
    patch_size: tuple[PatchSide, PatchSide, PatchSide] = (1, 2, 2)
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


class ImageEncoderSection(Section):
    """The frozen CLIP vision tower of Wan2.1 I2V."""

    path: str | None = None
    """Folder of the encoder (a Diffusers ``image_encoder/``) or the original models_clip_*.pth."""
    dtype: DType = "fp32"
    """Precision it encodes in."""


class ConditioningSection(Section):
    """What of a training clip an I2V model is told; drawn anew for every sample and epoch."""

    mode: Literal["frames", "masks"] = "frames"
    """frames: whole frames at the start (and end); masks: Fun-InP's random masks, with their probabilities."""
    start_frames: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    """Frames given at the start; of several numbers one is drawn for each sample."""
    last_frame: float = Field(default=0.0, ge=0, le=1)
    """Probability that the last frame is given too; 1 trains first-and-last-frame."""
    grey_share: float = Field(default=0.1, ge=0, le=1)
    """masks: of the samples with nothing known, the share that sees an encoded grey video; the others see zeros."""

    @property
    def is_default(self) -> bool:
        """True for the first frame alone, which is what feature caches hold."""
        return self.mode == "frames" and self.start_frames == (1,) and self.last_frame == 0.0


class ModelSection(Section):
    """What is trained, and the frozen encoders that feed it."""

    task: Task = "t2v"
    """t2v, or i2v (first frame given; 36 input channels)."""
    wan: WanSection = WanSection()
    """Architecture of the expert."""
    fp32_residual: bool = False
    """Keep the residual stream in fp32 under bf16 compute (MindSpeed-MM: predictor.fp32_calculate)."""
    pipeline_num_layers: tuple[tuple[int, ...], ...] = ()
    """Blocks of every stage, one row per virtual chunk; empty splits evenly. Only read with pipeline > 1."""
    vae: VaeSection = VaeSection()
    """Video VAE."""
    text_encoder: TextEncoderSection = TextEncoderSection()
    """Text encoder."""
    image_encoder: ImageEncoderSection = ImageEncoderSection()
    """CLIP of Wan2.1 I2V."""
    conditioning: ConditioningSection = ConditioningSection()
    """Known frames or masks of I2V and Fun-InP training."""
    load_video_features: bool = False
    """Batches hold VAE latents from a feature folder; the VAE is not loaded."""
    load_text_features: bool = False
    """Batches hold text states from a feature folder; UMT5 is not loaded."""
    encoder_offload_interval: int = Field(default=1, ge=1)
    """Batches encoded at once before UMT5 moves to host memory; 1 keeps it on the device."""
    enable_encoder_dp: bool = False
    """Spread encoding over the tensor and context ranks instead of repeating it on each."""


class DiffusionSection(Section):
    """Flow matching: x_sigma = (1 - sigma) x0 + sigma noise; the model predicts noise - x0 at t = 1000 sigma."""

    num_train_timesteps: Literal[1000] = 1000
    """Entries of the index grid, and the factor from sigma to the model's timestep; there is no other."""
    shift: float = Field(default=5.0, gt=0)
    """Flow shift s in sigma = s u / (1 + (s - 1) u)."""
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
    frame_choice: Literal["random", "head", "center", "uniform", "chunk"] = "random"
    """Frames of a clip that is longer than needed: a random or central window, its head, frames spread over all of it,
    or every whole window as a sample of its own."""
    size_buckets: tuple[tuple[int, int], ...] = ()
    """Several target sizes (height, width); each clip takes the nearest side ratio. Empty: max_height x max_width."""
    frame_buckets: tuple[int, ...] = ()
    """Several lengths, each 4k+1; each clip takes the longest it fills. Empty: num_frames."""
    reader: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """Video decoder; auto takes PyAV, or decord where only that is installed."""
    shuffle: bool = True
    """New order every epoch, from the seed; false keeps the file order."""
    drop_last: bool = True
    """Drop the tail of an epoch that does not fill a global batch; false lets the batch run into the next epoch."""
    balance_tokens: bool = False
    """Put more clips of small or short buckets into a batch, so that every step has about the same number of tokens."""
    pin_memory: bool = True
    """Copy batches to page-locked memory where the device gains from it."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of clips that may be unreadable before the run stops; 0 stops at the first."""

    @property
    def max_pixels(self) -> int:
        """Largest height x width."""
        return self.max_hxw or self.max_height * self.max_width

    @property
    def min_pixels(self) -> int:
        """Smallest height x width that is kept."""
        return self.min_hxw if self.min_hxw is not None else self.max_pixels // 4
