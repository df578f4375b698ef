"""Process groups: one call starts torch.distributed, one builds every group of a layout on Megatron's parallel_state.

A world of one rank needs neither torchrun nor Megatron: every group is ``None``, and code that takes a group treats
``None`` as "alone".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mindspeed_wan.errors import ConfigError, ParallelError
from mindspeed_wan.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from mindspeed_wan.platforms.base import Platform

TENSOR, REPLICATE, SHARD = "tp", "replicate", "shard"
"""Mesh dimension names, outermost first."""


def init_distributed(platform: Platform, timeout_minutes: float = 10.0) -> None:
    """Join the job that the launcher's environment describes; nothing to do for a single rank.

    Keys of the rendezvous are prefixed with torchrun's restart count. torchrun keeps one store for all attempts, so
    without the prefix a restarted gloo job reads the addresses of its dead predecessor and may never come back.

    Raises:
        ConfigError: WORLD_SIZE is above 1 but RANK, MASTER_ADDR or MASTER_PORT is missing.
        ParallelError: the other ranks did not show up in time.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or world_size == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set", fix="start the job with torchrun"
        )
    timeout = timedelta(minutes=timeout_minutes)
    rank, address = int(os.environ["RANK"]), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(
            backend_name(platform), store=rendezvous_store(rank, world_size, timeout), rank=rank, world_size=world_size,
            timeout=timeout,
        )  # fmt: skip
    except (dist.DistError, RuntimeError) as error:
        raise ParallelError(
            f"rank {rank} of {world_size} could not meet the others at {address}: {str(error).splitlines()[0]}",
            fix="check that every node runs the same launcher, reaches this address, and that no rank died at start",
        ) from error


def backend_name(platform: Platform) -> str:
    """Collectives on host tensors (checkpoint plans, object lists) go through gloo beside the device's own backend."""
    if platform.device_type == "cpu":
        return "gloo"
    return f"cpu:gloo,{platform.device_type}:{platform.backend}"


def rendezvous_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the job's key-value store at MASTER_ADDR, under a prefix of this attempt."""
    agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: dist.Store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size,
        is_master=rank == 0 and not agent_hosts_store, timeout=timeout, wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt{attempt}", store)


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """The groups this rank belongs to. A group of one rank is ``None``.

    ``mesh`` orders the ranks (tensor, [replicate,] shard): with the tensor dimension outermost, DTensor placements
    read left to right are exactly "tensor parallel first, FSDP second". ``fsdp_mesh`` is the same without tensor.
    Both are ``None`` for a single rank, and hold only the ranks of this rank's pipeline stage. ``pp`` links the ranks
    that hold the stages of one model.
    """

    dims: ParallelDims = field(default_factory=ParallelDims)
    rank: int = 0
    tp: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    dp_cp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    shard: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    fsdp_mesh: DeviceMesh | None = None

    @property
    def tp_rank(self) -> int:
        """This rank's number in its tensor group."""
        return group_rank(self.tp)

    @property
    def cp_rank(self) -> int:
        """This rank's number in its context group."""
        return group_rank(self.cp)

    @property
    def dp_rank(self) -> int:
        """This rank's number in its data group: which slice of the global batch it works on."""
        return group_rank(self.dp)

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return group_rank(self.pp)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in ``group``, 1 for ``None``."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this rank's number in ``group``, 0 for ``None``."""
    return 0 if group is None else group.rank()


