"""Activation recomputation: chosen blocks keep only their input and run again in the backward pass.

``torch.utils.checkpoint`` without re-entrance, put around the block's own ``forward``: FSDP2's hooks stay outside it
(parameters are gathered once for the recomputation and the backward), parameter names do not change, and inputs that
need no gradient (a frozen embedding under LoRA) do not switch it off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.patterns import select_modules


def apply_recompute(
    model: nn.Module,
    every_k: int = 1,
    *,
    blocks: Sequence[nn.Module] | None = None,
    patterns: Iterable[str] | None = None,
    first: int | None = None,
) -> list[nn.Module]:
    """Recompute some blocks of ``model`` and return them.

    Args:
        every_k: of the candidates, recompute number 0, k, 2k ...; 1 is all of them.
        blocks: the candidates; default ``model.blocks``.
        patterns: candidates by name instead (``recompute_modules`` of an FSDP2 file).
        first: only the first so many candidates (Megatron's ``--recompute-method block``).

    Raises:
        ConfigError: ``every_k`` is below 1 or a pattern matches nothing.
    """
    if every_k < 1:
        raise ConfigError(f"recompute every {every_k} blocks", fix="use 1 for all blocks, 2 for every other one ...")
    if patterns is not None:
        candidates = select_modules(model, patterns, where="recompute_modules")
    else:
        candidates = list(blocks if blocks is not None else model.blocks)  # type: ignore[arg-type]
    chosen = candidates[:first][::every_k]
    for block in chosen:
        recompute(block)
    return chosen


def recompute(module: nn.Module) -> None:
    """Make ``module`` recompute its activations in the backward pass. Idempotent."""
    if getattr(module, "recomputed", False):
        return
    module.recomputed = True  # type: ignore[assignment]
    module.forward = partial(_forward, module.forward)  # type: ignore[method-assign]


def _forward(forward: object, *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)  # type: ignore[operator]
    # The DiT draws no random numbers, so there is no generator state to save and restore.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
