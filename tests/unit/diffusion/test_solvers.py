"""The solvers against first principles: exact flows, an independent re-derivation of UniPC, order of convergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mindspeed_wan.diffusion.flow_matching import denoised_from_velocity, interpolate, velocity_target
from mindspeed_wan.diffusion.guidance import combine
from mindspeed_wan.diffusion.sampler import sample
from mindspeed_wan.diffusion.schedule import SigmaSchedule, sigmas
from mindspeed_wan.diffusion.solvers import Euler, Solver, SolverState, make_solver
from mindspeed_wan.errors import ConfigError, NumericsError
from tests.unit.diffusion.toy import bent, noise, relative_error

ALL_SOLVERS = [
    make_solver("euler"), make_solver("dpm++"), make_solver("unipc"), make_solver("unipc", order=3),
    make_solver("unipc", order=1), make_solver("unipc", variant="bh1"), make_solver("unipc", corrector=False),
]
GRIDS = ["official", "diffusers", "diffsynth"]
DISTILLED = sigmas(4, 5.0, "diffsynth", "euler")
"""What the preset lightx2v asks for."""


def ids(solver: Solver) -> str:
    return str(solver)


# ---- a straight flow is solved exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL_SOLVERS, ids=ids)
@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=15, deadline=None)
@given(num_steps=st.integers(1, 50), shift=st.floats(0.5, 20.0), seed=st.integers(0, 2**20))
def test_oracle_velocity_recovers_the_data(solver: Solver, grid: str, num_steps: int, shift: float, seed: int) -> None:
    """With v = noise - x0 every solver follows the line x_t = (1 - sigma) x0 + sigma noise and ends at x0."""
    schedule = sigmas(num_steps, shift, grid)
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    epsilon = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    start = interpolate(x0, epsilon, schedule.sigmas[0])

    def on_step(state: SolverState) -> None:
        line = interpolate(x0, epsilon, schedule.sigmas[state.step])
        assert torch.allclose(state.sample, line, rtol=0, atol=1e-9)

    result = sample(lambda x, t, step: velocity_target(x0, epsilon), start, schedule, solver, on_step)
    assert torch.allclose(result, x0, rtol=0, atol=1e-9)


@given(sigma=st.floats(0.0, 1.0), seed=st.integers(0, 2**20))
@settings(max_examples=50, deadline=None)
def test_interpolation_target_and_data_prediction_agree(sigma: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x0, epsilon = torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64).unbind(0)
    x_t, velocity = interpolate(x0, epsilon, sigma), velocity_target(x0, epsilon)
    assert torch.allclose(denoised_from_velocity(x_t, velocity, sigma), x0, atol=1e-12)
    assert torch.allclose(x_t + (1 - sigma) * velocity, epsilon, atol=1e-12)


# ---- UniPC re-derived -------------------------------------------------------------------------------------------


def exact_step(values: tuple[float, float], lambdas: tuple[float, float], x: float, nodes: list[tuple[float, float]]):
    """Solve the flow from one noise level to the next by the variation-of-constants formula, by quadrature.

    ``x' = (sigma' / sigma) x + sigma' * integral of e^lambda P(lambda)`` where P is the polynomial through ``nodes``
    (lambda, data prediction). The paper's coefficients make UniPC equal to this, whatever B(h) is.
    """
    (sigma, sigma_next), (start, stop) = values, lambdas
    position, weight = np.polynomial.legendre.leggauss(60)
    grid = start + (stop - start) * (position + 1) / 2
    polynomial = np.zeros_like(grid)
    for i, (node, value) in enumerate(nodes):
        others = [other for j, (other, _) in enumerate(nodes) if j != i]
        polynomial += value * np.prod([(grid - o) / (node - o) for o in others], axis=0)
    # e^(lambda - stop) keeps the integrand finite; sigma' e^stop = alpha'.
    integral = float(np.sum(weight * np.exp(grid - stop) * polynomial) * (stop - start) / 2)
    return sigma_next / sigma * x + (1 - sigma_next) * integral


def slow_unipc(schedule: SigmaSchedule, x: float, order: int, velocity) -> float:
    """UniPC-bh2 of one number, written from the paper with no shared code."""
    levels = list(schedule.sigmas)
    lam = [math.log((1 - s) / s) for s in levels[:-1]]
    history: list[tuple[float, float]] = []
    anchor, anchor_order = x, 0
    for i in range(len(levels) - 1):
        data = x - levels[i] * velocity(x, schedule.timesteps[i])
        if i > 0:  # correct the step i-1 -> i, now that the data prediction at its end is known
            span, lambdas = (levels[i - 1], levels[i]), (lam[i - 1], lam[i])
            if anchor_order == 1:
                plain = exact_step(span, lambdas, anchor, history[-1:])
                x = plain + (1 - levels[i]) * (1 - math.exp(lam[i - 1] - lam[i])) * 0.5 * (data - history[-1][1])
            else:
                x = exact_step(span, lambdas, anchor, [*history[-anchor_order:], (lam[i], data)])
        history.append((lam[i], data))
        if i == len(levels) - 2:
            return data
        anchor, anchor_order = x, min(order, i + 1, len(levels) - 1 - i)
        span, lambdas = (levels[i], levels[i + 1]), (lam[i], lam[i + 1])
        if anchor_order == 2:  # the paper's simplification: weight 1/2 instead of the polynomial through two points
            slope = (history[-1][1] - history[-2][1]) / (lam[i] - lam[i - 1]) * (lam[i + 1] - lam[i])
            plain = exact_step(span, lambdas, x, history[-1:])
            x = plain + (1 - levels[i + 1]) * (1 - math.exp(lam[i] - lam[i + 1])) * 0.5 * slope
        else:
            x = exact_step(span, lambdas, x, history[-anchor_order:])
    raise AssertionError("unreachable")


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("num_steps", "shift"), [(3, 5.0), (10, 3.0), (20, 12.0), (40, 12.0), (40, 5.0)])
def test_unipc_on_the_official_grid_equals_the_formulas(order: int, num_steps: int, shift: float) -> None:
    schedule = sigmas(num_steps, shift, "official", "unipc")

    def scalar_velocity(x: float, t: float) -> float:
        value = torch.tensor([[x]], dtype=torch.float64)
        return float(bent(value, torch.tensor([t], dtype=torch.float64), 0))

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return bent(x, t.double(), step)

    for start in (-1.3, 0.2, 0.9):
        expected = slow_unipc(schedule, start, order, scalar_velocity)
        begin = torch.tensor([[start]], dtype=torch.float64)
        actual = float(sample(velocity, begin, schedule, make_solver("unipc", order=order)))
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(
    ("solver", "least_order"),
    [(make_solver("euler"), 0.8), (make_solver("dpm++"), 1.7), (make_solver("unipc"), 2.0),
     (make_solver("unipc", order=3), 2.3)],
    ids=str,
)
def test_order_of_convergence(solver: Solver, least_order: float) -> None:
    """Halving the step divides the error by 2^order; the flow stops at sigma 0.2, before the last first-order step."""

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.sin(2 * x) + (t.double() / 1000).reshape(-1, 1) * x

    def run(num_steps: int, with_solver: Solver) -> Tensor:
        levels = torch.linspace(0.9, 0.2, num_steps + 1, dtype=torch.float64).tolist()
        schedule = SigmaSchedule((*levels, 0.0), tuple(1000 * s for s in levels))
        latents: list[Tensor] = []
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1)
        sample(velocity, x, schedule, with_solver, lambda state: latents.append(state.sample))
        return latents[num_steps - 1]

    exact = run(2000, make_solver("unipc", order=3))
    coarse, fine = (relative_error(run(n, solver), exact) for n in (20, 40))
    assert math.log2(coarse / fine) > least_order


# ---- ends of the noise axis, explicit lists, guards -------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL_SOLVERS, ids=ids)
def test_a_start_at_pure_noise_is_finite(solver: Solver) -> None:
    """Sigma 1 has log-SNR -inf; no solver may turn that into NaN (DPM++'s official grid starts there)."""
    for schedule in (sigmas(8, 12.0, "official", "dpm++"), DISTILLED, SigmaSchedule((1.0, 0.0), (1000.0,))):
        assert torch.isfinite(sample(bent, noise(torch.float32), schedule, solver)).all()


def test_distilled_steps() -> None:
    assert DISTILLED.sigmas == pytest.approx((1.0, 0.9375, 0.833333, 0.625, 0.0), abs=1e-6)
    assert DISTILLED.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-4)
    assert DISTILLED.expert_steps(0.875) == DISTILLED.expert_steps(0.900) == (2, 2)


