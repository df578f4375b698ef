"""Every setting of a generation, whichever dialect it came in, checked as a whole before torch is imported.

``None`` means "the task's official value" until ``resolve`` fills it in from ``models.wan.config``; after that every
field has its final value and the options can be printed, hashed and written to the sidecar.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import ConfigError, did_you_mean
from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.guidance_options import GuidanceOptions
from mindspeed_wan.inference.lora_options import MEMORY_NAMES, LoraOptions
from mindspeed_wan.inference.quantize_options import QuantizeOptions
from mindspeed_wan.models.wan.config import SAMPLING_DEFAULTS
from mindspeed_wan.parallel.inference_layout import InferenceLayout, raise_problems
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions

if TYPE_CHECKING:
    from mindspeed_wan.config.mm_files import PredictorFile

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's own negative prompt, the same for T2V and I2V, with its full-width commas."""

SIZE_MULTIPLE = 16
"""Pixels: the VAE divides by 8 and a DiT patch spans two latent pixels."""

CHOICES: dict[str, tuple[str, ...]] = {
    "task": tuple(SAMPLING_DEFAULTS),
    "solver": ("unipc", "dpm++", "euler"),
    "grid": ("official", "diffusers", "diffsynth"),
    "noise": ("ours", "diffusers", "official"),
    "dtype": ("bf16", "fp32", "fp16"),
    "vae_dtype": ("bf16", "fp32", "fp16"),
    "text_dtype": ("bf16", "fp32", "fp16"),
    "memory": ("auto", "resident", "sequential", "block"),
    "attention": ("auto", "sdpa", "torch_flash", "torch_efficient", "torch_math", "cudnn", "flash2", "flash3", "sage",
                  "npu"),
    "text_device": ("auto", "cpu", "device"),
    "conditioning": ("official", "diffusers", "videox"),
}


