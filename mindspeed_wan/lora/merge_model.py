"""Merging adapters into the weights of a model in memory; each tensor-parallel rank changes its own part."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.lora.merge import MergeLoss, MergeReport, Weighted, change_of_rows, row_chunks, touched_parameters
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.views import global_view, local_slices
from mindspeed_wan.parallel.groups import ParallelGroups


@torch.no_grad()
def merge_into_model(
    model: WanDiT, loras: Weighted, groups: ParallelGroups | None = None, *, skip: Collection[str] = ()
) -> MergeReport:
    """Add adapters to a model's own weights, each tensor rank to its part, in fp32; report what the dtype kept.

    The report counts this rank's part. Merging cannot be undone; runtime adapters (``apply.load_adapter``) can.
    Parameters in ``skip`` have been merged before.

    Raises:
        ConfigError: the weights are sharded by FSDP2 (rows of one weight lie on several ranks in the wrong shape), or
            held in 8 bits, where a merge would be rounded twice.
    """
    report = MergeReport()
    for name in touched_parameters(loras):
        if name in skip or name not in model.param_layout:  # the latter is another pipeline stage's
            continue
        parameter = model.get_parameter(name)
        if not parameter.is_floating_point():
            raise ConfigError(f"adapters cannot be merged into {name}, which is held in 8 bits",
                              fix="merge while the weights are read, or keep the adapters unmerged (the default)")
        if isinstance(parameter, DTensor):
            raise ConfigError("adapters cannot be merged into weights that FSDP2 has sharded",
                              fix="merge before sharding, or keep the adapters unmerged (the default)")
        view = global_view(parameter.detach(), model.param_layout[name], groups)
        local, index = local_slices(view)
        report.losses[name] = _merge_local(local, name, tuple(view.shape), index, loras)
    return report


def _merge_local(
    local: Tensor, name: str, shape: tuple[int, ...], index: tuple[slice, ...], loras: Weighted
) -> MergeLoss:
    loss = MergeLoss()
    flat = local.view(local.shape[0], -1)
    columns = index[1] if len(shape) == 2 else slice(0, flat.shape[1])
    for start, stop in row_chunks(local.shape):
        rows = slice(index[0].start + start, index[0].start + stop)
        wanted = change_of_rows(name, rows, columns, shape, loras, local.device)
        if wanted is not None:
            before = flat[start:stop].clone()
            flat[start:stop] = (before.float() + wanted).to(local.dtype)
            loss.add(wanted, before, flat[start:stop])
    return loss
