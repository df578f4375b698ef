"""Two jobs in one launch: ranks divided into parts, each of which sees an ordinary world of its own.

The default process group of a part is a real one: its own prefix in the job's store, its own size, ranks from 0. So
everything that speaks of "the world" (Megatron's groups, checkpoints, agreements, rank 0's files) is about the part and
needs no special case. What crosses from part to part goes over a :class:`Link`: notes in the job's store, and tensors
over a gloo mesh of all ranks that no collective of either part touches.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.errors import ConfigError, ParallelError
from mindspeed_wan.parallel.groups import backend_name, rendezvous_store

if TYPE_CHECKING:
    from mindspeed_wan.platforms.base import Platform

_TAGS = 2**29
"""Messages are numbered modulo this: gloo's tags are 32-bit, and each message takes two."""


@dataclass(frozen=True)
class Part:
    """A contiguous run of the job's ranks under a name."""

    name: str
    ranks: range

    def __len__(self) -> int:
        return len(self.ranks)


class Link:
    """What joins the parts of a job. Collective over all ranks of the job to create.

    Args:
        store: the job's store.
        rank: this rank in the job.
        world_size: ranks of the job.
        timeout: how long a message may take.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.timeout = rank, timeout
        self._notes = dist.PrefixStore("notes", store)
        # A group that the job's own collectives know nothing of; torch's stubs leave out its methods.
        self._mesh: Any = dist.ProcessGroupGloo(dist.PrefixStore("mesh", store), rank, world_size, timeout)

    def write(self, name: str, text: str) -> None:
        """Put a note on the board, over an older one of the same name."""
        self._notes.set(name, text)

    def read(self, name: str) -> str:
        """Return a note; waits until somebody has written it.

        Raises:
            ParallelError: nobody did within the time-out, or the job's store is gone.
        """
        try:
            return bytes(self._notes.get(name)).decode()
        except (dist.DistError, RuntimeError) as error:
            raise _lost(f"the note {name!r} of another rank", error) from None

    def send(self, data: Tensor, to: int, number: int) -> Sending:
        """Start to send bytes (uint8, on the host) as message ``number``, unique between this rank and ``to``."""
        size = torch.tensor([data.numel()])
        tag = 2 * (number % _TAGS)
        try:
            return Sending((self._mesh.send([size], to, tag), self._mesh.send([data], to, tag + 1)), (size, data), to)
        except RuntimeError as error:
            raise _lost(f"rank {to}", error) from None

    def receive(self, source: int, number: int) -> Tensor:
        """Return the bytes of message ``number`` from rank ``source``; waits for them."""
        size, tag = torch.zeros(1, dtype=torch.int64), 2 * (number % _TAGS)
        try:
            self._mesh.recv([size], source, tag).wait()
            data = torch.empty(int(size), dtype=torch.uint8)
            self._mesh.recv([data], source, tag + 1).wait()
        except RuntimeError as error:
            raise _lost(f"rank {source}", error) from None
        return data

    def barrier(self) -> None:
        """Wait for all ranks of the job."""
        try:
            self._mesh.barrier().wait()
        except RuntimeError as error:
            raise _lost("the other ranks", error) from None


@dataclass(frozen=True)
class Sending:
    """A message on its way; its memory is held until it has arrived."""

    works: tuple[dist.Work, ...]
    tensors: tuple[Tensor, ...]
    to: int

    def wait(self) -> None:
        """Wait until it has arrived."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _lost(f"rank {self.to}", error) from None


def launched() -> tuple[int, int]:
    """Return (rank, world size) of this process in the launch.

    Raises:
        ConfigError: no launcher, or its variables are not complete.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"several parts need several ranks, but {', '.join(missing)} is not set",
                          fix="start the job with a launch script or torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_part(platform: Platform, part: Part, timeout_minutes: float) -> Link:
    """Make ``part`` this process's world and return the link to the rest of the job. Collective over the whole job.

    A part of one rank needs no process group, as a job of one rank does not.

    Raises:
        ConfigError: there is no launcher.
        ParallelError: the other ranks did not show up in time.
    """
    rank, world_size = launched()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store = rendezvous_store(rank, world_size, timeout)
        if len(part) > 1:
            dist.init_process_group(
                backend_name(platform), store=dist.PrefixStore(f"part/{part.name}", store),
                rank=rank - part.ranks.start, world_size=len(part), timeout=timeout,
            )  # fmt: skip
        return Link(store, rank, world_size, timeout)
    except (dist.DistError, RuntimeError) as error:
        raise ParallelError(
            f"rank {rank} of {world_size} could not meet the others: {str(error).splitlines()[0]}",
            fix="check that every node runs the same launcher, reaches MASTER_ADDR, and that no rank died at start",
        ) from error


def _lost(whom: str, error: Exception) -> ParallelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ParallelError(
        f"waited in vain for {whom}: {reason}",
        fix="run the same command again to go on from the last save; if a rank is slow rather than lost, raise "
        "--distributed-timeout-minutes",
    )
