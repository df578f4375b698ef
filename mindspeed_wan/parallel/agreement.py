"""Decisions that all ranks share: what rank 0 found out, and whether anybody failed.

A rank that raises alone leaves the others waiting in a collective until the time-out. Where a failure is likely (disks,
checkpoints, data), ranks exchange their outcome instead and all raise the same error.
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
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def first_decides(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and return its result on every rank; its ``WanError`` is raised on every rank.

    Collective. The result must pickle; it crosses from rank 0 of this very job only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    outcome: list[tuple[T | None, WanError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except WanError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def all_or_none(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank; if it raises a ``WanError`` anywhere, all ranks raise the first rank's error.

    Collective. ``function`` itself must not be left early by some ranks in the middle of a collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    result: T | None = None
    failure: WanError | None = None
    try:
        result = function()
    except WanError as error:
        failure = error
    failures: list[WanError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next((error for error in failures if error is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]
