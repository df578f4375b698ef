"""MindSpeed-MM's inference_model.json: every key its users write, and what each means here.

As in ``config.mm_files``: unknown keys are errors with the nearest name, values that would need something this package
does not do are refused with the reason, keys that cannot change anything say so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mindspeed_wan.config.base import Section
from mindspeed_wan.config.documents import Document, read_document
from mindspeed_wan.config.mm_files import AeFile, DTypeName, PredictorFile, TextEncoderFile, TilingFile, TokenizerFile
from mindspeed_wan.config.validate import validate
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.options import read_lines
from mindspeed_wan.platforms import DEVICE_VARIABLE

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LATENT = 8
"""Pixels per latent pixel: ``tile_size`` counts latent pixels."""


class PipelineConfigFile(Section):
    """Size and memory."""

    input_size: tuple[int, int, int] = (81, 480, 720)
    """Frames, height, width in pixels."""
    cpu_offload: bool = True
    """Keep only the model that works on the device: true is --memory sequential, false is --memory resident."""
    expand_timesteps: Literal[False] = False
    """A timestep per token (TI2V-5B)."""
    vae_scale_factor_spatial: Literal[8] = 8
    """Pixels per latent pixel."""


class SchedulerFile(Section):
    """Diffusers' UniPC scheduler, and guidance."""

    model_id: Literal["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"] = (
        "UniPCMultistepScheduler"
    )
    """Solver: UniPC, Euler or DPM++ on diffusers' sigma grid."""
    num_inference_steps: int = Field(default=40, ge=1)
    """Sampling steps."""
    guidance_scale: float | tuple[float, float] = (4.0, 3.0)
    """[high, low], or one scale for both experts."""
    flow_shift: float = Field(default=3.0, gt=0)
    """Flow shift."""
    num_train_timesteps: Literal[1000] = 1000
    """t = 1000 sigma."""
    solver_order: Literal[2] = 2
    """Order of UniPC and DPM++."""
    solver_type: Literal["bh2", "midpoint"] = "bh2"
    """UniPC's B(h); midpoint is DPM++'s."""
    prediction_type: Literal["flow_prediction"] = "flow_prediction"
    """The model predicts a velocity."""
    use_flow_sigmas: Literal[True] = True
    """Sigmas of flow matching."""
    final_sigmas_type: Literal["zero"] = "zero"
    """The run ends at sigma 0."""
    predict_x0: Literal[True] = True
    """UniPC works on x0."""
    lower_order_final: Literal[True] = True
    """First order at the last step."""
    disable_corrector: tuple[int, ...] = Field(default=(), max_length=0)
    """The corrector is on at every step."""
    thresholding: Literal[False] = False
    """No clipping of x0."""
    timestep_spacing: str = "linspace"
    """No effect with flow sigmas."""
    beta_start: float | None = None
    """No effect with flow sigmas."""
    beta_end: float | None = None
    """No effect with flow sigmas."""
    beta_schedule: str | None = None
    """No effect with flow sigmas."""
    trained_betas: list[float] | None = None
    """No effect with flow sigmas."""
    dynamic_thresholding_ratio: float | None = None
    """No effect without thresholding."""
    sample_max_value: float | None = None
    """No effect without thresholding."""
    solver_p: None = None
    """No predictor of its own for UniPC."""
    steps_offset: int | None = None
    """No effect with flow sigmas."""
    rescale_betas_zero_snr: Literal[False] = False
    """No effect with flow sigmas."""
    use_karras_sigmas: Literal[False, None] = False
    """Another sigma grid; use --sigma_grid."""
    use_exponential_sigmas: Literal[False, None] = False
    """Another sigma grid; use --sigma_grid."""
    use_beta_sigmas: Literal[False, None] = False
    """Another sigma grid; use --sigma_grid."""


class InferenceFile(Section):
    """inference_model.json, the file of --mm-model."""

    pipeline_class: Literal["WanPipeline"] = "WanPipeline"
    """The pipeline; T2V or I2V follows from the predictor."""
    prompt: str | list[str]
    """A text file with one prompt per line, or the prompts."""
    image: str | list[str] | None = None
    """I2V: a text file with one image path per line, or the paths."""
    last_image: str | list[str] | None = None
    """I2V: last frames, as for image."""
    negative_prompt: str | None = None
    """Wan's own when absent."""
    save_path: str
    """Output folder: video_0.mp4, video_1.mp4 ..."""
    use_prompt_preprocess: bool = True
    """Clean prompts (ftfy, HTML entities, white space)."""
    dtype: DTypeName | Literal["fp16", "float16"] = "bf16"
    """Precision of the DiT."""
    device: Literal["npu", "cuda", "cpu"] | None = None
    """Device; MINDSPEED_WAN_DEVICE and --device go first."""
    frame_interval: Literal[1] = 1
    """Every frame is written."""
    fps: int = Field(default=16, ge=1)
    """Frames per second of the mp4."""
    boundary_ratio: float | None = Field(default=None, ge=0, le=1)
    """Sigma at which the experts change."""
    num_inference_videos_per_sample: int = Field(default=1, ge=1)
    """Videos per prompt."""
    dual_image: bool | None = None
    """First and last frame; last_image says so here."""
    video: None = None
    """Video-to-video."""
    strength: None = None
    """Video-to-video."""
    seed: int | None = None
    """Seed of the first video of every prompt."""
    pipeline_config: PipelineConfigFile = PipelineConfigFile()
    """Size and memory."""
    ae: AeFile = AeFile()
    """Video VAE."""
    tokenizer: TokenizerFile = TokenizerFile()
    """Tokenizer."""
    text_encoder: TextEncoderFile = TextEncoderFile()
    """Text encoder."""
    image_encoder: dict[str, Any] | None = None
    """CLIP of Wan2.1 I2V; from_pretrained is read."""
    predictor: PredictorFile = PredictorFile()
    """Architecture of the experts."""
    low_noise_predictor: str | None = None
    """Checkpoint of the low-noise expert; --load is the high-noise one."""
    diffusion: SchedulerFile = SchedulerFile()
    """Sampler."""


