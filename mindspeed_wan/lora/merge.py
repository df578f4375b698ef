"""The arithmetic of merging adapters into weights, in fp32, and a measure of what the stored dtype keeps of them.

``merge_model`` applies it to a model, ``merge_files`` to an expert on disk.

A LoRA is small beside the weights it changes: with the reward LoRAs' statistics, two thirds of the entries of a bf16
weight do not move at all. The measure compares the change that was stored with the change that was wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mindspeed_wan.lora.formats.file import Adapter, LoraFile

CHUNK_ELEMENTS = 2 << 20
"""Rows of a weight are merged in runs of about this many elements (8 MiB in fp32)."""

Weighted = Sequence[tuple[LoraFile, float]]
"""Adapter files with their weights; their updates add up."""


@dataclass
class MergeLoss:
    """How far the stored change is from the wanted one; counts add up over chunks, modules and ranks.

    ``relative_error`` is |stored - wanted| / |wanted|, ``kept`` the wanted change's share that was stored (the
    projection of one on the other; 1 is all of it), ``unchanged`` the share of entries that did not move.
    """

    wanted_square: float = 0.0
    error_square: float = 0.0
    projection: float = 0.0
    entries: int = 0
    still: int = 0

    def add(self, wanted: Tensor, before: Tensor, after: Tensor) -> None:
        """Count one chunk: the fp32 change that was asked for, and the stored weights before and after."""
        wanted, stored = wanted.reshape(-1), (after.float() - before.float()).reshape(-1)
        error = stored - wanted
        self.wanted_square += float(wanted.dot(wanted))
        self.error_square += float(error.dot(error))
        self.projection += float(stored.dot(wanted))
        self.entries += wanted.numel()
        self.still += wanted.numel() - int(torch.count_nonzero(stored))

    def include(self, other: MergeLoss) -> None:
        """Add another module's counts."""
        for name in ("wanted_square", "error_square", "projection", "entries", "still"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def relative_error(self) -> float:
        """0 is exact."""
        return math.sqrt(self.error_square / self.wanted_square) if self.wanted_square else 0.0

    @property
    def kept(self) -> float:
        """1 is everything."""
        return self.projection / self.wanted_square if self.wanted_square else 1.0

    @property
    def unchanged(self) -> float:
        """Share of entries that kept their old bits."""
        return self.still / self.entries if self.entries else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the three measures for a report."""
        return {"relative_error": self.relative_error, "kept": self.kept, "unchanged": self.unchanged}

    def __str__(self) -> str:
        return (f"{self.kept:.1%} of the change kept, relative error {self.relative_error:.2g}, "
                f"{self.unchanged:.1%} of the entries unmoved")


@dataclass
class MergeReport:
    """The loss of every merged parameter, by MM name."""

    losses: dict[str, MergeLoss] = field(default_factory=dict)

    @property
    def total(self) -> MergeLoss:
        """All parameters together."""
        total = MergeLoss()
        for loss in self.losses.values():
            total.include(loss)
        return total


def rows_at_once(shape: Sequence[int]) -> int:
    """Return how many rows of a weight of ``shape`` make one chunk."""
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def change_of_rows(
    parameter: str, rows: slice, columns: slice, shape: Sequence[int], loras: Weighted, device: torch.device | str
) -> Tensor | None:
    """Return the fp32 change of ``parameter[rows, columns]``, ``None`` when no adapter touches the parameter.

    ``shape`` is the whole parameter's; a convolution's trailing dimensions count as columns.
    """
    module, _, leaf = parameter.rpartition(".")
    total: Tensor | None = None
    for lora, weight in loras:
        parts = []
        adapter = lora.adapters.get(module) if leaf == "weight" else None
        if adapter is not None:
            parts.append(_low_rank_rows(adapter, rows, columns, weight, device))
        diff = lora.diffs.get(parameter)
        if diff is not None:
            flat = diff.reshape(shape[0], -1) if diff.ndim > 1 else diff.reshape(-1, 1)
            parts.append(flat[rows, columns].to(device, torch.float32) * weight)
        for part in parts:
            total = part if total is None else total + part
    return total


def _low_rank_rows(
    adapter: Adapter, rows: slice, columns: slice, weight: float, device: torch.device | str
) -> Tensor:
    up = adapter.up[rows].to(device, torch.float32)
    return (up @ adapter.down[:, columns].to(device, torch.float32)).mul_(weight * adapter.scale)


def touched_parameters(loras: Weighted) -> dict[str, None]:
    """Return the MM names of every parameter that ``loras`` change, in order."""
    names: dict[str, None] = {}
    for lora, _ in loras:
        names.update(dict.fromkeys(f"{mm}.weight" for mm in lora.adapters))
        names.update(dict.fromkeys(lora.diffs))
    return names


def row_chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, past the last) rows of the chunks of a tensor."""
    step = rows_at_once(shape)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def summary(report: MergeReport, stored: torch.dtype) -> str:
    """Return the line that inference and ``lora merge`` print."""
    line = f"merged {len(report.losses)} parameters into {str(stored).removeprefix('torch.')}: {report.total}"
    if report.total.relative_error > 0.1:
        line += "; keep the adapter unmerged, or save the merged weights in fp32, to have all of it"
    return line


def worst(losses: Mapping[str, MergeLoss], count: int = 3) -> list[tuple[str, MergeLoss]]:
    """Return the parameters with the largest relative error."""
    return sorted(losses.items(), key=lambda item: -item[1].relative_error)[:count]
