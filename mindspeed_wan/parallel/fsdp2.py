"""torch's FSDP2 (``fully_shard``), driven by MindSpeed-MM's fsdp2_config.yaml.

Parameters are Megatron's tensor-parallel local shards; FSDP2 shards them again over the data x context ranks.
Mixed precision: shards, gradients and optimizer state keep the model's own dtype (fp32 masters), gathered copies
are ``param_dtype``. Inputs are never cast here, whatever ``cast_forward_inputs`` says: the DiT casts the inputs of its
matrix products itself and computes time embedding, modulation, norms and head in fp32 from fp32 inputs, which a
blanket cast to bf16 would round (a bf16 timestep knows 4 steps of 1000 near the noisy end).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.groups import ParallelGroups, one_rank_mesh
from mindspeed_wan.parallel.patterns import matching, select_modules
from mindspeed_wan.platforms.base import Platform

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


class Fsdp2Config(Protocol):
    """The keys of fsdp2_config.yaml that act on the model (``config.schema.Fsdp2Section`` has them all)."""

    sub_modules_to_wrap: Sequence[str]
    ignored_modules: Sequence[str]
    reshard_after_forward: bool
    param_dtype: str | torch.dtype | None
    reduce_dtype: str | torch.dtype | None
    output_dtype: str | torch.dtype | None
    num_to_forward_prefetch: int
    num_to_backward_prefetch: int
    offload_to_cpu: bool
    pin_memory: bool


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of ``fp32``, ``bf16`` ... (``None`` and dtypes pass through)."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise ConfigError(f"dtype '{name}' does not exist", where="fsdp2", fix=f"choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def apply_fsdp2(model: nn.Module, config: Fsdp2Config, groups: ParallelGroups, platform: Platform) -> nn.Module:
    """Shard ``model`` in place (usually on the meta device, before it is materialised) and return it.

    Each module that ``sub_modules_to_wrap`` names becomes one unit, the rest of the model another. On gloo,
    reductions are forced to sums, because gloo either ignores or refuses averages; where torch cannot be told so,
    ``model.grad_scale`` holds the factor that ``finish_grads`` applies.

    Raises:
        ConfigError: a pattern matches nothing, or hybrid sharding on a torch whose gloo cannot average.
    """
    if any(not parameter.is_floating_point() for parameter in model.parameters()) and not shards_integers():
        raise ConfigError(f"FSDP2 of torch {torch.__version__} cannot shard weights held in 8 bits",
                          fix="use a newer torch (2.13 can), or no FSDP2: --fp32 when training")
    mesh = groups.fsdp_mesh if groups.fsdp_mesh is not None else one_rank_mesh(platform)
    named = select_modules(model, config.sub_modules_to_wrap, where="sub_modules_to_wrap")
    units = [module for module in named if module is not model]
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "offload_policy": _offload_policy(config, platform),
    }
    precision: dict[str, Any] = {
        "param_dtype": as_dtype(config.param_dtype),
        "reduce_dtype": as_dtype(config.reduce_dtype),
        "cast_forward_inputs": False,
    }
    ignored = _ignored_parameters(model, config)
    if ignored:
        options["ignored_params"] = ignored
    # Inner units first. `output_dtype` is for what leaves the model; inside it would round the residual stream.
    for unit in reversed(units):
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(**precision), **options)
    root_policy = MixedPrecisionPolicy(**precision, output_dtype=as_dtype(config.output_dtype))
    fully_shard(model, mp_policy=root_policy, **options)
    _register_forward_methods(model)
    _set_prefetch(units, config)
    if platform.backend == "gloo":
        model.grad_scale = _make_gloo_average(model, mesh)  # type: ignore[assignment]
    return model


def shards_integers() -> bool:
    """Tell whether this torch's FSDP2 takes integer parameters; older ones want one floating dtype for a whole unit."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    try:  # nothing else tells before the first forward pass
        return "is_floating_point" in inspect.getsource(FSDPParam.init_dtype_attrs)
    except OSError:  # torch without its sources
        return False


def _offload_policy(config: Fsdp2Config, platform: Platform) -> OffloadPolicy:
    if not config.offload_to_cpu or platform.device_type == "cpu":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=config.pin_memory)


def _ignored_parameters(model: nn.Module, config: Fsdp2Config) -> set[nn.Parameter]:
    """MindSpeed-MM lists its frozen encoders here; they are not part of this model, so a name may match nothing."""
    modules = [m for pattern in config.ignored_modules for m in matching(model, pattern, where="ignored_modules")]
    return {parameter for module in modules for parameter in module.parameters()}


def _register_forward_methods(model: nn.Module) -> None:
    """Let FSDP2 gather parameters also for the methods that models list besides ``forward``."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for name in getattr(module, "forward_methods", ()):
                register_fsdp_forward_method(module, name)


def _set_prefetch(units: list[nn.Module], config: Fsdp2Config) -> None:
    for i, unit in enumerate(units):
        ahead, behind = config.num_to_forward_prefetch, config.num_to_backward_prefetch
        if ahead:
            unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + ahead])  # type: ignore[operator]
        if behind:
            unit.set_modules_to_backward_prefetch(units[max(0, i - behind) : i][::-1])  # type: ignore[operator]


def _make_gloo_average(model: nn.Module, mesh: DeviceMesh) -> float:
    """Make FSDP2 average gradients on gloo; return the factor that is left to apply afterwards.

    gloo in torch 2.7 silently sums where an average is asked for, and raises for all-reduce.
    """
    if hasattr(model, "set_force_sum_reduction_for_comms"):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return 1.0
    if mesh.ndim > 1:
        raise ConfigError(
            "hybrid sharding needs averages that gloo lacks in this torch",
            where="fsdp2.sharding_size",
            fix="use sharding_size auto with use-torch-fsdp2, or a newer torch (2.13 can)",
        )
    group = mesh.get_group()
    averaged = torch.empty(1)
    dist.reduce_scatter_tensor(averaged, torch.ones(group.size()), op=dist.ReduceOp.AVG, group=group)
    return 1.0 / averaged.item()
