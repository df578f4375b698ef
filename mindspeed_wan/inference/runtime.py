"""The process's place in a generation: platform, process groups of its replica, and shared decisions inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mindspeed_wan.parallel.agreement import all_or_none, first_decides
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, init_distributed, new_groups
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from mindspeed_wan.platforms.base import Platform

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What this rank is and whom it works with.

    Attributes:
        replica: number of the replica this rank belongs to.
        branch: 0 runs the conditional pass, 1 the unconditional one (both when ``layout.cfg`` is 1).
        replica_group: ranks that make one video, ``None`` for one rank.
        cfg_group: the two ranks that exchange their guidance branches, ``None`` without CFG parallel.
    """

    platform: Platform
    layout: InferenceLayout
    groups: ParallelGroups
    replica: int = 0
    branch: int = 0
    replica_group: Any = None
    cfg_group: Any = None

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.platform.device()

    @property
    def rank(self) -> int:
        """World rank."""
        return self.groups.rank

    @property
    def leads(self) -> bool:
        """True on the replica's first rank, which decodes (unless the VAE is parallel) and writes the files."""
        return self.rank % self.layout.replica_size == 0

    def agree(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank of the replica; a ``WanError`` on one is raised on all. Collective."""
        return function() if self.replica_group is None else all_or_none(function, self.replica_group)

    def lead(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the replica's first rank and give its result, or ``WanError``, to all. Collective.

        The result must pickle; tensors in it should be on the CPU.
        """
        return function() if self.replica_group is None else first_decides(function, self.replica_group)


def start(platform: Platform, layout: InferenceLayout, timeout_minutes: float) -> Runtime:
    """Join the job and build every group of ``layout``. Collective over the world.

    FSDP2 shards over the (CFG x context) ranks of a replica, so replicas never wait for each other.
    """
    platform.activate()
    init_distributed(platform, timeout_minutes)
    dims = ParallelDims(
        world_size=layout.world_size, tensor=layout.tensor, context=layout.context, ulysses=layout.ulysses,
        pipeline=layout.pipeline,
        shard=layout.cfg * layout.context if layout.dit_fsdp else None,
    )
    groups = build_groups(dims, platform, timeout_minutes=timeout_minutes)
    if layout.world_size == 1:
        return Runtime(platform=platform, layout=layout, groups=groups)
    replica, branch = layout.place(groups.rank)
    timeout = timedelta(minutes=timeout_minutes)
    replicas = [layout.replica_ranks(index) for index in range(layout.replicas)]
    pairs = sorted({tuple(layout.cfg_ranks(rank)) for rank in range(layout.world_size)})
    return Runtime(
        platform=platform, layout=layout, groups=groups, replica=replica, branch=branch,
        replica_group=new_groups(replicas, timeout) if layout.replica_size > 1 else None,
        cfg_group=new_groups(pairs, timeout) if layout.cfg > 1 else None,
    )
