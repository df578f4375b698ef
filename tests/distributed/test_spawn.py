"""The pool of gloo ranks itself: results, and what a failed, dead or hanging rank looks like."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.helpers.spawn import RankError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, offset: float) -> torch.Tensor:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value


def _second_rank_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("what went wrong")
    dist.barrier()


def _first_rank_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(9)
    dist.barrier()


def _first_rank_aborts(rank: int, world_size: int) -> None:
    if rank == 0:
        os.write(2, b"what C++ says\n")
        os.abort()
    dist.barrier()


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(_sum_of_ranks, 2, 1.0)
    assert [r.item() for r in results] == [3.0, 3.0]


def test_a_raising_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*what went wrong"):
        run_ranks(_second_rank_raises, 2)


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 9"):
        run_ranks(_first_rank_dies, 2)


def test_an_aborted_rank_is_named_with_its_stderr_and_stack() -> None:
    with pytest.raises(RankError, match=r"died with exit code -6\nwhat C\+\+ says(.|\n)*in _first_rank_aborts"):
        run_ranks(_first_rank_aborts, 2)