@dataclass(frozen=True)
class VideoJob:
    """One video to make: ``index`` counts over prompts and their copies, ``seed`` is its own."""

    index: int
    prompt: str
    seed: int
    output: Path
    image: str | None = None
    last_image: str | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Settings of one call of ``inference_sora.py``; see ``docs/inference.md`` for every flag.

    ``guidance`` is (low, high) as in Wan's own configs. ``size`` is (height, width) in pixels. ``vae_tile`` is
    (height, width, stride height, stride width) in pixels, ``None`` decodes in one piece. ``predictor`` is the
    architecture of weights that do not describe themselves (MindSpeed-MM's files).
    """

    # weights
    ckpt_dir: Path | None = None
    high_noise_ckpt: Path | None = None
    low_noise_ckpt: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    task: str | None = None
    predictor: PredictorFile | None = None
    # what to make
    prompts: tuple[str, ...] = ()
    negative_prompt: str = NEGATIVE_PROMPT
    clean_prompts: bool = True
    images: tuple[str, ...] = ()
    last_images: tuple[str, ...] = ()
    conditioning: str | None = None
    start_frames: int = 1
    size: tuple[int, int] = (720, 1280)
    num_frames: int | None = None
    fps: int | None = None
    videos_per_prompt: int = 1
    base_seed: int = 42
    noise: str = "ours"
    # how to sample
    steps: int | None = None
    shift: float | None = None
    solver: str = "unipc"
    grid: str = "official"
    guidance: tuple[float, float] | None = None
    guidance_limits: GuidanceOptions = field(default_factory=GuidanceOptions)
    boundary: float | None = None
    cache: CacheOptions = field(default_factory=CacheOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    max_text_length: int = 512
    # where it runs
    device: str | None = None
    dtype: str = "bf16"
    vae_dtype: str = "fp32"
    text_dtype: str | None = None
    memory: str = "auto"
    compile_blocks: bool = False
    attention: str = "auto"
    text_device: str = "auto"
    vae_tile: tuple[int, int, int, int] | None = None
    layout: InferenceLayout = field(default_factory=InferenceLayout)
    pipefusion: PipeFusionOptions = field(default_factory=PipeFusionOptions)
    timeout_minutes: float = 20.0
    # what to leave on disk
    save_file: Path | None = None
    save_path: Path | None = None
    save_latents: Path | None = None
    save_frames: bool = False
    contact_sheet: bool = True
    resume: bool = True
    crf: int = 18

    def resolve(self, task: str) -> GenerateOptions:
        """Return the options with every ``None`` replaced by the task's official value.

        Raises:
            ConfigError: the task asked for differs from ``task``, which is what the weights are.
        """
        if self.task is not None and self.task != task:
            raise ConfigError(
                f"--task {self.task} was asked for, but the weights are {task}",
                where=str(self.ckpt_dir or self.high_noise_ckpt), fix=f"use --task {task} or the other weights",
            )
        official = SAMPLING_DEFAULTS[task]
        return replace(
            self,
            task=task,
            steps=self.steps or official.num_steps,
            shift=self.shift or official.shift,
            guidance=self.guidance or official.guidance,
            boundary=official.boundary if self.boundary is None else self.boundary,
            num_frames=self.num_frames or official.num_frames,
            fps=self.fps or official.fps,
            text_dtype=self.text_dtype or self.dtype,
            conditioning=self.conditioning or ("videox" if task.startswith("inp") else "official"),
        )

    def check(self, *, num_heads: int | None = None, whole_list: bool = True, both_ends: bool = False) -> None:
        """Raise one ``ConfigError`` that lists everything that cannot be run, each with what would be legal.

        Args:
            num_heads: of the model, where it is known.
            whole_list: prompts and images are all there will be: every replica must get one video.
            both_ends: the model reads CLIP states of a first and a last frame.
        """
        videos = len(self.prompts) * self.videos_per_prompt if whole_list and self.prompts else None
        raise_problems(
            [*self._choice_problems(), *self._sampling_problems(), *self._video_problems(),
             *(self._prompt_problems(both_ends) if whole_list else ()), *self.cache.problems(self.task),
             *self.guidance_limits.problems(self.guidance, calibrates=self.cache.calibrate is not None),
             *self.lora.problems(dit_fsdp=self.layout.dit_fsdp), *self._stage_problems(),
             *self.quantize.problems(t5_fsdp=self.layout.t5_fsdp),
             *self.layout.problems(num_heads, videos)]
        )

    def _stage_problems(self) -> list[str]:
        found = self.pipefusion.problems(self.layout, caches=self.cache.method != "none", compiles=self.compile_blocks)
        if self.memory == "block":
            found += self.layout.streaming_problems()
        if self.layout.pipeline > 1 and self.cache.calibrate is not None:
            found.append("--calibrate_cache measures whole models; run it without pipeline stages")
        return found

    def _choice_problems(self) -> list[str]:
        if self.task and self.task.startswith("ti2v"):
            return [f"--task {self.task}: TI2V-5B is out of scope; this package runs Wan2.2 A14B and Wan2.1 14B"]
        found = []
        for name, legal in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in legal:
                names = [*legal, *MEMORY_NAMES] if name == "memory" else legal  # what the command line takes
                hint = did_you_mean(str(value), names)
                found.append(f"{name} is {value!r}; use one of {', '.join(names)}" + (f" ({hint})" if hint else ""))
        if self.layout.ring > 1 and self.attention not in ("auto", "sdpa", "npu"):
            found.append(f"--attention {self.attention} with --ring_size {self.layout.ring}: the ring merges partial "
                         "results of kernels that give their log-sum-exp, which are auto's; drop it, or use Ulysses")
        return found

    def _sampling_problems(self) -> list[str]:
        found = []
        if self.steps is not None and self.steps < 1:
            found.append(f"--sample_steps is {self.steps}, at least 1 is needed")
        if self.shift is not None and self.shift <= 0:
            found.append(f"--sample_shift is {self.shift}, it must be positive (T2V 12, I2V 5)")
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            found.append(f"--boundary is {self.boundary}; it is a noise fraction in [0, 1] (T2V 0.875, I2V 0.9)")
        if self.guidance is not None and min(self.guidance) < 0:
            found.append(f"--sample_guide_scale is {self.guidance}; scales are not negative")
        return found

    def _video_problems(self) -> list[str]:
        found = []
        height, width = self.size
        for name, value in (("height", height), ("width", width)):
            if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
                near = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
                found.append(f"{name} {value} is not a multiple of {SIZE_MULTIPLE}; the nearest is {near}")
        if self.num_frames is not None and (self.num_frames < 1 or self.num_frames % 4 != 1):
            near = max(1, round((self.num_frames - 1) / 4) * 4 + 1)
            found.append(f"--frame_num {self.num_frames} is not 4k+1; the nearest is {near}")
        if self.fps is not None and self.fps < 1:
            found.append(f"--fps is {self.fps}, at least 1 is needed")
        if self.vae_tile is not None:
            tile_height, tile_width, stride_height, stride_width = self.vae_tile
            if any(value % 8 or value < 8 for value in self.vae_tile):
                found.append(f"VAE tile {self.vae_tile} (pixels): sizes and strides are multiples of 8")
            if stride_height > tile_height or stride_width > tile_width:
                found.append(f"VAE tile {self.vae_tile}: a stride above its tile size leaves gaps")
            if self.layout.vae_parallel:
                found.append("--vae_parallel splits the picture already; drop the VAE tiles")
        return found

    def _prompt_problems(self, both_ends: bool) -> list[str]:
        found = []
        if not self.prompts:
            found.append("no prompt; give --prompt TEXT or --prompt_file FILE with one prompt per line")
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                found.append(f"prompt {index + 1} is empty")
        if self.videos_per_prompt < 1:
            found.append(f"--num_videos is {self.videos_per_prompt}, at least 1 is needed")
        for name, images in (("image", self.images), ("last image", self.last_images)):
            if images and len(images) not in (1, len(self.prompts)):
                found.append(f"{len(images)} {name}s for {len(self.prompts)} prompts; give one for all or one for each")
            found += [f"{name} {path} does not exist" for path in images if not Path(path).is_file()]
        if self.task and self.task.startswith("i2v") and not self.images:
            found.append(f"--task {self.task} needs a first frame: give --image FILE")
        if self.task and self.task.startswith("t2v") and (self.images or self.last_images):
            found.append(f"--task {self.task} takes no image; I2V weights do")
        if self.start_frames < 1:
            found.append(f"--start_frames is {self.start_frames}, at least 1 is needed")
        if self.last_images and not self.images:
            found.append("a last image needs a first one: give --image FILE")
        if both_ends and not self.last_images:
            found.append("these weights read the first and the last frame of a video: give --last_image FILE too")
        return found

    def jobs(self) -> list[VideoJob]:
        """Return the videos to make, in order. Copy ``k`` of any prompt has seed ``base_seed + k``.

        A video therefore does not change when its prompt moves in the list or the list grows.
        """
        found = []
        for place, prompt in enumerate(self.prompts):
            for copy in range(self.videos_per_prompt):
                index = place * self.videos_per_prompt + copy
                found.append(VideoJob(
                    index, prompt, self.base_seed + copy, self._output(index),
                    _of_prompt(self.images, place), _of_prompt(self.last_images, place),
                ))
        return found

    def _output(self, index: int) -> Path:
        if self.save_file is None:
            return (self.save_path or Path("samples")) / f"video_{index}.mp4"
        if len(self.prompts) * self.videos_per_prompt == 1:
            return self.save_file
        return self.save_file.with_name(f"{self.save_file.stem}_{index}{self.save_file.suffix}")

    def settings(self, job: VideoJob, weights: str) -> dict[str, Any]:
        """Return what decides a video's content, JSON-ready; layout, memory mode and output paths do not.

        ``weights`` identifies the weight files.
        """
        names = ("task", "negative_prompt", "clean_prompts", "conditioning", "start_frames", "num_frames", "fps",
                 "steps", "shift", "solver", "grid", "guidance", "boundary", "max_text_length", "noise", "dtype",
                 "vae_dtype", "text_dtype", "vae_tile")
        values = {name: value for name, value in asdict(self).items() if name in names}
        height, width = self.size
        images = {name: _file_digest(path) for name, path in (("image", job.image), ("last_image", job.last_image))
                  if path}
        return {"prompt": job.prompt, "seed": job.seed, "height": height, "width": width, **values, **images,
                **({"cache": self.cache.settings()} if self.cache.method != "none" else {}),
                **({"attention": self.attention} if self.attention != "auto" else {}),
                **({"guidance_limits": asdict(self.guidance_limits)} if self.guidance_limits else {}),
                **({"pipefusion": self.pipefusion.settings(self.layout)} if self.pipefusion else {}),
                **({"lora": self.lora.settings()} if self.lora else {}),
                **({"quantize": self.quantize.settings()} if self.quantize else {}), "weights": weights}


def _of_prompt(images: tuple[str, ...], place: int) -> str | None:
    return (images[0] if len(images) == 1 else images[place]) if images else None


def _file_digest(path: str) -> str:
    return f"{Path(path).name} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def settings_hash(settings: dict[str, Any]) -> str:
    """Return a short name for settings; a sidecar with the same one is a finished video of the same content."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_lines(path: str | Path, what: str) -> tuple[str, ...]:
    """Return the non-blank lines of a text file.

    Raises:
        ConfigError: missing, not UTF-8, or without a line.
    """
    from mindspeed_wan.config.documents import read_text

    lines = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not lines:
        raise ConfigError(f"the file holds no {what}", where=str(path), fix=f"write one {what} per line")
    return lines


def parse_size(text: str) -> tuple[int, int]:
    """Read Wan's ``WIDTH*HEIGHT`` (``x`` works too) and return (height, width)."""
    match = re.fullmatch(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*", text)
    if match is None:
        raise ConfigError(f"--size {text!r} is not WIDTH*HEIGHT", fix="for example --size 1280*720")
    return int(match[2]), int(match[1])


def parse_guidance(text: str) -> tuple[float, float]:
    """Read ``LOW,HIGH`` or one scale for both experts."""
    try:
        values = [float(part) for part in text.replace("(", "").replace(")", "").split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ConfigError(f"--sample_guide_scale {text!r} is not LOW,HIGH", fix="for example 3.0,4.0 (T2V) or 3.5")
    return values[0], values[-1]
