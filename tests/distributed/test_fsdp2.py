"""FSDP2 beyond equal gradients: mixed precision, memory, methods besides forward, accumulation, initial weights."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from mindspeed_wan.models.wan.provider import build_wan, init_weights
from mindspeed_wan.models.wan.views import global_views
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import build_groups, destroy
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import Fsdp2, fill, gathered_grads, local_loss
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch, relative_error
from tests.helpers.spawn import run_ranks

MIXED = Fsdp2(param_dtype="bf16", reduce_dtype="fp32")


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, torch.Tensor], Batch]:
    return mm_state_dict(diffusers_model(TINY), TINY), random_batch(TINY, (1, 6, 10), timesteps=(997.0, 31.5))


def _mixed_precision(
    rank: int, world_size: int, dims: dict[str, int], weights: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, float, bool]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **dims), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=MIXED, residual_dtype=torch.float32)
    fill(model, weights, groups)
    seen = []
    model.time_embedding.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    output, loss = local_loss(model, groups, batch)
    loss.backward()
    norm = finish_grads(model, groups, 0.0)
    masters = all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    islands = all(t.dtype == torch.float32 for pair in seen for t in pair)
    destroy()
    return output.detach(), norm, masters and islands


@pytest.mark.parametrize(("world_size", "dims"), [(1, {}), (2, {"context": 2}), (4, {"tensor": 2, "context": 2})])
def test_bf16_compute_with_fp32_masters_and_islands(
    world_size: int, dims: dict[str, int], case: tuple[dict[str, torch.Tensor], Batch]
) -> None:
    """The same recipe on one rank (no launcher, no Megatron) and on many; close to fp32, and fp32 where it matters."""
    weights, batch = case
    exact = run_ranks(_exact_output, 1, weights, batch)[0]
    output, norm, fp32_kept = run_ranks(_mixed_precision, world_size, dims, weights, batch)[0]
    assert fp32_kept
    assert output.dtype == torch.float32
    assert 1e-4 < relative_error(output, exact[0]) < 2e-2
    assert norm == pytest.approx(exact[1], rel=2e-2)


def _exact_output(
    rank: int, world_size: int, weights: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, float]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(), platform)
    model = build_wan(TINY, groups=groups, platform=platform)
    fill(model, weights, groups)
    output, loss = local_loss(model, groups, batch)
    loss.backward()
    return output.detach(), finish_grads(model, groups, 0.0)


def _held_elements(rank: int, world_size: int) -> tuple[int, int]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, tensor=2), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())
    held = sum(p.to_local().numel() for p in model.parameters())
    copies = {name: 1 if layout.tp_axis is not None else 2 for name, layout in model.param_layout.items()}
    everywhere = sum(view.numel() * copies[name] for name, view in global_views(model, groups).items())
    destroy()
    return held, everywhere


def test_a_rank_holds_its_share_only() -> None:
    results = run_ranks(_held_elements, 4)
    total = results[0][1]
    assert sum(held for held, _ in results) == total
    assert all(held == pytest.approx(total / 4, rel=0.02) for held, _ in results)  # [1, 6, D] tables do not split


def _text_context(
    rank: int, world_size: int, weights: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, tensor=2), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())
    fill(model, weights, groups)
    with torch.no_grad():
        context = model.encode_text(batch.text)
        sharded_again = all(isinstance(p, DTensor) for p in model.blocks.parameters())
        assert sharded_again
        cached = model(batch.latents, batch.timestep, text_context=context)
        direct = model(batch.latents, batch.timestep, batch.text)
    destroy()
    return cached, direct


def test_text_context_gathers_parameters_too(case: tuple[dict[str, torch.Tensor], Batch]) -> None:
    for cached, direct in run_ranks(_text_context, 4, *case):
        assert torch.equal(cached, direct)


def _accumulated(
    rank: int, world_size: int, weights: dict[str, torch.Tensor], batch: Batch, passes: int
) -> dict[str, torch.Tensor]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())
    fill(model, weights, groups)
    for _ in range(passes):
        (local_loss(model, groups, batch)[1] / passes).backward()
    finish_grads(model, groups, 0.0)
    grads = gathered_grads(model, groups)
    destroy()
    return grads


def test_sharded_gradients_accumulate(case: tuple[dict[str, torch.Tensor], Batch]) -> None:
    once, twice = (run_ranks(_accumulated, 2, *case, passes)[0] for passes in (1, 2))
    for name, grad in once.items():
        torch.testing.assert_close(twice[name], grad, rtol=1e-5, atol=1e-7)


def _initial_weights(rank: int, world_size: int, dims: dict[str, int], fsdp2: Fsdp2 | None) -> dict[str, torch.Tensor]:
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **dims), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=fsdp2)
    init_weights(model, 42, groups)
    views = global_views(model, groups)
    weights = {n: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for n, v in views.items()}
    destroy()
    return weights


@pytest.mark.parametrize(("world_size", "dims"), [(2, {}), (4, {"tensor": 2}), (3, {})])
def test_initial_weights_do_not_depend_on_the_layout(world_size: int, dims: dict[str, int]) -> None:
    alone = run_ranks(_initial_weights, 1, {}, None)[0]
    spread = run_ranks(_initial_weights, world_size, dims, Fsdp2())[0]
    for name, weight in alone.items():
        assert torch.equal(spread[name], weight), name
