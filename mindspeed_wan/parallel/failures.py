"""What torch raises when another rank or a data worker is lost or memory runs out, as errors with fix and exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mindspeed_wan.errors import ParallelError, ResourceError, WanError

_LOST = re.compile(
    r"connection (reset|closed|refused|was reset)|timed out|timeout|broken pipe|socket (closed|timeout)|remote worker"
    r"|wait\w* for .* rank|nccl (error|communicator was aborted)|ncclremoteerror|hccl|eof",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker")
_SMALLER = ("shard more (FSDP2, TP, CP), recompute more blocks, lower MBS, or offload_to_cpu in the FSDP2 file; "
            "mindspeed-wan plan shows what a layout needs")
_AGAIN = "run the same command again to go on from the last save"


@contextmanager
def explained(*, smaller: str = _SMALLER, again: str = _AGAIN) -> Iterator[None]:
    """Run the work of a rank, and raise ``ParallelError`` for a lost peer, ``ResourceError`` for lack of memory.

    A data worker that died is lack of memory too.

    Args:
        smaller: what to do about lack of memory.
        again: what to do about a lost peer.

    The stack of the failing call goes to stderr: it says what this rank was doing when it noticed. The launcher adds
    the stacks of the ranks that still run, and names the one that fell silent. Other errors pass unchanged.
    """
    try:
        yield
    except WanError:
        raise
    except (RuntimeError, MemoryError) as error:
        explanation = _explain(error, smaller, again)
        if explanation is None:
            raise
        print(f"[rank {_rank()}] stopped here:", *traceback.format_tb(error.__traceback__), sep="\n", file=sys.stderr)
        raise explanation from error


def _explain(error: BaseException, smaller: str, again: str) -> WanError | None:
    message = str(error) or type(error).__name__
    first_line = message.splitlines()[0]
    if _WORKER.match(message):
        return lost_worker(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _OUT_OF_MEMORY.search(message):
        return ResourceError(f"out of memory: {first_line}", fix=smaller)
    if dist.is_initialized() and (isinstance(error, dist.DistError) or _LOST.search(message)):
        return ParallelError(
            f"waited in vain for another rank: {_without_source(first_line)}",
            fix=f"{again}; if a rank is slow rather than lost, raise --distributed-timeout-minutes",
        )
    return None


def lost_worker(error: BaseException) -> ResourceError:
    """Return the error for a data worker that died. torch raises wherever the process is when it hears of it."""
    return ResourceError(f"a data worker died: {str(error).splitlines()[0]}",
                         fix="free memory, enlarge /dev/shm (docker --shm-size) or lower --num-workers")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _without_source(message: str) -> str:
    """Drop the C++ file and line that some backends put in front."""
    return re.sub(r"^\[[^\]]*:\d+\]\s*", "", message)
