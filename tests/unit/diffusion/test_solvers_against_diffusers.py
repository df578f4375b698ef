"""Every solver step by step against diffusers' schedulers on a nonlinear toy velocity field."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.diffusion.sampler import sample
from mindspeed_wan.diffusion.schedule import sigmas
from mindspeed_wan.diffusion.solvers import Solver, SolverState, make_solver
from tests.unit.diffusion.toy import bent, noise, relative_error

schedulers = pytest.importorskip("diffusers.schedulers")


def reference_run(scheduler, num_steps: int, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the latents after every step."""
    scheduler.set_timesteps(num_steps)
    latents = []
    for step, t in enumerate(scheduler.timesteps):
        velocity = bent(x, t.float().expand(x.shape[0]), step)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
        latents.append(x)
    return latents


def check(scheduler, solver_name: str, solver: Solver, num_steps: int, shift: float) -> None:
    schedule = sigmas(num_steps, shift, "diffusers", solver_name)
    scheduler.set_timesteps(num_steps)
    one_ulp = 1e-4 if solver_name == "euler" else 0.0  # diffusers' Euler computes its sigmas partly in fp32
    ours_timesteps = torch.tensor(schedule.timesteps, dtype=torch.float64)
    assert torch.allclose(scheduler.timesteps.double(), ours_timesteps, rtol=0, atol=one_ulp)
    ours_sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64)
    assert torch.allclose(scheduler.sigmas.double(), ours_sigmas, rtol=0, atol=6e-8)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 5e-7)):
        expected = reference_run(scheduler, num_steps, noise(dtype))
        actual: list[torch.Tensor] = []
        sample(bent, noise(dtype), schedule, solver, lambda state, out=actual: out.append(state.sample))
        assert len(actual) == num_steps
        if scheduler.config.get("solver_type") == "bh1":  # diffusers' bh1 ends in NaN: it multiplies 0 by log(0)
            actual, expected = actual[:-1], expected[:-1]
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_error(ours, theirs) <= bound, (dtype, solver_name, num_steps, shift)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [2, 4, 11, 40])
@pytest.mark.parametrize(("order", "variant"), [(1, "bh2"), (2, "bh2"), (2, "bh1"), (3, "bh2"), (3, "bh1")])
def test_unipc(shift: float, num_steps: int, order: int, variant: str) -> None:
    scheduler = schedulers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order,
        solver_type=variant,
    )
    check(scheduler, "unipc", make_solver("unipc", order=order, variant=variant), num_steps, shift)


def test_unipc_without_corrector() -> None:
    scheduler = schedulers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, disable_corrector=list(range(40)),
    )
    check(scheduler, "unipc", make_solver("unipc", corrector=False), 20, 5.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 40])
def test_dpmpp(shift: float, num_steps: int) -> None:
    scheduler = schedulers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2,
        algorithm_type="dpmsolver++", solver_type="midpoint",
    )
    check(scheduler, "dpm++", make_solver("dpm++"), num_steps, shift)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [2, 7, 50])
def test_euler(shift: float, num_steps: int) -> None:
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    check(scheduler, "euler", make_solver("euler"), num_steps, shift)


def test_orders_really_differ() -> None:
    """The toy field tells the orders apart by far more than the tolerance above."""
    schedule = sigmas(10, 5.0, "diffusers")
    results = [sample(bent, noise(), schedule, make_solver("unipc", order=order)) for order in (1, 2, 3)]
    results.append(sample(bent, noise(), schedule, make_solver("unipc", order=2, variant="bh1")))
    results.append(sample(bent, noise(), schedule, make_solver("unipc", order=2, corrector=False)))
    for i, a in enumerate(results):
        for b in results[:i]:
            assert relative_error(a, b) > 1e-5


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_resumed_run_is_bit_equal(name: str) -> None:
    schedule = sigmas(12, 5.0, "official", name)
    saved: list[dict[str, torch.Tensor]] = []

    def save(state: SolverState) -> None:
        saved.append({key: value.clone() for key, value in state.tensors().items()})

    whole = sample(bent, noise(torch.float32), schedule, make_solver(name), save)
    assert [int(s["step"][0]) for s in saved] == list(range(1, 13))
    for stop in (1, 5, 11, 12):
        state = SolverState.from_tensors(saved[stop - 1])
        assert torch.equal(sample(bent, noise(torch.float32), schedule, make_solver(name), state=state), whole)
