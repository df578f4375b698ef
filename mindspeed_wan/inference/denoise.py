"""One video's latents: noise, guidance, the two experts, the solver. Everything that repeats every step is here.

Texts are embedded once per prompt and expert; a step costs one or two forward passes (side by side with CFG parallel)
and nothing else worth naming. Which steps run the unconditional pass is a plan made before the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.diffusion import guidance
from mindspeed_wan.diffusion.randomness import normal
from mindspeed_wan.diffusion.sampler import sample
from mindspeed_wan.diffusion.schedule import SigmaSchedule
from mindspeed_wan.diffusion.solvers import Solver, SolverState
from mindspeed_wan.inference.calibration import Recorder
from mindspeed_wan.inference.experts import Experts
from mindspeed_wan.inference.guidance_options import GuidanceOptions, GuidancePlan
from mindspeed_wan.inference.pipeline_stages import Pass, Runner, WholeModel
from mindspeed_wan.inference.runtime import Runtime
from mindspeed_wan.inference.step_cache import StepCache
from mindspeed_wan.models.wan.model import TextContext

NOISE_STREAM = "inference/noise"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the model is told about one video.

    Attributes:
        prompt, negative: text states [L, text_dim].
        channels: [1, 20, f, h, w] mask and conditioning latent of I2V, ``None`` for T2V.
        image_embeds: [1, 257, 1280] CLIP states of Wan2.1 I2V.
    """

    prompt: Tensor
    negative: Tensor
    channels: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass
class StepTimes:
    """Seconds of every step by expert, the device synchronised at each end.

    ``evaluations`` counts the times this rank ran the blocks of a DiT: what a step cache or a guidance plan saves.
    ``processor_seconds`` is this process's processor time over all steps.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    evaluations: int = 0
    processor_seconds: float = 0.0

    def add(self, expert: str, seconds: float) -> None:
        """Record one step."""
        self.seconds.setdefault(expert, []).append(seconds)


OnProgress = Callable[[int, str, float], None]
"""Called after each step with (steps done, expert, seconds of the step)."""


class Denoiser:
    """Runs the sampler with the expert of each step.

    Args:
        experts: gives the DiT of an expert.
        schedule, solver: see ``diffusion``.
        scales: guidance scale of ``high`` and ``low``.
        boundary: sigma at which the experts change; ``None`` with one expert.
        cache: skips blocks at some steps, or measures how much they change.
        guidance_plan: which steps run the unconditional branch; ``None``: every step of an expert with a scale.
        runner: runs the passes of a step; ``None``: this rank has the whole model.
    """

    def __init__(
        self, experts: Experts, runtime: Runtime, schedule: SigmaSchedule, solver: Solver,
        *, scales: dict[str, float], boundary: float | None, cache: StepCache | Recorder | None = None,
        guidance_plan: GuidancePlan | None = None, runner: Runner | None = None,
    ) -> None:
        self._experts, self._runtime, self._runner = experts, runtime, runner or WholeModel()
        self._schedule, self._solver = schedule, solver
        self._scales, self._boundary, self._cache = scales, boundary, cache
        self._plan = guidance_plan or GuidanceOptions().plan(schedule, boundary, scales)
        if isinstance(cache, StepCache):
            cache.restart_at(self._plan.starts)

    @torch.no_grad()
    def run(
        self, noise: Tensor, conditions: Conditions, on_progress: OnProgress | None = None
    ) -> tuple[Tensor, StepTimes]:
        """Denoise ``noise`` [1, 16, f, h, w]; returns latents of that shape in fp32, the same on every rank.

        Raises:
            NumericsError: the latents are not finite.
        """
        times = StepTimes()
        held = _Held()
        platform, started, processor = self._runtime.platform, time.perf_counter(), time.process_time()

        def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
            nonlocal held
            expert = self._schedule.expert(step, self._boundary)
            if held.expert != expert:
                held = _Held(expert)
            return self._guided(step, x, t, conditions, held, times)

        def after(state: SolverState) -> None:
            nonlocal started
            platform.synchronize()
            now = time.perf_counter()
            expert = self._schedule.expert(state.step - 1, self._boundary)
            times.add(expert, now - started)
            if on_progress is not None:
                on_progress(state.step, expert, now - started)
            started = now

        latents = sample(velocity, noise, self._schedule, self._solver, after)
        times.processor_seconds = time.process_time() - processor
        return latents, times

    def _guided(
        self, step: int, x: Tensor, t: Tensor, conditions: Conditions, held: _Held, times: StepTimes
    ) -> Tensor:
        """Return the guided velocity of one step."""
        model, cache, mode = self._experts.use(held.expert), self._cache, self._plan.modes[step]
        if cache is not None:
            cache.begin(step, held.expert, lambda other: self._runner.time_modulation(
                model, self._schedule.timestep(other, 1, x.device)))
        inputs = x if conditions.channels is None else torch.cat([x, conditions.channels.to(x.dtype)], dim=1)

        self._runner.begin(held.expert, step)

        def branch(negative: bool) -> Pass:
            if negative not in held.texts:
                states = conditions.negative if negative else conditions.prompt
                held.texts[negative] = self._runner.encode_text(model, states.unsqueeze(0), conditions.image_embeds)
            name = "uncond" if negative else "cond"
            return Pass(name, held.texts[negative], cache.around(name) if cache is not None else None, counted)

        def counted() -> None:
            times.evaluations += cache is None or cache.computed

        cond: Tensor
        uncond: Tensor | None = None
        if self._runtime.cfg_group is not None:
            # Both ranks run at every step, whatever the plan: the blocks' weights may be sharded over the two.
            (mine,) = self._runner.run(model, inputs, t, [branch(self._runtime.branch == 1)])
            cond, uncond = self._exchange(mine)
        else:
            passes = [branch(False), branch(True)] if mode == "guided" else [branch(False)]
            cond, *others = self._runner.run(model, inputs, t, passes)
            uncond = others[0] if others else None
        if mode == "plain":
            return guidance.combine(cond, None, 1.0)
        if mode == "guided":
            assert uncond is not None
            held.difference = cond - uncond if "reused" in self._plan.modes[step:] else None
        else:
            assert held.difference is not None
            uncond = cond - held.difference
        return guidance.combine(cond, uncond, self._scales[held.expert])

    def _exchange(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conditional, unconditional) velocity from the two ranks that computed one each."""
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine.contiguous(), group=self._runtime.cfg_group)
        return both[0], both[1]


@dataclass
class _Held:
    """What is kept between the steps of one expert: for A14B each text context is 420 MB.

    Attributes:
        expert: whose it is.
        texts: contexts by branch, ``True`` is the unconditional one.
        difference: conditional minus unconditional velocity of the last guided step, where a later step reuses it.
    """

    expert: str = ""
    texts: dict[bool, TextContext] = field(default_factory=dict)
    difference: Tensor | None = None


def draw_noise(kind: str, shape: tuple[int, int, int], seed: int, device: torch.device) -> Tensor:
    """Return the starting noise [1, 16, f, h, w] in fp32 on ``device``.

    ``ours`` is counter-based and the same on every device and torch version; ``diffusers`` is what its pipeline draws
    from ``torch.Generator("cpu").manual_seed(seed)``; ``official`` draws on the device as Wan's own code does.
    """
    size = (1, 16, *shape)
    if kind == "ours":
        return normal(size, seed=seed, sample_index=0, stream=NOISE_STREAM).to(device)
    if kind == "diffusers":
        return torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size[1:], generator=generator, device=device, dtype=torch.float32).unsqueeze(0)
