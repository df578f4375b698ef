"""Kernels that torch.compile makes, against the reference formulas: values, gradients, and how often they compile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.rope import rotary_tables
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.platforms import get_platform, inductor, ops, reset_platform
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch, relative_error

HEADS, CHANNELS = 3, 8
DIM = HEADS * CHANNELS
Operation = tuple[Callable[..., Tensor], tuple[Any, ...]]


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Capture and differentiate as inductor would, without a C++ compiler; counts graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    inductor._compiled.cache_clear()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend="aot_eager", fullgraph=True))
    yield torch._dynamo.utils.counters["stats"]
    inductor._compiled.cache_clear()
    torch._dynamo.reset()


def _operations(length: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Operation]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    cos, sin = (table.expand(-1, 1, 1, -1) for table in rotary_tables(CHANNELS, (length, 1, 1), torch.device(device)))
    x, weight = normal(length, 2, DIM), normal(DIM)
    return {
        "rms_norm": (ops.rms_norm, (x, weight, 1e-6)),
        "rotary": (ops.rotary, (normal(length, 2, HEADS, CHANNELS), cos, sin)),
        "rms_norm_rotary": (ops.rms_norm_rotary, (x, weight, 1e-6, cos, sin)),
        "layer_norm": (ops.layer_norm, (x, weight, normal(DIM), 1e-6)),
        "modulated_layer_norm": (ops.modulated_layer_norm,
                                 (x, normal(2, DIM, dtype=torch.float32), normal(2, DIM, dtype=torch.float32), 1e-6)),
    }


def _check(kernels: str, dtype: torch.dtype, device: str = "cpu") -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for length in (5, 9):
        for name, (operation, arguments) in _operations(length, dtype, device).items():
            inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            results = []
            for in_use in ("torch", kernels):
                with ops.use(in_use):
                    out = operation(*arguments)
                cotangent = torch.ones_like(out).cumsum(0) / length
                results.append((out, *torch.autograd.grad(out, inputs, cotangent)))
            for found, expected in zip(results[1], results[0], strict=True):
                assert found.dtype == expected.dtype and found.shape == expected.shape, name
                torch.testing.assert_close(found, expected, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_graphs_compute_what_pytorch_computes(dtype: torch.dtype, compiles: Any) -> None:
    _check("inductor", dtype)


@pytest.mark.slow
def test_compiled_kernels_compute_it_too() -> None:
    """With the C++ compiler, as a CPU that asks for them would run them (about two minutes)."""
    _check("inductor", torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_compute_it_too(dtype: torch.dtype) -> None:
    _check("inductor", dtype, "cuda")


@pytest.mark.parametrize("plan", [
    pytest.param(None, marks=pytest.mark.slow), pytest.param(RecomputePlan(offload=True), marks=pytest.mark.slow),
    pytest.param(RecomputePlan(keep_attention=True), marks=pytest.mark.skipif(
        torch.__version__ < (2, 8), reason="torch 2.7 compiles nothing under selective recomputation")),
], ids=["plain", "recompute", "attention kept"])
def test_a_model_on_these_kernels(plan: RecomputePlan | None, compiles: Any) -> None:
    """Gradients of the whole model; one graph per operation and way of calling, then none for other clip sizes."""
    weights, results = mm_state_dict(diffusers_model(TINY), TINY), []
    for kernels in ("torch", "inductor"):
        model = WanDiT(TINY)
        model.load_state_dict(weights)
        if plan is not None:
            apply_recompute(model, plan)
        with ops.use(kernels):
            graphs = []
            for grid in ((1, 4, 6), (1, 6, 6), (1, 8, 6)):
                batch = random_batch(TINY, grid)
                model.zero_grad()
                model(batch.latents, batch.timestep, batch.text).square().mean().backward()
                graphs.append(compiles["unique_graphs"])
        results.append([p.grad for p in model.parameters()])
    assert graphs[0] > 0 and graphs[1] == graphs[-1]
    assert max(relative_error(b, a) for a, b in zip(*results, strict=True) if a.norm() > 1e-6) < 1e-5


def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    reset_platform()
    monkeypatch.setenv(ops.KERNELS_VARIABLE, "inductor")
    monkeypatch.setenv("CXX", sys.executable)  # any program: nothing is compiled here
    get_platform("cpu").activate()
    assert ops.kernels_in_use() == "inductor"
    reset_platform()
    assert ops.kernels_in_use() == "torch"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match=r"MINDSPEED_WAN_KERNELS=inductor needs a C\+\+ compiler"):
        get_platform("cpu").activate()
    monkeypatch.setenv(ops.KERNELS_VARIABLE, "npu")
    with pytest.raises(ConfigError, match="MINDSPEED_WAN_KERNELS=npu is not known on cpu"):
        get_platform("cpu").activate()
    monkeypatch.delenv(ops.KERNELS_VARIABLE)
    get_platform("cpu").activate()
    assert ops.kernels_in_use() == "torch"
    reset_platform()
