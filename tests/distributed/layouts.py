"""One training step of a small DiT on any layout, with every gradient gathered to its global shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.models.wan.views import global_view, global_views, local_slices
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from tests.helpers.oracle import Batch


def skip_without_hybrid_sharding(dims: dict[str, Any]) -> None:
    """Skip a case with replicated shards where this torch's gloo cannot average (the product refuses it there)."""
    if "shard" in dims and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip(f"hybrid sharding on gloo needs a torch newer than {torch.__version__}")


@dataclass(frozen=True)
class Fsdp2:
    """The keys of an fsdp2_config.yaml."""

    sub_modules_to_wrap: tuple[str, ...] = ("predictor.blocks.{*}", "predictor.head")
    ignored_modules: tuple[str, ...] = ("ae", "text_encoder")
    reshard_after_forward: bool = True
    param_dtype: str | None = None
    reduce_dtype: str | None = "fp32"
    output_dtype: str | None = None
    num_to_forward_prefetch: int = 0
    num_to_backward_prefetch: int = 0
    offload_to_cpu: bool = False
    pin_memory: bool = True
    recompute_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A layout under test: sizes, and what is done to the model."""

    dims: dict[str, Any] = field(default_factory=dict)
    fsdp2: Fsdp2 | None = None
    recompute: RecomputePlan | None = None


@dataclass
class Step:
    """What one rank saw of a step: the loss of the global batch, the norm, all gradients in global shape."""

    loss: float
    norm: float
    grads: dict[str, Tensor]
    output: Tensor


def single_rank_step(config: WanConfig, weights: dict[str, Tensor], batch: Batch, *, max_norm: float = 0.0) -> Step:
    """Return the step of one rank on the whole batch."""
    model = WanDiT(config)
    model.load_state_dict(weights)
    output = model(batch.latents, batch.timestep, batch.text, batch.image_embeds)
    loss = (output - batch.cotangent).square().mean()
    loss.backward()
    norm = finish_grads(model, ParallelGroups(), max_norm)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), norm, grads, output.detach())


def distributed_step(
    rank: int, world_size: int, layout: Layout, config: WanConfig, case: tuple[dict[str, Tensor], Batch, float]
) -> Step:  # fmt: skip
    """Return the step of this rank on its slice of the batch; ``case`` is (weights, global batch, max_norm)."""
    weights, batch, max_norm = case
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), platform)
    model = build_wan(config, groups=groups, platform=platform, fsdp2=layout.fsdp2, recompute=layout.recompute)
    fill(model, weights, groups)
    output, loss = local_loss(model, groups, batch)
    loss.backward()
    norm = finish_grads(model, groups, max_norm)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    step = Step(mean.item() / world_size, norm, gathered_grads(model, groups), output.detach())
    destroy()
    return step


def fill(model: WanDiT, weights: dict[str, Tensor], groups: ParallelGroups) -> None:
    """Copy this rank's slices of ``weights`` into the model."""
    views = global_views(model, groups)
    assert views.keys() == weights.keys()
    for name, view in views.items():
        local, index = local_slices(view)
        if local.numel():
            local.copy_(weights[name][index])


def local_loss(model: WanDiT, groups: ParallelGroups, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return this rank's output and mean loss on its slice of the global batch."""
    size = len(batch.timestep) // groups.dims.data
    mine = slice(groups.dp_rank * size, (groups.dp_rank + 1) * size)
    image = None if batch.image_embeds is None else batch.image_embeds[mine]
    output = model(batch.latents[mine], batch.timestep[mine], batch.text[mine], image)
    return output, (output - batch.cotangent[mine]).square().mean()


def gathered_grads(model: WanDiT, groups: ParallelGroups) -> dict[str, Tensor]:
    """Return every gradient in its global shape."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            view = global_view(parameter.grad, model.param_layout[name], groups)
            grads[name] = view.full_tensor() if isinstance(view, DTensor) else view
    return grads
