"""Videos of fixed prompts while training goes on: the same noise each time, so only the weights differ.

Nothing random is consumed and no weight changes, so a run with videos trains bit for bit like one without. Sampling
runs in the run's own layout: tensor and context ranks share each forward pass, FSDP2 gathers as it does for training,
and data ranks share the prompts. The VAE is on the device only while it works.

Sampling begins at pure noise with the high-noise expert. With ``--validation-other-expert`` each expert samples its own
range. A high-noise expert alone goes down to the boundary, and the video shows the clean clip that it predicts there:
blurred where only the low-noise expert knows, and nothing that the weights in training did not make.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.checkpoint.manifest import write_text_atomic
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.video_writer import to_frames, write_mp4
from mindspeed_wan.diffusion import guidance, randomness
from mindspeed_wan.diffusion.schedule import SigmaSchedule, SolverName, sigmas
from mindspeed_wan.diffusion.solvers import SolverState, make_solver
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.vae import latent_shape
from mindspeed_wan.models.wan.config import SAMPLING_DEFAULTS, SamplingDefaults
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel.agreement import all_or_none, first_decides, is_first
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.platforms.rank import beat
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.other_expert import OtherExpert, reshard
from mindspeed_wan.training.step import predict
from mindspeed_wan.training.validation_prompts import (
    Told,
    as_batch,
    encode_images,
    encode_texts,
    open_vae,
    read_prompts,
)

FOLDER = "validation"
LIST_FILE = "videos.json"
"""In each iteration's folder: prompt, file and settings of every video."""
STREAM = "validation.video"
SOLVER: SolverName = "unipc"


class _Abandoned(Exception):
    """Somebody was asked to stop while videos were sampled; raised on all ranks together."""


@dataclass(frozen=True)
class Settings:
    """How videos are sampled: the schedule, its first ``high_steps`` steps for the high-noise expert, and guidance."""

    schedule: SigmaSchedule
    high_steps: int
    scales: dict[str, float]
    told: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig) -> Settings:
        """Return the run's settings; what no flag says is the task's official value."""
        given, boundary = config.validation, config.diffusion.boundary
        defaults: SamplingDefaults = SAMPLING_DEFAULTS[f"{config.model.task}-{'14B' if boundary is None else 'A14B'}"]
        steps, shift = given.steps or defaults.num_steps, given.shift or defaults.shift
        low, high = (given.guidance, given.guidance) if given.guidance is not None else defaults.guidance
        schedule = sigmas(steps, shift, "official", SOLVER)
        high_steps, _ = schedule.expert_steps(boundary)
        told = {"steps": steps, "shift": shift, "solver": SOLVER, "guidance": [low, high], "boundary": boundary,
                "negative_prompt": given.negative_prompt, "fps": defaults.fps}
        if config.diffusion.expert == "high" and given.other_expert is None:
            # The step to sigma 0 from where the high-noise expert ends gives the clean clip that it predicts there.
            schedule = SigmaSchedule((*schedule.sigmas[:high_steps], 0.0), schedule.timesteps[:high_steps])
            told["note"] = "high-noise expert alone: the clean clip it predicts at the boundary"
        return cls(schedule, high_steps, {"high": high, "low": low}, told)


