"""MindSpeed-MM's model.json and data.json: every key its users write, with type and meaning.

These classes are the spelling; ``translate`` turns them into ``RunConfig`` sections. A key that MindSpeed-MM has and
that cannot change anything here is still listed (its description says so), because a typo in it should be found; a
value that would need something this package does not do is refused by its type, with the reason in ``WHY``.
Keys of ours (boundary, expert, weighting, density, grid) extend MindSpeed-MM's ``diffusion`` block.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mindspeed_wan.config.base import Density, Expert, Section, Task, Weighting
from mindspeed_wan.config.sections_model import ConditioningSection, PatchSide

DTypeName = Literal["fp32", "float32", "bf16", "bfloat16"]
ModelType = Literal["t2v", "i2v", "flf2v", "wan2.2-t2v", "wan2.2-i2v"]


class DiffusionFile(Section):
    """Flow matching and the expert's range."""

    model_id: Literal["wan_flow_match_scheduler"] = "wan_flow_match_scheduler"
    """Training scheduler; there is one."""
    num_train_timesteps: Literal[1000] = 1000
    """Entries of the index grid, and t = 1000 sigma."""
    shift: float = Field(default=5.0, gt=0)
    """Flow shift."""
    sigma_min: float = Field(default=0.0, ge=0, le=0)
    """Unshifted sigma at the clean end; 0."""
    extra_one_step: Literal[True] = True
    """The grid ends one step before sigma_min."""
    max_timestep_boundary: float | None = Field(default=None, ge=0, le=1)
    """MindSpeed-MM's end of the range, as a fraction of the index counted from the noisy end."""
    min_timestep_boundary: float | None = Field(default=None, ge=0, le=1)
    """MindSpeed-MM's start of the range, as a fraction of the index counted from the noisy end."""
    expert: Expert | None = None
    """high or low, with boundary: the direct way to say which range is trained."""
    boundary: float | None = Field(default=None, gt=0, lt=1)
    """Sigma at which the experts change: 0.875 for Wan2.2 T2V, 0.900 for I2V."""
    weighting: Weighting = "none"
    """Loss weight by sigma."""
    normalize_weighting: bool = True
    """Scale the weights to mean 1 over the trained range."""
    density: Density = "uniform"
    """Density of the unshifted sigma."""
    density_mean: float = 0.0
    """Mean of the logit-normal density."""
    density_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal density."""
    grid: Literal["continuous", "index"] = "continuous"
    """Draw any sigma of the range, or only points of the index grid."""


class PredictorFile(Section):
    """Architecture of one expert."""

    model_id: Literal["wandit"] = "wandit"
    """The DiT; there is one."""
    dtype: DTypeName | None = None
    """Compute type when no flag and no FSDP2 file says otherwise."""
    model_type: ModelType | None = None
    """t2v or i2v, with or without wan2.2-; plain i2v and flf2v are Wan2.1 and read CLIP tokens."""
    patch_size: tuple[PatchSide, PatchSide, PatchSide] = (1, 2, 2)
    """Latent voxels per token."""
    text_len: int = Field(default=512, ge=1)
    """Text tokens."""
    in_dim: int = Field(default=16, ge=1)
    """Input channels: 16 (T2V) or 36 (I2V)."""
    hidden_size: int = Field(default=5120, ge=1)
    """Channels of the residual stream."""
    ffn_dim: int = Field(default=13824, ge=1)
    """Channels inside the feed-forward layers."""
    freq_dim: int = Field(default=256, ge=2)
    """Channels of the timestep sinusoid."""
    text_dim: int = Field(default=4096, ge=1)
    """Channels of the text states."""
    img_dim: int | None = 1280
    """CLIP channels; read by Wan2.1 I2V only."""
    out_dim: int = Field(default=16, ge=1)
    """Latent channels."""
    num_heads: int = Field(default=40, ge=1)
    """Attention heads."""
    num_layers: int = Field(default=40, ge=1)
    """Blocks."""
    pipeline_num_layers: list[int] | list[list[int]] | None = None
    """Blocks per pipeline stage, or one such list per virtual chunk; not read while pipeline parallel is 1."""
    qk_norm: Literal[True] = True
    """Normalise queries and keys."""
    qk_norm_type: Literal["rmsnorm"] = "rmsnorm"
    """Which norm."""
    cross_attn_norm: Literal[True] = True
    """Affine norm before cross-attention."""
    eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every norm."""
    max_seq_len: int = Field(default=1024, ge=1)
    """Longest axis of the rotary table."""
    fp32_calculate: bool = False
    """Keep modulation, norms and residual in fp32."""
    attention_async_offload: Literal[False] = False
    """Offload attention activations to the host."""
    use_fused_rmsnorm: bool = True
    """No effect: fused kernels are taken wherever the device has them."""
    fa_layout: Literal["bnsd", "sbh", "bsnd", "bsh"] = "bnsd"
    """No effect: the attention layout is chosen by the device."""
    seperated_timestep: Literal[False] = False
    """A timestep per token (TI2V-5B)."""
    clip_token_len: Literal[257] = 257
    """CLIP tokens of one image."""
    FPDT: Literal[False] = False
    """Chunked Ulysses with host offload."""
    FPDT_chunk_number: int | None = None
    """No effect without FPDT."""
    FPDT_with_offload: bool | None = None
    """No effect without FPDT."""