def test_distilled_step_is_predict_and_renoise() -> None:
    """lightx2v's rule, x0 = x - sigma v then x0 + sigma' v, is Euler."""
    schedule, x = DISTILLED, noise()
    velocity = bent(x, torch.full((2,), 1000.0), 0)
    state = Euler().advance(schedule, SolverState(0, x), velocity)
    expected = (x - schedule.sigmas[0] * velocity) + schedule.sigmas[1] * velocity
    assert torch.allclose(state.sample, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "shift", "boundary", "expected"),
    [(40, 12.0, 0.875, (26, 14)), (50, 12.0, 0.875, (32, 18)), (40, 5.0, 0.875, (17, 23)), (40, 3.0, 0.875, (12, 28)),
     (50, 5.0, 0.875, (21, 29)), (50, 3.0, 0.875, (15, 35)), (40, 5.0, 0.900, (15, 25)), (50, 5.0, 0.900, (18, 32)),
     (50, 3.0, 0.900, (13, 37)), (40, 5.0, None, (40, 0))],
)
def test_known_expert_step_counts(num_steps: int, shift: float, boundary: float | None, expected: tuple) -> None:
    assert sigmas(num_steps, shift, "official").expert_steps(boundary) == expected


@pytest.mark.parametrize(("shift", "high_t2v", "high_i2v"), [(3.0, 13, 11), (5.0, 17, 15), (12.0, 26, 23)])
def test_known_expert_step_counts_on_diffusers_grid(shift: float, high_t2v: int, high_i2v: int) -> None:
    schedule = sigmas(40, shift, "diffusers")
    assert (schedule.expert_steps(0.875)[0], schedule.expert_steps(0.900)[0]) == (high_t2v, high_i2v)


