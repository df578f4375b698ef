"""``WanGenerator``: weights in, videos out; the one path behind the command line and the Python API.

    generator = WanGenerator.from_pretrained("Wan2.2-T2V-A14B-Diffusers", dtype="bf16")
    result = generator("a fox in the snow", size=(480, 832), num_frames=81, seed=3)
    result.save("fox.mp4")
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mindspeed_wan.diffusion.schedule import SigmaSchedule, sigmas
from mindspeed_wan.diffusion.solvers import make_solver
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference import memory, video_io
from mindspeed_wan.inference.adapters import ExpertAdapters, read_adapters
from mindspeed_wan.inference.calibration import Recorder, write_table
from mindspeed_wan.inference.denoise import Conditions, Denoiser, OnProgress, StepTimes, draw_noise
from mindspeed_wan.inference.experts import Experts, open_experts
from mindspeed_wan.inference.guidance_options import GuidancePlan
from mindspeed_wan.inference.images import ImageConditions
from mindspeed_wan.inference.lora_options import LoraOptions
from mindspeed_wan.inference.options import GenerateOptions, VideoJob
from mindspeed_wan.inference.pipefusion import PipeFusion
from mindspeed_wan.inference.pipeline_stages import Runner, StagedModel, WholeModel
from mindspeed_wan.inference.prompts import PromptEncoder
from mindspeed_wan.inference.runtime import DTYPES, Runtime, start
from mindspeed_wan.inference.sources import ModelFolder, recognise
from mindspeed_wan.inference.step_cache import StepCache
from mindspeed_wan.inference.vae_parallel import ParallelVAE
from mindspeed_wan.models.quantization_spec import expert_bytes
from mindspeed_wan.models.vae import Tiling, WanVAE, latent_shape
from mindspeed_wan.platforms import attention, get_platform, ops
from mindspeed_wan.platforms.compiler import check_compiler

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GeneratedVideo:
    """What one call made.

    Attributes:
        latents: [16, f, h, w] normalised, fp32, on the CPU.
        video: [3, F, H, W] in [-1, 1], fp32, on the CPU; ``None`` on ranks that do not lead their replica, or when
            decoding was not asked for.
        seconds: by stage (``text``, ``load``, ``high``, ``low``, ``decode`` ...).
        steps: seconds of each step by expert.
        settings: everything that decides the content.
        evaluations: times that this rank ran the blocks of a DiT.
        processor_seconds: processor time of the denoising steps in this process.
    """

    latents: Tensor
    video: Tensor | None
    fps: int
    seconds: dict[str, float]
    steps: dict[str, list[float]]
    settings: dict[str, Any]
    evaluations: int = 0
    processor_seconds: float = 0.0

    def save(self, path: str | Path, *, crf: int = 18) -> None:
        """Write an mp4; does nothing on ranks without the video."""
        if self.video is not None:
            video_io.write_mp4(Path(path), video_io.to_frames(self.video), fps=self.fps, crf=crf)


@dataclass
class Stopwatch:
    """Seconds by stage, the device synchronised at both ends."""

    runtime: Runtime
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's seconds to stage ``name``."""
        started = time.perf_counter()
        yield
        self.runtime.platform.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class WanGenerator:
    """A model on this process's device (and, under torchrun, on its replica's), ready to generate.

    Heavy parts load when they are first needed: the text encoder before the experts, so that they need not share the
    device, and the VAE last.
    """

    def __init__(self, folder: ModelFolder, options: GenerateOptions, runtime: Runtime) -> None:
        if options.compile_blocks:
            check_compiler(runtime.platform)
        _check_attention(options, runtime)
        self.folder, self.options, self.runtime = folder, options, runtime
        self.prompts = PromptEncoder(
            folder, runtime, dtype=options.text_dtype or options.dtype, device=options.text_device,
            max_length=min(options.max_text_length, folder.config.text_len), clean=options.clean_prompts,
            quantization=options.quantize.text_spec,
        )
        self.adapters: ExpertAdapters | None = None
        self.plan: memory.MemoryPlan | None = None
        self.images = ImageConditions(folder, runtime, self.vae)
        self._experts: Experts | None = None
        self._recorder: Recorder | None = None
        self._vae: WanVAE | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, **options: Any) -> WanGenerator:
        """Recognise the weights at ``path`` and join the job, if there is one.

        Args:
            path: any folder that ``--ckpt_dir`` takes; ``None`` with ``high_noise_ckpt`` and ``low_noise_ckpt``.
            **options: fields of ``GenerateOptions``: ``dtype``, ``device``, ``memory``, ``layout``, ``steps`` ...
                They are the defaults of every call.

        Raises:
            WanError: as the command line does.
        """
        asked = GenerateOptions(**{**options, "ckpt_dir": Path(path) if path else None})
        return cls.from_options(asked)

    @classmethod
    def from_options(cls, options: GenerateOptions, *, whole_list: bool = False) -> WanGenerator:
        """Recognise the weights that ``options`` name, check everything, and join the job.

        ``whole_list`` says that the options' prompts and images are all there will be, and checks them too.
        """
        folder = recognise(options)
        options = with_folder_defaults(options, folder)
        options.check(num_heads=folder.config.num_heads, whole_list=whole_list, both_ends=_reads_both_ends(folder))
        platform = get_platform(options.device)
        return cls(folder, options, start(platform, options.layout, options.timeout_minutes))

    def __call__(
        self, prompt: str, *, seed: int | None = None, image: str | None = None, last_image: str | None = None,
        decode: bool = True, on_progress: OnProgress | None = None, **changes: Any,
    ) -> GeneratedVideo:
        """Generate one video.

        Args:
            prompt: what to show.
            seed: names the noise; ``base_seed`` by default.
            image, last_image: paths of the first and last frame (I2V).
            decode: ``False`` stops at the latents.
            on_progress: called after each step with (steps done, expert, seconds).
            **changes: other fields of ``GenerateOptions`` for this call (``size``, ``num_frames``, ``steps``,
                ``guidance``, ``negative_prompt`` ...).

        Returns:
            The video; on a job of several ranks every rank of the replica calls with the same arguments.
        """
        options = replace(self.options, **changes, prompts=(prompt,), images=(image,) if image else (),
                          last_images=(last_image,) if last_image else ())
        if seed is not None:
            options = replace(options, base_seed=seed)
        alone = replace(options, layout=replace(options.layout, world_size=options.layout.replica_size))
        alone.check(num_heads=self.folder.config.num_heads, both_ends=_reads_both_ends(self.folder))
        return self.generate(options.jobs()[0], options, decode=decode, on_progress=on_progress)

    def generate(
        self, job: VideoJob, options: GenerateOptions | None = None, *, decode: bool = True,
        on_progress: OnProgress | None = None,
    ) -> GeneratedVideo:
        """Generate the video of ``job``. Collective over the replica."""
        options = options or self.options
        watch = Stopwatch(self.runtime)
        settings = options.settings(job, self.folder.identity)
        options = replace(options, size=self.images.size(job, options))
        assert options.num_frames is not None and options.fps is not None and options.guidance is not None
        latent = latent_shape(options.num_frames, *options.size)
        with watch.stage("text"):
            prompt, negative = self.prompts.encode([job.prompt, options.negative_prompt])
        with watch.stage("image"):
            conditions = Conditions(
                prompt=prompt, negative=negative, channels=self.images.channels(job, options),
                image_embeds=self.images.embeds(job, options),
            )
        with watch.stage("load"):
            experts = self.experts(latent)
        low, high = options.guidance
        schedule = self.schedule(options)
        cache = self._cache(options, schedule)
        denoiser = Denoiser(
            experts, self.runtime, schedule, make_solver(options.solver), scales={"high": high, "low": low},
            boundary=options.boundary, cache=cache, guidance_plan=self.guidance_plan(options),
            runner=_runner(options, self.runtime),
        )
        noise = draw_noise(options.noise, latent, job.seed, self.runtime.device)
        with ops.use_attention(options.attention):
            latents, times = denoiser.run(noise, conditions, on_progress)
        self._report_cache(cache, options)
        video = None
        if decode:
            with watch.stage("decode"):
                video = self._decode(latents)
        return GeneratedVideo(
            latents=latents[0].cpu(), video=video, fps=options.fps, seconds=_all_seconds(watch, times),
            steps=times.seconds, settings=settings, evaluations=times.evaluations,
            processor_seconds=times.processor_seconds,
        )

    def _cache(self, options: GenerateOptions, schedule: SigmaSchedule) -> StepCache | Recorder | None:
        """Return what follows or measures the steps; one recorder for all videos of a calibration."""
        if options.cache.calibrate is not None and self._recorder is not None and self._recorder.schedule == schedule:
            return self._recorder
        cache = self.step_cache(options)
        self._recorder = cache if isinstance(cache, Recorder) else None
        return cache

    def step_cache(self, options: GenerateOptions) -> StepCache | Recorder | None:
        """Return what the options say about step caches, fresh.

        Raises:
            ConfigError: a table of another schedule, or without what the method needs.
        """
        assert options.task is not None and options.shift is not None
        return options.cache.build(options.task, self.schedule(options), shift=options.shift,
                                   boundary=options.boundary, grid=options.grid, solver=options.solver)

    def _report_cache(self, cache: StepCache | Recorder | None, options: GenerateOptions) -> None:
        """Say what a step cache did; write the table that a calibration measured. Collective over the replica."""
        if isinstance(cache, Recorder):
            assert options.cache.calibrate is not None and options.shift is not None
            samples = _gathered(cache.samples(), self.runtime)
            if self.runtime.rank == 0:
                table = cache.table(shift=options.shift, boundary=options.boundary, samples=samples)
                write_table(table, options.cache.calibrate)
                print(f"wrote the step-cache table {options.cache.calibrate}", flush=True)
        elif cache is not None and self.runtime.rank == 0:
            print(f"{cache.plan.describe()}, block speed-up {cache.plan.ideal_speedup:.2f}", flush=True)

    @staticmethod
    def schedule(options: GenerateOptions) -> SigmaSchedule:
        """Return the noise levels of these options."""
        assert options.steps is not None and options.shift is not None
        return sigmas(options.steps, options.shift, options.grid, options.solver)  # type: ignore[arg-type]

    def guidance_plan(self, options: GenerateOptions) -> GuidancePlan:
        """Return which steps run the unconditional branch.

        Raises:
            ConfigError: limits of guidance that leave no guided step, or leave out none.
        """
        assert options.guidance is not None
        low, high = options.guidance
        return options.guidance_limits.plan(self.schedule(options), options.boundary, {"high": high, "low": low})

    def experts(self, latent: tuple[int, int, int]) -> Experts:
        """Return the experts, loading them on first use in the memory mode that fits videos of ``latent`` size."""
        if self._experts is None:
            self.plan = self._plan(latent)
            dtype = DTYPES[self.options.dtype]
            self.adapters = read_adapters(
                self.options.lora, self.folder.config, tuple(self.folder.experts), self.runtime
            )
            self._experts = open_experts(
                self.folder, self.runtime, dtype=dtype, memory=self.plan.mode, adapters=self.adapters,
                compile_blocks=self.options.compile_blocks, quantization=self.options.quantize.spec,
            )
        return self._experts

    def set_adapters(self, lora: LoraOptions) -> None:
        """Take the adapters off and put others on (none with ``LoraOptions()``) while the weights stay where they are.

        Raises:
            ConfigError: adapters that were merged cannot be taken off.
        """
        if (self.adapters is not None and self.adapters.merge) or (lora.merge and self._experts is not None):
            raise ConfigError("merged adapters are part of the weights", fix="use them unmerged, or load a new model")
        self.options = replace(self.options, lora=lora)
        if self._experts is not None:
            self.adapters = read_adapters(lora, self.folder.config, tuple(self.folder.experts), self.runtime)
            self._experts.exchange(self.adapters)

    def release(self) -> None:
        """Give every loaded model up; what is used again loads again."""
        self.prompts.release()
        self._experts, self._vae, self.adapters, self.plan = None, None, None, None

    def vae(self) -> WanVAE:
        """Return the VAE, loading it on first use (on every rank that takes part in decoding)."""
        if self._vae is None:
            tile = Tiling(*self.options.vae_tile) if self.options.vae_tile else None
            self._vae = WanVAE.from_pretrained(
                self.folder.vae, DTYPES[self.options.vae_dtype], self.runtime.device, tiling=tile
            )
            if self.runtime.layout.vae_parallel and self.runtime.replica_group is not None:
                self._vae.runner = ParallelVAE(self._vae.model, self.runtime.replica_group)
        return self._vae

    def _decode(self, latents: Tensor) -> Tensor | None:
        """Return [3, F, H, W] on the leader's host; the other ranks help when the VAE is parallel."""
        parallel = self.runtime.layout.vae_parallel and self.runtime.replica_group is not None
        if parallel:
            video = self.runtime.agree(self.vae).decode(latents)
        elif self.runtime.leads:
            video = self.vae().decode(latents)
        return video[0].cpu() if self.runtime.leads else None

    def _plan(self, latent: tuple[int, int, int]) -> memory.MemoryPlan:
        layout, config = self.runtime.layout, self.folder.config
        element = DTYPES[self.options.dtype].itemsize
        sharded = layout.cfg * layout.context if layout.dit_fsdp else 1
        spec = self.options.quantize.spec
        expert = expert_bytes(config, element=element, quantization=spec, tensor=layout.tensor, shard=sharded)
        expert /= layout.pipeline
        working = memory.working_bytes(
            config, latent, element=element, context=layout.context, tensor=layout.tensor,
            dequantized=spec is not None and not spec.dynamic,
        )
        if self.options.pipefusion:  # keys and values of this stage's blocks, for both branches
            kept = 4 * config.num_tokens(latent) * config.dim * element / layout.tensor
            working += kept * config.num_layers / layout.pipeline
        if layout.dit_fsdp:
            working += 2 * expert * sharded / config.num_layers  # the block in use and the one gathered ahead
        # All ranks must choose the same mode: the one with the least free memory decides.
        free = _smallest(float(self.runtime.platform.free_memory_bytes()), self.runtime)
        return memory.choose(
            self.options.memory, experts=len(self.folder.experts), expert=expert, working=working, free=free,
            block_share=2 / config.num_layers + 0.05, host=self.runtime.platform.device_type == "cpu",
            fsdp=layout.dit_fsdp or layout.pipeline > 1,
        )


