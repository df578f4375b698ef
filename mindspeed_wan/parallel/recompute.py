"""Activation recomputation: chosen blocks keep only their input and run again in the backward pass.

``torch.utils.checkpoint`` without re-entrance, put around the block's own ``forward``: FSDP2's hooks stay outside it
(parameters are gathered once for the recomputation and the backward), parameter names do not change, and inputs that
need no gradient (a frozen embedding under LoRA) do not switch it off.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.offload import InputOffload
from mindspeed_wan.parallel.patterns import select_modules


@dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """Which blocks are recomputed.

    Args:
        every_k: of the candidates, number 0, k, 2k ...; 1 is all of them.
        first: only the first so many candidates (Megatron's ``--recompute-method block``); ``None`` is all.
        patterns: candidates by name (``recompute_modules`` of an FSDP2 file); empty means ``model.blocks``.
        keep_attention: keep the results of attention as well, the costly part at video lengths (two thirds of a
            block's FLOP at 75,600 tokens). Costs one ``[L, B, D]`` tensor per attention and block.
        offload: keep the inputs of these blocks in host memory between the passes (``parallel/offload.py``). Kept
            results of attention stay on the device.

    Raises:
        ConfigError: ``every_k`` is below 1.
    """

    every_k: int = 1
    first: int | None = None
    patterns: tuple[str, ...] = ()
    keep_attention: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every_k < 1:
            raise ConfigError(f"recompute every {self.every_k} blocks", fix="use 1 for all, 2 for every other one ...")


def apply_recompute(model: nn.Module, plan: RecomputePlan) -> list[nn.Module]:
    """Recompute the blocks ``plan`` names and return them; ``ConfigError`` if a pattern matches nothing."""
    if plan.patterns:
        candidates = select_modules(model, plan.patterns, where="recompute_modules")
    else:
        candidates = list(model.blocks)  # type: ignore[arg-type]
    chosen = candidates[: plan.first][:: plan.every_k]
    offload = InputOffload() if plan.offload else None
    for block in chosen:
        recompute(block, keep_attention=plan.keep_attention, offload=offload)
    return chosen


def recompute(module: nn.Module, *, keep_attention: bool = False, offload: InputOffload | None = None) -> None:
    """Make ``module`` recompute its activations in the backward pass. Idempotent.

    Args:
        module: its first argument is the tensor it works on.
        keep_attention: see ``RecomputePlan``.
        offload: takes that tensor to the host in between.
    """
    if getattr(module, "recomputed", False):
        return
    module.recomputed = True  # type: ignore[assignment]
    context = partial(create_selective_checkpoint_contexts, _keep_attention) if keep_attention else noop_context_fn
    module.forward = partial(_forward, module.forward, context, offload)  # type: ignore[method-assign]


def _forward(
    forward: Callable[..., Any], context: Callable[[], Any], offload: InputOffload | None, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The DiT draws no random numbers, so there is no generator state to save and restore.
    with nullcontext() if offload is None else offload.around(args[0]):
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context, **kwargs
        )


def _keep_attention(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what any attention operator returns: torch's, a library's (``flash_attn::...``) or torch_npu's."""
    is_attention = any(part in str(operator) for part in ("attention", "flash_attn", "sageattn"))
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