@given(num_steps=st.integers(1, 100), shift=st.floats(0.2, 30.0), grid=st.sampled_from(GRIDS),
       solver=st.sampled_from(["unipc", "dpm++", "euler"]))
@settings(max_examples=80, deadline=None)
def test_schedules_fall_from_noise_to_data(num_steps: int, shift: float, grid: str, solver: str) -> None:
    schedule = sigmas(num_steps, shift, grid, solver)
    assert schedule.num_steps == num_steps
    assert schedule.sigmas[-1] == 0.0
    assert 0.99 < schedule.sigmas[0] <= 1.0
    assert all(abs(t - 1000 * s) <= 1.001 for t, s in zip(schedule.timesteps, schedule.sigmas))
    high, low = schedule.expert_steps(0.875)
    assert high + low == num_steps
    experts = [schedule.expert(i, 0.875) for i in range(num_steps)]
    assert experts == ["high"] * high + ["low"] * low


@pytest.mark.parametrize(
    "make",
    [lambda: make_solver("heun"), lambda: make_solver("unipc", order=4), lambda: make_solver("unipc", variant="bh3"),
     lambda: sigmas(0, 5.0), lambda: sigmas(10, -1.0), lambda: sigmas(10, 5.0, "mm"),
     lambda: sigmas(10, 5.0, "official", "ddim"), lambda: SigmaSchedule((0.0,), ()),
     lambda: SigmaSchedule((0.2, 0.9, 0.0), (200.0, 900.0)), lambda: SigmaSchedule((1.5, 0.0), (1500.0,))],
)
def test_bad_settings_are_config_errors(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_nan_is_reported() -> None:
    with pytest.raises(NumericsError):
        sample(lambda x, t, step: x * float("nan"), noise(), sigmas(3, 5.0), Euler())


def test_velocity_function_sees_fp32_timesteps_per_sample() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    schedule = sigmas(5, 12.0)
    sample(velocity, noise(torch.float32), schedule, Euler())
    assert [float(t[0]) for t in seen] == [float(int(s * 1000)) for s in schedule.sigmas[:-1]]
    assert all(t.dtype == torch.float32 and t.shape == (2,) for t in seen)


def test_guidance() -> None:
    cond, uncond = noise(torch.bfloat16), noise(torch.bfloat16).flip(0)
    assert torch.equal(combine(cond, None, 4.0), cond.float())
    assert torch.allclose(combine(cond, uncond, 1.0), cond.float(), atol=1e-6)
    assert torch.equal(combine(cond, uncond, 0.0), uncond.float())
    expected = uncond.float() + 3.5 * (cond.float() - uncond.float())
    assert torch.equal(combine(cond, uncond, 3.5), expected)
