"""ODE solvers for the flow: UniPC, DPM++ 2M and Euler, each a pure function from one state to the next.

A solver holds options only. Everything a multistep method remembers is in :class:`SolverState`, so a run can be
stopped, saved and replayed, and ranks that hold equal states stay bit-equal. Solvers work on the data prediction
``x0 = x - sigma v`` with ``alpha = 1 - sigma`` and half log-SNR ``lambda = log(alpha / sigma)``; tensors are fp32 (or
fp64) and all coefficients are Python floats computed in fp64.

The last step, to sigma 0, is always first order (``lower_order_final``): any other choice divides by infinity.
A remembered point at sigma 1 (lambda = -inf) carries no information about slopes, so it lowers the order too, and
UniPC does not correct the step that started there.

Sources: UniPC, Zhao et al. 2023 (arXiv:2302.04867); DPM-Solver++, Lu et al. 2022 (arXiv:2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mindspeed_wan.diffusion.flow_matching import as_float, denoised_from_velocity
from mindspeed_wan.diffusion.schedule import SigmaSchedule
from mindspeed_wan.errors import ConfigError

MAX_UNIPC_ORDER = 3


@dataclass(frozen=True)
class SolverState:
    """Everything a run needs to go on: the position, the latent, and the multistep memory.

    Attributes:
        step: index of the next step, 0 at the start.
        sample: latent at ``sigmas[step]``.
        denoised: data predictions at ``sigmas[step - 1], sigmas[step - 2], ...``, newest first.
        anchor: corrected latent at ``sigmas[step - 1]``, from which UniPC's corrector starts again.
        order: order of the predictor that made ``sample``.
    """

    step: int
    sample: Tensor
    denoised: tuple[Tensor, ...] = ()
    anchor: Tensor | None = None
    order: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as a flat dict of tensors, for safetensors; ``from_tensors`` reads it back."""
        out = {"step": torch.tensor([self.step, self.order]), "sample": self.sample}
        out.update({f"denoised.{i}": x for i, x in enumerate(self.denoised)})
        if self.anchor is not None:
            out["anchor"] = self.anchor
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SolverState:
        """Read what ``tensors`` returned."""
        step, order = tensors["step"].tolist()
        count = sum(name.startswith("denoised.") for name in tensors)
        denoised = tuple(tensors[f"denoised.{i}"] for i in range(count))
        return cls(step, tensors["sample"], denoised, tensors.get("anchor"), order)


class Solver(Protocol):
    """One step of an ODE solver."""

    def advance(self, schedule: SigmaSchedule, state: SolverState, velocity: Tensor) -> SolverState:
        """Return the state one step on, given the model's velocity at ``(state.sample, sigmas[state.step])``."""
        ...


SOLVERS = ("unipc", "dpm++", "euler")


def make_solver(
    name: str, *, order: int = 2, variant: Literal["bh1", "bh2"] = "bh2", corrector: bool = True
) -> Solver:
    """Return the solver ``unipc`` (the options are its own), ``dpm++`` or ``euler``."""
    if name == "unipc":
        return UniPC(order, variant, corrector)
    if name == "dpm++":
        return DPMpp2M()
    if name == "euler":
        return Euler()
    raise ConfigError(f"solver is {name!r}", fix=f"use one of {', '.join(SOLVERS)}")


def half_log_snr(sigma: float) -> float:
    """Return ``log((1 - sigma) / sigma)``, -inf at 1 and +inf at 0."""
    if sigma >= 1.0:
        return -math.inf
    return math.inf if sigma <= 0.0 else math.log1p(-sigma) - math.log(sigma)