def build_groups(dims: ParallelDims, platform: Platform, *, timeout_minutes: float = 10.0) -> ParallelGroups:
    """Create every group of a layout. Collective: all ranks call it with the same ``dims``.

    Raises:
        ParallelError: ``dims.world_size`` is not the number of ranks that were started.
    """
    platform.activate()
    if dims.world_size == 1:
        return ParallelGroups(dims=dims)
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started != dims.world_size:
        raise ParallelError(f"the layout is for {dims.world_size} ranks, but {started} were started")
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        virtual_pipeline_model_parallel_size=dims.virtual if dims.virtual > 1 else None,
        context_parallel_size=dims.context,
        distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type]  # a timedelta of it is all that is made
        create_gloo_process_groups=False,
    )
    timeout = timedelta(minutes=timeout_minutes)
    ulysses, ring = _context_subgroups(dims, parallel_state, timeout)
    replicate, shard = _data_subgroups(dims, parallel_state, timeout)
    mesh = _mesh(dims, platform.device_type, [parallel_state.get_tensor_model_parallel_group(), replicate, shard])
    fsdp_mesh = mesh[(REPLICATE, SHARD)] if dims.replicas > 1 else mesh[SHARD]
    return ParallelGroups(
        dims=dims,
        rank=dist.get_rank(),
        tp=_or_none(parallel_state.get_tensor_model_parallel_group()),
        cp=_or_none(parallel_state.get_context_parallel_group()),
        ulysses=_or_none(ulysses),
        ring=_or_none(ring),
        dp=_or_none(parallel_state.get_data_parallel_group()),
        dp_cp=_or_none(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        pp=_or_none(parallel_state.get_pipeline_model_parallel_group()),
        shard=_or_none(shard),
        mesh=mesh,
        fsdp_mesh=fsdp_mesh,
    )


def _or_none(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group if group_size(group) > 1 else None


def _mesh(dims: ParallelDims, device_type: str, groups: list[dist.ProcessGroup | None]) -> DeviceMesh:
    """View this stage's groups (tensor, replicate, shard) as a mesh: no communicator is created."""
    stages = torch.arange(dims.world_size).view(-1, dims.replicas, dims.shard_size, dims.tensor)
    ranks = stages[dist.get_rank() // dims.stage_ranks].movedim(-1, 0)
    names = (TENSOR, REPLICATE, SHARD)
    if dims.replicas == 1:
        groups, names, ranks = [groups[0], groups[2]], (TENSOR, SHARD), ranks[:, 0]  # type: ignore[assignment]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks.contiguous(), mesh_dim_names=names)  # type: ignore[arg-type]


def _context_subgroups(
    dims: ParallelDims, parallel_state: Any, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return (ulysses, ring). Neighbouring context ranks, on the fastest links, exchange heads."""
    context = parallel_state.get_context_parallel_group()
    if dims.ring == 1:
        return context, None
    if dims.ulysses_size == 1:
        return None, context
    ranks = torch.arange(dims.world_size).view(-1, dims.ring, dims.ulysses_size, dims.tensor)  # stages x data first
    return new_groups(_rows(ranks, 2), timeout), new_groups(_rows(ranks, 1), timeout)


def _data_subgroups(
    dims: ParallelDims, parallel_state: Any, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup]:
    """Return (replicate, shard) of data x context; neighbours share one copy of the parameters.

    Megatron makes these too (as optimizer instances), but then wants einops, which it does not declare.
    """
    if dims.replicas == 1:
        return None, parallel_state.get_data_parallel_group(with_context_parallel=True)
    ranks = torch.arange(dims.world_size).view(-1, dims.replicas, dims.shard_size, dims.tensor)  # stages first
    return new_groups(_rows(ranks, 1), timeout), new_groups(_rows(ranks, 2), timeout)


def _rows(ranks: torch.Tensor, axis: int) -> list[list[int]]:
    """Return every row of ``ranks`` along ``axis``."""
    return ranks.movedim(axis, -1).flatten(0, -2).tolist()  # type: ignore[no-any-return]


def new_groups(members: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Create a group of each list of ranks and return this rank's. Collective: all ranks give the same lists."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


def one_rank_mesh(platform: Platform) -> DeviceMesh:
    """Return a mesh of this rank alone, for FSDP2's mixed precision without a launcher."""
    if not dist.is_initialized():
        dist.init_process_group(backend_name(platform), store=dist.HashStore(), rank=0, world_size=1)
    return DeviceMesh(platform.device_type, torch.arange(1), mesh_dim_names=(SHARD,))


def destroy() -> None:
    """Leave the job: drop Megatron's groups and torch's. Safe to call twice and without a job."""
    if not dist.is_initialized():
        return
    import sys

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
