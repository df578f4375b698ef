"""The denoising loop. It knows a schedule, a solver and a velocity function, and nothing about models or ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mindspeed_wan.diffusion.flow_matching import as_float
from mindspeed_wan.diffusion.schedule import SigmaSchedule
from mindspeed_wan.diffusion.solvers import Solver, SolverState
from mindspeed_wan.errors import NumericsError

VelocityFn = Callable[[Tensor, Tensor, int], Tensor]
"""``velocity_fn(x [B, ...], t [B] fp32 = 1000 sigma, step) -> velocity`` of x's shape; guidance happens inside."""

OnStep = Callable[[SolverState], None]
"""Called after every step with the new state; ``state.step`` steps are done."""


def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    schedule: SigmaSchedule,
    solver: Solver,
    on_step: OnStep | None = None,
    *,
    state: SolverState | None = None,
) -> Tensor:
    """Denoise ``noise`` along ``schedule`` and return the latents at its last sigma.

    Args:
        velocity_fn: the guided model.
        noise: standard normal [B, ...], the latent at ``sigmas[0]``; ignored when ``state`` is given.
        schedule: noise levels and timesteps.
        solver: ODE solver.
        on_step: progress, previews, saving the state.
        state: resume from here, with the memory an earlier run handed to ``on_step``.

    Returns:
        Latents in fp32 (fp64 when ``noise`` is fp64).

    Raises:
        NumericsError: the latent is not finite after the last step.
    """
    state = state or SolverState(0, as_float(noise))
    while state.step < schedule.num_steps:
        x = state.sample
        velocity = velocity_fn(x, schedule.timestep(state.step, x.shape[0], x.device), state.step)
        state = solver.advance(schedule, state, velocity)
        if on_step is not None:
            on_step(state)
    if not bool(state.sample.isfinite().all()):
        raise NumericsError(
            f"the latent has NaN or Inf after {schedule.num_steps} steps",
            fix="check the weights' dtype and the adapter weights; fp16 overflows in this model, use bf16 or fp32",
        )
    return state.sample