class ValidationVideos:
    """Samples and writes the videos of one run. Collective to create and to call.

    Args:
        config: the resolved configuration; its prompts, encoders and save folder are there.
        model: the expert in training.
        groups: its layout.
        platform: where it runs.

    Raises:
        DataError: prompts or images that cannot be used.
        CheckpointError: encoders or the other expert's weights that cannot be used.
    """

    def __init__(self, config: RunConfig, model: WanDiT, groups: ParallelGroups, platform: Platform) -> None:
        self._config, self._model, self._groups, self._platform = config, model, groups, platform
        self._settings = Settings.of(config)
        given = config.validation
        self._prompts = first_decides(lambda: read_prompts(str(given.prompts), task=config.model.task))
        texts = [*(prompt.prompt for prompt in self._prompts), given.negative_prompt]
        *self._texts, self._negative = first_decides(lambda: encode_texts(config, texts))
        self._trained = config.diffusion.expert or "high"
        self._other = None
        if given.other_expert is not None:
            self._other = OtherExpert(config, given.other_expert, model, groups)
        self._told: list[Told] | None = None

    def __call__(self, iteration: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Write ``<save>/validation/iter_NNNNNNN/000.mp4`` ... for the weights as they are.

        ``stop`` says that this rank was asked to stop; when any rank was, the videos are given up at the next step.
        """
        started = time.perf_counter()
        folder = Path(str(self._config.checkpoint.save)) / FOLDER / f"iter_{iteration:07d}"
        # Our own noise is counter-based; what a library draws while it loads must not move the run's generator.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                latents = self._sample(iteration, stop)
            except _Abandoned:
                _say(f"no validation videos at iteration {iteration}: the run is to stop")
                return
            except CheckpointError as error:  # the trained weights are back; a preview must not end the run
                _say(f"warning: no validation videos at iteration {iteration}: {error}")
                return
            all_or_none(lambda: self._write(latents, folder))
        self._platform.empty_cache()
        _say(f"validation videos of iteration {iteration}: {folder} ({time.perf_counter() - started:.1f} s)")

    # ---- sampling --------------------------------------------------------------------------------------------------

    def _sample(self, iteration: int, stop: Callable[[], bool]) -> dict[int, Tensor]:
        """Return the final latents [1, 16, f, h, w] of this data rank's prompts, by number."""
        if self._told is None:
            self._told = all_or_none(lambda: encode_images(self._config, self._prompts, self._platform.device()))
        data, device = self._config.data, self._platform.device()
        mine = prompts_of(len(self._prompts), self._groups.dims.data, self._groups.dp_rank)
        shape = (1, self._config.model.wan.out_channels,
                 *latent_shape(data.num_frames, data.max_height, data.max_width))
        states = {number: SolverState(0, randomness.normal(shape, seed=self._config.training.seed, sample_index=number,
                                                           stream=STREAM).to(device)) for number in mine}
        high_steps, num_steps = self._settings.high_steps, self._settings.schedule.num_steps
        go_on = partial(self._go_on, iteration, stop)
        self._model.eval()
        try:
            for expert, steps in (("high", range(high_steps)), ("low", range(high_steps, num_steps))):
                if not len(steps):
                    continue
                other = self._other if self._other is not None and self._other.name == expert else None
                with other.visiting() if other is not None else nullcontext():
                    for number, state in states.items():
                        states[number] = self._advance(number, state, steps, expert, go_on)
        finally:
            reshard(self._model)
            self._model.train()
        return {number: state.sample for number, state in states.items()}

    def _go_on(self, iteration: int, stop: Callable[[], bool]) -> None:
        """Tell the launcher that this rank is alive; give up on every rank when one was asked to stop. Collective."""
        beat(iteration)
        wanted = torch.tensor([float(stop())], device=self._platform.device())
        if self._groups.dims.world_size > 1:
            dist.all_reduce(wanted)
        if wanted.item():
            raise _Abandoned

    def _advance(self, number: int, state: SolverState, steps: Sequence[int], expert: str, go_on: Callable[[], None]
                 ) -> SolverState:
        """Take one prompt through the steps of one expert."""
        schedule, solver = self._settings.schedule, make_solver(SOLVER)
        scale = self._settings.scales[expert]
        for step in steps:
            timestep = schedule.timestep(step, 1, state.sample.device)
            cond = self._velocity(number, self._texts[number], state.sample, timestep)
            uncond = None
            if guidance.needs_uncond(scale):
                uncond = self._velocity(number, self._negative, state.sample, timestep)
            state = solver.advance(schedule, state, guidance.combine(cond, uncond, scale))
            go_on()
        return state

    def _velocity(self, number: int, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        assert self._told is not None
        channels, embeds = self._told[number].channels, self._told[number].image_embeds
        batch = Features(latents=x, text=as_batch(text, x.device), keys=[(number, 0)],
                         condition=None if channels is None else channels.to(x.device),
                         image_embeds=None if embeds is None else embeds.to(x.device))
        return predict(self._model, x, timestep, batch)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _write(self, latents: dict[int, Tensor], folder: Path) -> None:
        """Decode and write on the first rank of each data rank; the list of all videos on the very first."""
        if self._groups.tp_rank or self._groups.cp_rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        vae = open_vae(self._config, self._platform.device())
        for number, latent in latents.items():
            if not writes(number, self._groups.dims.data, self._groups.dp_rank):
                continue
            if not bool(latent.isfinite().all()):
                print(f" warning: validation video {number} is not finite and is left out", flush=True)
                continue
            write_mp4(folder / f"{number:03d}.mp4", to_frames(vae.decode(latent)[0].cpu()),
                      fps=self._settings.told["fps"])
        if is_first():
            videos = [{"file": f"{number:03d}.mp4", "prompt": prompt.prompt, "image": prompt.image}
                      for number, prompt in enumerate(self._prompts)]
            told = {"expert": self._trained, "other_expert": self._config.validation.other_expert,
                    "seed": self._config.training.seed, **self._settings.told, "videos": videos}
            write_text_atomic(folder / LIST_FILE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def prompts_of(count: int, ranks: int, rank: int) -> list[int]:
    """Return the prompts that a data rank samples: every ``ranks``-th.

    All ranks have equally many, because FSDP2 gathers for all of them together; a rank with one too few samples the
    last prompt, which another one writes.
    """
    return [min(turn * ranks + rank, count - 1) for turn in range(-(-count // ranks))]


def writes(number: int, ranks: int, rank: int) -> bool:
    """Tell whether a prompt is this data rank's own."""
    return number % ranks == rank


def _say(text: str) -> None:
    if is_first():
        print(f" {text}", flush=True)
