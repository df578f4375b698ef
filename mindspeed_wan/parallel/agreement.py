"""Decisions that ranks share: what the first one found out, and whether anybody failed.

A rank that raises alone leaves the others waiting in a collective until the time-out. Where a failure is likely (disks,
checkpoints, data), ranks exchange their outcome instead and all raise the same error. ``group`` is the ranks that
agree, ``None`` all of the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mindspeed_wan.errors import WanError

T = TypeVar("T")


def is_first() -> bool:
    """True on rank 0, and where there is no job."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks; nothing to do for one."""
    if not _alone():
        dist.barrier()


def first_decides(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``function`` on the first rank and return its result on every rank; its ``WanError`` is raised on every rank.

    Collective. The result must pickle (tensors in it should be on the CPU); it crosses between ranks of this very job.
    """
    if _alone(group):
        return function()
    outcome: list[tuple[T | None, WanError | None]] = [(None, None)]
    if dist.get_rank(group) == 0:
        outcome = [_outcome(function)]
    dist.broadcast_object_list(outcome, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def all_or_none(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``function`` on every rank; if it raises a ``WanError`` anywhere, all ranks raise the first rank's error.

    Collective. ``function`` itself must not be left early by some ranks in the middle of a collective.
    """
    if _alone(group):
        return function()
    result, failure = _outcome(function)
    failures: list[WanError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    first = next((error for error in failures if error is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]


def _alone(group: dist.ProcessGroup | None = None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def _outcome(function: Callable[[], T]) -> tuple[T | None, WanError | None]:
    """Return the function's result, or the ``WanError`` it raised."""
    try:
        return function(), None
    except WanError as error:
        return None, error
