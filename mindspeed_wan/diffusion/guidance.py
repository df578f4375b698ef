"""Classifier-free guidance: how the conditional and unconditional velocities become one."""

from __future__ import annotations

from torch import Tensor

from mindspeed_wan.diffusion.flow_matching import as_float


def combine(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Return ``uncond + scale (cond - uncond)`` in fp32, or ``cond`` when there is no unconditional branch.

    Args:
        cond: velocity with the prompt.
        uncond: velocity with the negative prompt, or ``None`` when guidance is off.
        scale: guidance scale of the step's expert; 1 is the conditional velocity.
    """
    cond = as_float(cond)
    if uncond is None:
        return cond
    uncond = uncond.to(cond.dtype)
    return uncond + scale * (cond - uncond)


def needs_uncond(scale: float) -> bool:
    """Tell whether guidance at ``scale`` has to run the unconditional branch (1 means CFG is off)."""
    return scale != 1.0