class TilingFile(Section):
    """VAE tiles, in pixels (tile_sample_*) or in latent units (tile_size, tile_stride)."""

    tile_sample_min_height: int | None = Field(default=None, ge=16)
    """Tile height in pixels."""
    tile_sample_min_width: int | None = Field(default=None, ge=16)
    """Tile width in pixels."""
    tile_sample_stride_height: int | None = Field(default=None, ge=8)
    """Distance between tiles, down, in pixels."""
    tile_sample_stride_width: int | None = Field(default=None, ge=8)
    """Distance between tiles, across, in pixels."""
    tile_size: tuple[int, int] | None = None
    """Tile height and width in latent units (8 pixels)."""
    tile_stride: tuple[int, int] | None = None
    """Distance between tiles in latent units."""


class ImageEncoderFile(Section):
    """The CLIP vision tower of Wan2.1 I2V."""

    model_id: str | None = None
    """No effect: there is one."""
    hub_backend: Literal["hf"] = "hf"
    """Layout of the folder."""
    from_pretrained: str | None = None
    """Folder or file of its weights."""
    dtype: DTypeName = "fp32"
    """Precision it encodes in."""


class I2VProcessorFile(Section):
    """First-frame conditioning."""

    processor_id: Literal["wan_i2v_processor"] = "wan_i2v_processor"
    """The processor; there is one."""
    i2v_vae_encode_tiling: bool | Literal["auto"] = "auto"
    """auto, or the value of enable_tiling: the first frame is encoded like the clips."""
    i2v_vae_encod_tiling: bool | Literal["auto"] | None = None
    """The same key as MindSpeed-MM's files spell it."""
    image_encoder: ImageEncoderFile | None = None
    """CLIP vision encoder of Wan2.1 I2V."""
    conditioning: ConditioningSection = ConditioningSection()
    """Which frames or masks training gives the model; the first frame unless said otherwise. A key of ours."""


class AeFile(Section):
    """The video VAE."""

    model_id: Literal["wan_video_vae"] = "wan_video_vae"
    """The VAE; there is one."""
    from_pretrained: str | None = None
    """Folder or file of its weights."""
    dtype: DTypeName = "fp32"
    """Precision it encodes in."""
    enable_tiling: bool = False
    """Encode in tiles."""
    tiling_param: TilingFile = TilingFile()
    """Tile sizes."""
    norm_latents: Literal[True] = True
    """Normalise latents per channel."""
    norm_mode: Literal["channel_specified_shift_scale"] = "channel_specified_shift_scale"
    """How; there is one way."""
    do_sample: bool = False
    """Sample the posterior."""
    i2v_processor: I2VProcessorFile | None = None
    """First-frame conditioning."""


class TextEncoderFile(Section):
    """The text encoder."""

    model_id: Literal["UMT5"] = "UMT5"
    """The encoder; there is one."""
    dtype: DTypeName = "bf16"
    """Precision it encodes in."""
    hub_backend: Literal["hf"] = "hf"
    """Layout of the folder."""
    from_pretrained: str | None = None
    """Folder of its weights."""


class ModelFile(Section):
    """model.json, the file of --mm-model."""

    load_video_features: bool = False
    """Batches hold VAE latents."""
    load_text_features: bool = False
    """Batches hold text states."""
    task: Task = "t2v"
    """t2v or i2v."""
    encoder_offload_interval: int = Field(default=1, ge=1)
    """Batches encoded before UMT5 moves to the host."""
    enable_encoder_dp: bool = False
    """Spread encoding over tensor and context ranks."""
    diffusion: DiffusionFile = DiffusionFile()
    """Flow matching and the expert's range."""
    predictor: PredictorFile = PredictorFile()
    """Architecture."""
    ae: AeFile = AeFile()
    """Video VAE."""
    text_encoder: TextEncoderFile = TextEncoderFile()
    """Text encoder."""
    patch: dict[str, Any] = Field(default_factory=dict)
    """No effect: MindSpeed-MM's monkey patches."""


