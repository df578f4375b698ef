"""Everything that is done to a built DiT before it gets memory, in one visible order."""

from __future__ import annotations

import torch

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.block import WanBlock
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel.attention import Untraced
from mindspeed_wan.parallel.fsdp2 import Fsdp2Config, apply_fsdp2
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.platforms.base import Platform

COMPILES_KEPT_ATTENTION = (2, 8)
"""The first torch that runs compiled code under selective recomputation."""


def parallelize(
    model: WanDiT,
    *,
    groups: ParallelGroups,
    platform: Platform,
    recompute: RecomputePlan | None = None,
    compile_blocks: bool = False,
    fsdp2: Fsdp2Config | None = None,
) -> WanDiT:
    """Compile, recompute and shard ``model`` in place and return it.

    Tensor and context parallelism are already inside it (its layers and its attention). Each step wraps the one
    before: FSDP2 gathers a block's parameters, the block then runs its compiled forward, in the backward pass a
    second time.

    Raises:
        ConfigError: this torch would not run the compiled blocks.
    """
    if compile_blocks:
        if recompute is not None and recompute.keep_attention and _torch_version() < COMPILES_KEPT_ATTENTION:
            raise ConfigError(f"torch {torch.__version__} leaves compiled blocks uncompiled where attention is kept",
                              fix="drop --compile or --recompute-skip-core-attention, or use a newer torch")
        for block in model.blocks:
            _compile(block)  # type: ignore[arg-type]
    if recompute is not None:
        apply_recompute(model, recompute)
    if fsdp2 is not None:
        apply_fsdp2(model, fsdp2, groups, platform)
    return model


def _compile(block: WanBlock) -> None:
    """Compile the block as one graph, or around an attention that cannot be traced."""
    if not block.self_attn.attend.traceable:
        block.self_attn.attend = Untraced(block.self_attn.attend)
    block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])
