"""Inference sigma grids by name, and which expert owns which step.

The grids of the systems users compare with differ in their ends (up to 7e-3 at shift 12), so each is written out:

=========== =================== =============================================================== ==============
grid        solver              base sigmas before the shift                                    timesteps
=========== =================== =============================================================== ==============
official    unipc               linspace(0.999, 0, N + 1) without the last                       truncated
official    dpm++               linspace(1, 0, N + 1) without the last                           truncated
official    euler               as dpm++ (Wan's own code has no Euler)                           truncated
diffusers   unipc               linspace(1, 0.001, N + 1) without the last; first minus 1e-6     truncated
diffusers   dpm++               linspace(0.999, 0, N + 1) without the last                       truncated
diffusers   euler               linspace(1, shifted 0.001, N)                                    fp32
diffsynth   any                 linspace(1, 0, N + 1) without the last                           fp32
=========== =================== =============================================================== ==============

Each is then shifted and ends at sigma 0. Sigmas are rounded to fp32 as in all of those systems: near pure noise the
rounding of ``1 - sigma`` is visible in the solvers' log-SNR. Sources: Wan2.2 ``fm_solvers{,_unipc}.py``, diffusers
``scheduling_{unipc,dpmsolver}_multistep.py`` and ``scheduling_flow_match_euler_discrete.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mindspeed_wan.diffusion.timesteps import NUM_TRAIN_TIMESTEPS, shift_sigma
from mindspeed_wan.errors import ConfigError

GridName = Literal["official", "diffusers", "diffsynth"]
SolverName = Literal["unipc", "dpm++", "euler"]

@dataclass(frozen=True)
class SigmaSchedule:
    """The noise levels of one denoising run.

    Attributes:
        sigmas: N + 1 descending noise fractions, the last is where the run ends (0), each an fp32 value.
        timesteps: N values of t for the model, as floats (whole numbers where the grid truncates).
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise ConfigError(f"{len(self.sigmas)} sigmas and {len(self.timesteps)} timesteps are not a schedule")
        if not all(1.0 >= a > b >= 0.0 for a, b in zip(self.sigmas, self.sigmas[1:])):
            shown = ", ".join(f"{s:.4g}" for s in self.sigmas)
            raise ConfigError(f"sigmas must fall strictly inside [0, 1], got {shown}")

    @property
    def num_steps(self) -> int:
        """Number of solver steps, which is the number of model calls without CFG."""
        return len(self.timesteps)

    def timestep(self, step: int, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """Return t of ``step`` as an fp32 tensor [batch] for the model."""
        return torch.full((batch,), self.timesteps[step], dtype=torch.float32, device=device)

    def expert(self, step: int, boundary: float | None) -> Literal["high", "low"]:
        """Return the expert of ``step``: high when ``t >= 1000 boundary``; a model with one DiT is ``high``."""
        if boundary is None or self.timesteps[step] >= boundary * NUM_TRAIN_TIMESTEPS:
            return "high"
        return "low"

    def expert_steps(self, boundary: float | None) -> tuple[int, int]:
        """Return (high, low) step counts: 40 steps are 26 + 14 for T2V (shift 12), 15 + 25 for I2V (shift 5)."""
        high = sum(self.expert(step, boundary) == "high" for step in range(self.num_steps))
        return high, self.num_steps - high


def sigmas(
    num_steps: int, shift: float, grid: GridName = "official", solver: SolverName = "unipc"
) -> SigmaSchedule:
    """Return the schedule of ``num_steps`` steps on a named grid (table in the module docstring)."""
    if num_steps < 1:
        raise ConfigError(f"{num_steps} sampling steps", fix="use at least 1")
    if not shift > 0:
        raise ConfigError(f"flow shift {shift} is not positive")
    if solver not in get_args(SolverName):
        raise ConfigError(f"solver is {solver!r}", fix=f"use one of {', '.join(get_args(SolverName))}")
    if grid not in get_args(GridName):
        raise ConfigError(f"sigma grid is {grid!r}", fix=f"use one of {', '.join(get_args(GridName))}")
    shifted = shift_sigma(_base(num_steps, shift, grid, solver), shift)
    if grid == "diffusers" and solver == "unipc" and abs(float(shifted[0]) - 1) < 1e-6:
        shifted[0] -= 1e-6  # diffusers keeps log(1 - sigma) finite this way
    truncated = grid == "official" or (grid == "diffusers" and solver != "euler")
    return _schedule(shifted, truncated=truncated)


def _base(num_steps: int, shift: float, grid: GridName, solver: SolverName) -> Tensor:
    """Return the fp64 grid before the shift, [num_steps]."""
    # The official scheduler reads its largest sigma back from an fp32 tensor.
    largest = float(torch.tensor(0.999, dtype=torch.float32)) if grid == "official" else 0.999
    if (grid, solver) in (("official", "unipc"), ("diffusers", "dpm++")):
        return _linspace(largest, 0.0, num_steps + 1)[:-1]
    if (grid, solver) == ("diffusers", "unipc"):
        return _linspace(1.0, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1]
    if (grid, solver) == ("diffusers", "euler"):
        # Its constructor shifts the 1000 training sigmas, its set_timesteps shifts the smallest of them again.
        return _linspace(1.0, shift_sigma(1 / NUM_TRAIN_TIMESTEPS, shift), num_steps)
    return _linspace(1.0, 0.0, num_steps + 1)[:-1]


def _linspace(start: float, stop: float, count: int) -> Tensor:
    return torch.linspace(start, stop, count, dtype=torch.float64)


def _schedule(values: Tensor, *, truncated: bool) -> SigmaSchedule:
    rounded = values.float()
    timesteps = (values * NUM_TRAIN_TIMESTEPS).long() if truncated else rounded * NUM_TRAIN_TIMESTEPS
    return SigmaSchedule((*rounded.double().tolist(), 0.0), tuple(timesteps.double().tolist()))