class TransformParamFile(Section):
    """Parameters of the steps of train_pipeline."""

    transform_size: Literal["auto"] | dict[str, int] | list[int] = "auto"
    """auto, or max_height and max_width once more."""
    size: Literal["auto"] | dict[str, int] | list[int] = "auto"
    """Another name of it."""
    interpolation_mode: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize."""
    mode: Literal["resize", "longside", "shortside", "hxw"] | None = None
    """No effect: force_resolution says whether clips are cut to one size."""
    skip_low_resolution: Literal[False] = False
    """Leave small clips as they are."""
    align_corners: Literal[False] = False
    """Corners of the resize."""
    antialias: Literal[False] = False
    """Filter before shrinking."""
    use_short_edge: Literal[False] = False
    """Cut a square first."""
    top_crop: Literal[False] = False
    """Cut from the top."""
    mean: float | list[float] = 0.5
    """0.5: frames in [-1, 1]."""
    std: float | list[float] = 0.5
    """0.5: frames in [-1, 1]."""
    inplace: bool = False
    """No effect."""


class TransformFile(Section):
    """One step of train_pipeline."""

    trans_type: Literal["ResizeVideo", "ToTensorVideo", "norm_fun", "CenterCropResizeVideo", "RandomCropVideo"]
    """Which step."""
    param: TransformParamFile = TransformParamFile()
    """Its parameters."""


class TrainPipelineFile(Section):
    """Frames to tensors."""

    video: list[TransformFile] = Field(default_factory=list)
    """Steps for clips."""
    image: list[TransformFile] = Field(default_factory=list)
    """Steps for images."""
    first_frame_vae: list[TransformFile] = Field(default_factory=list)
    """No effect: the first frame is taken from the transformed clip and needs no second resize."""


class BasicParametersFile(Section):
    """Where the clips are."""

    data_path: str
    """data.txt, or data.jsonl of a feature folder."""
    data_folder: str | None = None
    """Root of relative sample paths."""
    data_storage_mode: Literal["combine", "standard"] = "combine"
    """combine: data.txt names folders and annotations; standard: data_path is one annotation."""
    repeat: float | None = Field(default=None, gt=0)
    """No effect: epochs repeat by themselves."""


class PreprocessFile(Section):
    """Clips to frames."""

    video_processor_type: Literal["OpensoraplanVideoProcessor"] = "OpensoraplanVideoProcessor"
    """The processor; there is one."""
    video_reader_type: Literal[
        "auto", "pyav", "decord", "torchcodec", "DecordVideo", "decoder", "PyAVVideo", "TorchvisionVideo"
    ] = "auto"
    """Decoder: pyav, decord or torchcodec by name; MindSpeed-MM's names mean PyAV, whose frames are the same."""
    image_reader_type: Literal["Image", "torchvision"] = "Image"
    """No effect: images are read by Pillow."""
    num_frames: int = Field(default=49, ge=1)
    """Frames per clip, 4k+1."""
    min_num_frames: int = Field(default=1, ge=1)
    """Drop shorter clips."""
    frame_interval: int = Field(default=1, ge=1)
    """Take every n-th frame."""
    auto_interval: bool = False
    """Interval from the frame rates."""
    max_height: int = Field(default=480, ge=16)
    """Pixels."""
    max_width: int = Field(default=832, ge=16)
    """Pixels."""
    max_hxw: int | None = Field(default=None, ge=1)
    """Largest height x width."""
    min_hxw: int | None = Field(default=None, ge=1)
    """Smallest height x width."""
    train_fps: float = Field(default=24, gt=0)
    """Frames per second."""
    speed_factor: float = Field(default=1.0, gt=0)
    """Playback speed."""
    drop_short_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of short clips dropped."""
    cfg: float = Field(default=0.0, ge=0, le=1)
    """Probability of an empty caption."""
    hw_stride: int = Field(default=16, ge=1)
    """Sizes are multiples of this; 8 is raised to the 16 the model needs."""
    force_resolution: bool = True
    """Exactly max_height x max_width."""
    hw_aspect_thr: float = Field(default=5.0, ge=1)
    """Drop clips with a longer side ratio."""
    frame_choice: Literal["random", "head", "center", "uniform", "chunk"] = "random"
    """Frames of a clip that is longer than needed."""
    size_buckets: list[tuple[int, int]] = Field(default_factory=list)
    """Several target sizes [height, width] instead of one."""
    frame_buckets: list[int] = Field(default_factory=list)
    """Several lengths instead of num_frames."""
    truncate_t_by_sp: Literal[False] = False
    """Cut frames to a multiple of the context degree."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of clips that may be unreadable."""
    train_pipeline: TrainPipelineFile = TrainPipelineFile()
    """Frames to tensors."""