@dataclass(frozen=True)
class Euler:
    """``x' = x + (sigma' - sigma) v``: exact when the flow is straight."""

    def advance(self, schedule: SigmaSchedule, state: SolverState, velocity: Tensor) -> SolverState:
        """See :meth:`Solver.advance`."""
        sigma, sigma_next = schedule.sigmas[state.step : state.step + 2]
        sample = as_float(state.sample)
        return SolverState(state.step + 1, sample + (sigma_next - sigma) * velocity.to(sample.dtype))


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++ of second order, multistep, midpoint form."""

    def advance(self, schedule: SigmaSchedule, state: SolverState, velocity: Tensor) -> SolverState:
        """See :meth:`Solver.advance`."""
        step, sigmas = state.step, schedule.sigmas
        sample = as_float(state.sample)
        newest = denoised_from_velocity(sample, velocity, sigmas[step])
        lambda_now, lambda_next = half_log_snr(sigmas[step]), half_log_snr(sigmas[step + 1])
        h = lambda_next - lambda_now
        data = newest
        order = 1
        if state.denoised and step < schedule.num_steps - 1:
            ratio = (lambda_now - half_log_snr(sigmas[step - 1])) / h
            if math.isfinite(ratio):
                data = newest + (0.5 / ratio) * (newest - state.denoised[0])
                order = 2
        sample = (sigmas[step + 1] / sigmas[step]) * sample - (1 - sigmas[step + 1]) * math.expm1(-h) * data
        return SolverState(step + 1, sample, (newest,), None, order)


@dataclass(frozen=True)
class UniPC:
    """Unified predictor-corrector of order 1 to 3, data prediction.

    A step first corrects the latent it stands on, using the velocity just computed there, then predicts the next.
    ``variant`` is the paper's B(h): ``h`` (bh1) or ``e^h - 1`` (bh2).
    """

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    corrector: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MAX_UNIPC_ORDER:
            raise ConfigError(f"UniPC order {self.order}", fix=f"use 1 to {MAX_UNIPC_ORDER}")
        if self.variant not in ("bh1", "bh2"):
            raise ConfigError(f"UniPC variant is {self.variant!r}", fix="use bh1 or bh2")

    def advance(self, schedule: SigmaSchedule, state: SolverState, velocity: Tensor) -> SolverState:
        """See :meth:`Solver.advance`."""
        step, sigmas = state.step, schedule.sigmas
        sample = as_float(state.sample)
        newest = denoised_from_velocity(sample, velocity, sigmas[step])
        if self.corrector and state.anchor is not None and math.isfinite(half_log_snr(sigmas[step - 1])):
            past, order = (sigmas, step - 1, state.anchor, state.denoised), state.order
            sample = self._update(*past, order=order, corrected_by=newest)
        denoised = (newest, *state.denoised)[: self.order]
        order = self._usable_order(schedule, step, len(denoised))
        predicted = self._update(sigmas, step, sample, denoised, order=order)
        return SolverState(step + 1, predicted, denoised, sample, order)

    def _usable_order(self, schedule: SigmaSchedule, step: int, points: int) -> int:
        order = min(self.order, points, schedule.num_steps - step)
        while order > 1 and not math.isfinite(half_log_snr(schedule.sigmas[step - order + 1])):
            order -= 1
        return order

    def _update(
        self,
        sigmas: tuple[float, ...],
        step: int,
        sample: Tensor,
        denoised: tuple[Tensor, ...],
        *,
        order: int,
        corrected_by: Tensor | None = None,
    ) -> Tensor:
        """Go from ``sigmas[step]`` to the next: the predictor, or with ``corrected_by`` (x0 there) the corrector."""
        lambda_now, lambda_next = half_log_snr(sigmas[step]), half_log_snr(sigmas[step + 1])
        h = lambda_next - lambda_now
        nodes = [(half_log_snr(sigmas[step - i]) - lambda_now) / h for i in range(1, order)]
        slopes = [(denoised[i] - denoised[0]) / node for i, node in enumerate(nodes, start=1)]
        if corrected_by is not None:
            nodes.append(1.0)
            slopes.append(corrected_by - denoised[0])
        alpha_next = 1 - sigmas[step + 1]
        result = (sigmas[step + 1] / sigmas[step]) * sample - alpha_next * math.expm1(-h) * denoised[0]
        if not slopes:
            return result
        scale = -h if self.variant == "bh1" else math.expm1(-h)
        weights = _unipc_weights(h, nodes, scale, simplified=len(nodes) == 1)
        combined = sum((w * s for w, s in zip(weights[1:], slopes[1:])), weights[0] * slopes[0])
        return result - (alpha_next * scale) * combined


def _unipc_weights(h: float, nodes: list[float], scale: float, *, simplified: bool) -> list[float]:
    """Return the weights of the slopes that cancel the error up to order ``len(nodes)``.

    They solve ``sum_k weights[k] nodes[k]^(n-1) = n! phi_{n+1}(-h) / B`` for n = 1 .. len(nodes), with
    ``phi_{n+1}(x) = (phi_n(x) - 1/n!) / x`` and ``phi_1(x) x = e^x - 1``. With a single node any weight keeps the
    order, and the paper's choice, which every implementation follows, is 1/2.
    """
    if simplified:
        return [0.5]
    rhs, phi, factorial = [], math.expm1(-h) / -h - 1.0, 1.0
    for n in range(1, len(nodes) + 1):
        rhs.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / -h - 1.0 / factorial
    matrix = torch.tensor([[node**n for node in nodes] for n in range(len(nodes))], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(rhs, dtype=torch.float64)).tolist()
