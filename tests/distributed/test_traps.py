"""The silent-corruption traps of Megatron-Core, gloo and FSDP2: each would train wrongly without an error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.param_map import by_name
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.models.wan.views import global_view, global_views
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import build_groups, destroy
from mindspeed_wan.parallel.mappings import copy_to_group, sum_over_group
from mindspeed_wan.parallel.ulysses import UlyssesAttention
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import Fsdp2, fill, gathered_grads, local_loss, skip_without_hybrid_sharding
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.core


def _gradient_of_a_transposed_use(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(2, 3, requires_grad=True)
    weight = torch.arange(6.0).view(3, 2) + rank
    (copy_to_group(x, dist.group.WORLD).T * weight).sum().backward()
    y = torch.ones(2, 3, requires_grad=True)
    (sum_over_group(y.T, dist.group.WORLD).T * weight.T).sum().backward()
    return x.grad, y.grad


def test_t1_the_gradient_of_a_non_contiguous_tensor_is_reduced() -> None:
    """Megatron's ``_reduce`` sums a contiguous copy and returns the original."""
    expected = (2 * torch.arange(6.0).view(3, 2) + 1).T
    for copied, summed in run_ranks(_gradient_of_a_transposed_use, 2):
        assert torch.equal(copied, expected)
        assert torch.equal(summed, expected)


def _forget_forced_sums() -> None:
    """Make this process's torch as old as 2.7, which cannot force sums."""
    if hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        del FSDPModule.set_force_sum_reduction_for_comms


def _fsdp_gradients(
    rank: int, world_size: int, weights: dict[str, torch.Tensor], batch: Batch, old_torch: bool, shard: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    if old_torch:
        _forget_forced_sums()
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, shard=shard), platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())
    fill(model, weights, groups)
    local_loss(model, groups, batch)[1].backward()
    norm = finish_grads(model, groups, 0.0)
    grads = gathered_grads(model, groups)
    destroy()
    return norm, grads


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, torch.Tensor], Batch]:
    batch = random_batch(TINY, (1, 4, 6), timesteps=(700.0, 31.5, 990.0, 5.0))
    return mm_state_dict(diffusers_model(TINY), TINY), batch


@pytest.mark.parametrize("old_torch", [False, True], ids=["force-sum", "probe"])
def test_t2_gloo_averages(case: tuple[dict[str, torch.Tensor], Batch], old_torch: bool) -> None:
    """gloo of torch 2.7 sums where FSDP2 asks for the mean. AdamW hides it, the gradient norm does not."""
    alone_norm, alone = run_ranks(_fsdp_gradients, 1, *case, False, None)[0]
    norm, grads = run_ranks(_fsdp_gradients, 2, *case, old_torch, None)[0]
    assert norm == pytest.approx(alone_norm, rel=1e-5)
    for name, grad in alone.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def _hybrid_sharding_without_averages(rank: int, world_size: int) -> None:
    _forget_forced_sums()
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, shard=1), platform)
    with pytest.raises(ConfigError, match="hybrid sharding needs averages"):
        build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())


def test_t2_hybrid_sharding_is_refused_where_gloo_cannot_average() -> None:
    run_ranks(_hybrid_sharding_without_averages, 2)


def _views(rank: int, world_size: int, weights: dict[str, torch.Tensor]) -> None:
    platform = get_platform("cpu")
    dims = ParallelDims(world_size=world_size, tensor=2, sequence_parallel=True)
    groups = build_groups(dims, platform)
    model = build_wan(TINY, groups=groups, platform=platform, fsdp2=Fsdp2())
    fill(model, weights, groups)
    table = by_name(TINY, "mm")
    parameters = dict(model.named_parameters())
    for name, view in global_views(model, groups).items():
        # T4: attributes of Megatron's parameters are gone, the layout comes from the table
        assert isinstance(view, DTensor)
        assert view.shape == table[name].shape
        expected = Shard(table[name].tp_axis) if table[name].tp_axis is not None else None
        assert (view.placements[0] if expected else None) == expected
        # T3: the views are the global tensor (naive local shards of two tensor ranks would overwrite each other)
        assert torch.equal(view.full_tensor(), weights[name])
        # and they are the parameter's own storage
        assert view.to_local().data_ptr() == parameters[name].detach().to_local().data_ptr()
    step = torch.tensor(3.0)
    assert global_view(step, model.param_layout["head.head.weight"], groups) is step
    destroy()


def test_t3_t4_views_are_the_global_tensors(case: tuple[dict[str, torch.Tensor], Batch]) -> None:
    run_ranks(_views, 4, case[0])


def _ulysses_on_a_subgroup(rank: int, world_size: int) -> torch.Tensor:
    groups = [dist.new_group(ranks) for ranks in ((0, 2), (1, 3))]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 1, 4, 8, generator=generator) for _ in range(3))
    mine = slice(3 * (rank // 2), 3 * (rank // 2) + 3)
    q, k, v = (t[mine].clone().requires_grad_() for t in (q, k, v))
    out = UlyssesAttention(groups[rank % 2])(q, k, v, length=6)
    out.square().sum().backward()
    return torch.stack((out.detach(), q.grad, k.grad, v.grad))


def test_t5_exchange_on_a_subgroup() -> None:
    """torch.distributed.nn's all-to-all takes a group's rank for a global rank on gloo."""
    results = run_ranks(_ulysses_on_a_subgroup, 4)
    alone = run_ranks(_whole_attention, 1)[0]
    for rank, result in enumerate(results):
        half = rank // 2
        torch.testing.assert_close(result, alone[:, 3 * half : 3 * half + 3], rtol=1e-4, atol=1e-6)


def _whole_attention(rank: int, world_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 1, 4, 8, generator=generator).requires_grad_() for _ in range(3))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / 8**0.5
    out = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), v)
    out.square().sum().backward()
    return torch.stack((out.detach(), q.grad, k.grad, v.grad))


@pytest.mark.parametrize("shard", [1, 2])
def test_t7_replicas_are_counted_once_in_the_norm(case: tuple[dict[str, torch.Tensor], Batch], shard: int) -> None:
    skip_without_hybrid_sharding({"shard": shard})
    alone_norm, _ = run_ranks(_fsdp_gradients, 1, *case, False, None)[0]
    for norm, _ in run_ranks(_fsdp_gradients, 4, *case, False, shard):
        assert norm == pytest.approx(alone_norm, rel=1e-5)
