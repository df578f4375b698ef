"""One video's latents: noise, guidance, the two experts, the solver. Everything that repeats every step is here.

Texts are embedded once per prompt and expert; a step costs one or two forward passes (side by side with CFG parallel)
and nothing else worth naming.
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
from mindspeed_wan.inference.experts import Experts
from mindspeed_wan.inference.runtime import Runtime
from mindspeed_wan.inference.step_cache import Recorder, StepCache
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
    """Seconds of every step by expert, the device synchronised at each end."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

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
    """

    def __init__(
        self, experts: Experts, runtime: Runtime, schedule: SigmaSchedule, solver: Solver,
        *, scales: dict[str, float], boundary: float | None, cache: StepCache | Recorder | None = None,
    ) -> None:
        self._experts, self._runtime = experts, runtime
        self._schedule, self._solver = schedule, solver
        self._scales, self._boundary, self._cache = scales, boundary, cache

    @torch.no_grad()
    def run(
        self, noise: Tensor, conditions: Conditions, on_progress: OnProgress | None = None
    ) -> tuple[Tensor, StepTimes]:
        """Denoise ``noise`` [1, 16, f, h, w]; returns latents of that shape in fp32, the same on every rank.

        Raises:
            NumericsError: the latents are not finite.
        """
        times = StepTimes()
        # Contexts of one expert at a time: for A14B each holds 420 MB.
        held: dict[tuple[str, bool], TextContext] = {}
        platform, started = self._runtime.platform, time.perf_counter()

        def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
            expert = self._schedule.expert(step, self._boundary)
            if held and next(iter(held))[0] != expert:
                held.clear()
            return self._guided(step, expert, x, t, conditions, held)

        def after(state: SolverState) -> None:
            nonlocal started
            platform.synchronize()
            now = time.perf_counter()
            expert = self._schedule.expert(state.step - 1, self._boundary)
            times.add(expert, now - started)
            if on_progress is not None:
                on_progress(state.step, expert, now - started)
            started = now

        return sample(velocity, noise, self._schedule, self._solver, after), times

    def _guided(
        self, step: int, expert: str, x: Tensor, t: Tensor, conditions: Conditions,
        held: dict[tuple[str, bool], TextContext],
    ) -> Tensor:
        """Return the guided velocity of one step."""
        model, cache = self._experts.use(expert), self._cache
        if cache is not None:
            cache.begin(step, expert, model)
        inputs = x if conditions.channels is None else torch.cat([x, conditions.channels.to(x.dtype)], dim=1)

        def branch(negative: bool) -> Tensor:
            if (expert, negative) not in held:
                states = conditions.negative if negative else conditions.prompt
                held[expert, negative] = model.encode_text(states.unsqueeze(0), conditions.image_embeds)
            around = cache.around("uncond" if negative else "cond") if cache is not None else None
            return model(inputs, t, text_context=held[expert, negative], around_blocks=around)

        scale = self._scales[expert]
        if not guidance.needs_uncond(scale):
            return guidance.combine(branch(False), None, scale)
        if self._runtime.cfg_group is None:
            return guidance.combine(branch(False), branch(True), scale)
        mine = branch(self._runtime.branch == 1).contiguous()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=self._runtime.cfg_group)
        return guidance.combine(both[0], both[1], scale)


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