WHY = {
    "pipeline_config.expand_timesteps": "this is TI2V-5B, which is out of scope",
    "pipeline_config.vae_scale_factor_spatial": "Wan2.1's VAE, which A14B uses, divides by 8",
    "video": "video-to-video is not supported",
    "strength": "video-to-video is not supported",
}
"""Why a value is refused, by dotted path."""

_SOLVERS = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++",
}


def read_inference_file(path: str) -> dict[str, Any]:
    """Read an ``inference_model.json`` and return the fields of ``GenerateOptions`` that it sets.

    Raises:
        ConfigError: every problem of the file at once, each with ``file:line``.
    """
    document = read_document(path)
    file, errors = validate(InferenceFile, document, WHY)
    if file is None or errors:
        raise ConfigError("\n".join(str(error) for error in errors), where=None if len(errors) == 1 else path)
    return _translate(file, document)


def _translate(file: InferenceFile, document: Document) -> dict[str, Any]:
    scale = file.diffusion.guidance_scale
    high, low = (scale, scale) if isinstance(scale, float) else scale
    frames, height, width = file.pipeline_config.input_size
    values: dict[str, Any] = {
        "prompts": _listed(file.prompt, "prompt", document),
        "images": _listed(file.image, "image", document),
        "last_images": _listed(file.last_image, "last_image", document),
        "save_path": Path(file.save_path),
        "clean_prompts": file.use_prompt_preprocess,
        "dtype": _DTYPES.get(file.dtype, file.dtype),
        "vae_dtype": _DTYPES.get(file.ae.dtype, file.ae.dtype),
        "text_dtype": _DTYPES.get(file.text_encoder.dtype, file.text_encoder.dtype),
        "fps": file.fps,
        "videos_per_prompt": file.num_inference_videos_per_sample,
        "num_frames": frames,
        "size": (height, width),
        "memory": "auto" if not document.has(("pipeline_config", "cpu_offload")) else _memory(file),
        "steps": file.diffusion.num_inference_steps,
        "guidance": (low, high),
        "shift": file.diffusion.flow_shift,
        "solver": _SOLVERS[file.diffusion.model_id],
        "grid": "diffusers",
        "noise": "diffusers",
        "max_text_length": file.tokenizer.model_max_length,
        "vae_tile": _tile(file.ae.tiling_param) if file.ae.enable_tiling else None,
    }
    optional: dict[str, Any] = {
        "negative_prompt": file.negative_prompt,
        "boundary": file.boundary_ratio,
        "base_seed": file.seed,
        "device": None if os.environ.get(DEVICE_VARIABLE) else file.device,
        "vae": _path(file.ae.from_pretrained),
        "text_encoder": _path(file.text_encoder.from_pretrained),
        "tokenizer": _path(file.tokenizer.from_pretrained),
        "image_encoder": _path((file.image_encoder or {}).get("from_pretrained")),
        "low_noise_ckpt": _path(file.low_noise_predictor),
        "predictor": file.predictor if document.has(("predictor",)) else None,
    }
    return {**values, **{name: value for name, value in optional.items() if value is not None}}


def _memory(file: InferenceFile) -> str:
    return "sequential" if file.pipeline_config.cpu_offload else "resident"


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _listed(value: str | list[str] | None, key: str, document: Document) -> tuple[str, ...]:
    """Return the entries of a list key: a ``.txt`` file is read, anything else is the entries themselves."""
    if value is None:
        return ()
    if isinstance(value, str) and value.endswith(".txt"):
        if not Path(value).is_file():
            raise ConfigError(f"{key} file {value!r} does not exist", where=document.where((key,)),
                              fix="paths are relative to the folder the command runs in")
        return read_lines(value, key)
    return (value,) if isinstance(value, str) else tuple(value)


def _tile(tiling: TilingFile) -> tuple[int, int, int, int]:
    """Return (height, width, stride height, stride width) in pixels; diffusers' 256 and 192 where nothing is said."""
    if tiling.tile_size is not None:
        stride = tiling.tile_stride or tuple(size * 3 // 4 for size in tiling.tile_size)
        return (_LATENT * tiling.tile_size[0], _LATENT * tiling.tile_size[1], _LATENT * stride[0], _LATENT * stride[1])
    return (
        tiling.tile_sample_min_height or 256, tiling.tile_sample_min_width or 256,
        tiling.tile_sample_stride_height or 192, tiling.tile_sample_stride_width or 192,
    )