class TextMethodFile(Section):
    """One step of caption cleaning."""

    method: Literal["basic_clean", "whitespace_clean"]
    """Which step."""
    param: dict[str, Any] = Field(default_factory=dict)
    """No effect."""


class TokenizerFile(Section):
    """The tokenizer of the text encoder."""

    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    """Loader; there is one."""
    hub_backend: Literal["hf"] = "hf"
    """Layout of the folder."""
    from_pretrained: str | None = None
    """Folder."""
    model_max_length: int = Field(default=512, ge=1)
    """Tokens per caption."""


class DatasetFile(Section):
    """Clips and captions."""

    dataset_type: Literal["t2v", "i2v", "feature"] = "t2v"
    """t2v (also for I2V training) or feature."""
    basic_parameters: BasicParametersFile
    """Where the clips are."""
    preprocess_parameters: PreprocessFile = PreprocessFile()
    """Clips to frames."""
    use_text_processer: bool = True
    """Encode captions (false only with load_text_features)."""
    enable_text_preprocessing: bool = True
    """Clean captions."""
    text_preprocess_methods: list[TextMethodFile] | TextMethodFile | None = None
    """Cleaning steps; the official two, or none."""
    tokenizer_config: TokenizerFile | list[TokenizerFile] = TokenizerFile()
    """Tokenizer."""
    use_feature_data: bool | None = None
    """The same as dataset_type feature."""


class LoaderFile(Section):
    """Order and batches."""

    dataloader_mode: Literal["sampler"] = "sampler"
    """There is one."""
    sampler_type: str = "LengthGroupedSampler"
    """No effect: clips of one size and length always share a batch."""
    shuffle: bool = True
    """New order every epoch."""
    drop_last: bool = True
    """Drop the incomplete last batch of an epoch."""
    balance_tokens: bool = False
    """More clips of small or short buckets in a batch."""
    pin_memory: bool = True
    """Page-locked batches."""
    group_frame: bool = False
    """No effect: see sampler_type."""
    group_resolution: bool = False
    """No effect: see sampler_type."""
    group_data: bool = False
    """No effect: see sampler_type."""
    initial_global_step_for_sampler: Literal[0] = 0
    """Start of the order."""
    collate_param: dict[str, Any] | None = None
    """No effect."""


class DataFile(Section):
    """data.json, the file of --mm-data."""

    dataset_param: DatasetFile
    """Clips and captions."""
    dataloader_param: LoaderFile = LoaderFile()
    """Order and batches."""


WHY: dict[str, str] = {
    "diffusion.model_id": "TI2V-5B and other schedulers are out of scope",
    "diffusion.num_train_timesteps": "every Wan checkpoint reads t = 1000 sigma, in training and in inference",
    "diffusion.sigma_min": "every Wan schedule ends at 0",
    "diffusion.extra_one_step": "every Wan checkpoint was trained with the extra step",
    "predictor.qk_norm": "every Wan checkpoint has q and k norms",
    "predictor.qk_norm_type": "every Wan checkpoint normalises q and k with RMSNorm over all heads",
    "predictor.cross_attn_norm": "every Wan checkpoint has this norm",
    "predictor.attention_async_offload": "use recompute_modules in the FSDP2 file to save activation memory",
    "predictor.seperated_timestep": "this is TI2V-5B, which is out of scope",
    "predictor.FPDT": "use --context-parallel-size with Ulysses instead",
    "predictor.clip_token_len": "CLIP ViT-H/14 gives 257 tokens",
    "ae.norm_latents": "the model expects normalised latents",
    "ae.norm_mode": "the model expects latents normalised per channel",
    **{f"dataset_param.preprocess_parameters.train_pipeline.video.param.{name}":
       "clips are resized to cover the size, then cut from the middle (RandomCropVideo: anywhere)"
       for name in ("skip_low_resolution", "align_corners", "antialias", "use_short_edge", "top_crop")},
    "dataset_param.preprocess_parameters.truncate_t_by_sp": "tokens are padded instead, no frame is lost",
    "dataloader_param.initial_global_step_for_sampler": "the position follows from the loaded checkpoint",
}
"""Why a value is refused, by dotted path."""