def _runner(options: GenerateOptions, runtime: Runtime) -> Runner:
    """Return what runs the passes of a step in this layout."""
    if runtime.groups.pp is None:
        return WholeModel()
    if options.pipefusion:
        return PipeFusion(runtime.groups, patches=options.pipefusion.count(runtime.layout),
                          warmup=options.pipefusion.warmup)
    return StagedModel(runtime.groups)


def _check_attention(options: GenerateOptions, runtime: Runtime) -> None:
    """Raise ``ConfigError`` if the attention backend is not there, or not for this device and dtype."""
    if options.attention != "auto":
        attention.check_backend(options.attention, needs_grad=False)
        attention.check_device(options.attention, runtime.platform.device_type, DTYPES[options.dtype])


def _reads_both_ends(folder: ModelFolder) -> bool:
    return folder.config.pos_embed_len is not None


def with_folder_defaults(options: GenerateOptions, folder: ModelFolder) -> GenerateOptions:
    """Fill in what the options leave open, from the weights' folder first and the task's official values then."""
    if options.boundary is None and folder.boundary is not None:
        options = replace(options, boundary=folder.boundary)
    return options.resolve(folder.task)


def describe(options: GenerateOptions) -> dict[str, Any]:
    """Return the options JSON-ready, for the sidecar."""
    return {key: value for key, value in asdict(options).items() if key not in ("prompts", "layout", "predictor")}


def _all_seconds(watch: Stopwatch, times: StepTimes) -> dict[str, float]:
    return {**watch.seconds, **{expert: sum(seconds) for expert, seconds in times.seconds.items()}}


def _smallest(value: float, runtime: Runtime) -> float:
    return min(_gathered(value, runtime))


def _gathered(value: T, runtime: Runtime) -> list[T]:
    """Return the value of every rank of the replica. Collective."""
    if runtime.replica_group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * runtime.layout.replica_size
    dist.all_gather_object(values, value, group=runtime.replica_group)
    return values
