"""What an adapter file means, whatever its format: low-rank pairs per module, and plain differences per parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mindspeed_wan.errors import CheckpointError


@dataclass(frozen=True)
class Adapter:
    """One module's update ``alpha / rank * up @ down``.

    Attributes:
        down: A, ``[rank, in_features]``, in the file's dtype.
        up: B, ``[out_features, rank]``.
        alpha: effective alpha (a rank-stabilised file's is already multiplied by sqrt(rank)).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor on ``up @ down``."""
        return self.alpha / self.rank

    def delta(self, weight: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``weight * scale * up @ down`` [out, in], multiplied in ``dtype``."""
        return (self.up.to(dtype) @ self.down.to(dtype)).mul_(weight * self.scale)


@dataclass(frozen=True)
class LoraFile:
    """An adapter file in this package's terms.

    Attributes:
        adapters: by MM module name (``blocks.0.self_attn.proj_q``).
        diffs: by MM parameter name (``blocks.0.norm3.weight``): added to the parameter, times the adapter's weight.
        metadata: the file's own strings.
        format: the format it was read from, a key of ``FORMATS``.
        alpha_source: where alpha came from: ``stored``, ``metadata``, ``override``, or ``default`` (alpha = rank).
        unmatched: keys that name nothing in the model; empty unless the caller allowed them.
    """

    adapters: Mapping[str, Adapter]
    diffs: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "mm"
    alpha_source: str = "stored"
    unmatched: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.adapters and not self.diffs:
            raise CheckpointError("no adapter weights in it", fix="is this a LoRA file?")

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({adapter.rank for adapter in self.adapters.values()})

    @property
    def kinds(self) -> dict[str, int]:
        """How many modules and differences there are of each kind, blocks taken together."""
        names = (*self.adapters, *self.diffs)
        return dict(Counter(f"blocks.*.{name.split('.', 2)[2]}" if name.startswith("blocks.") else name
                            for name in names))

    @property
    def num_values(self) -> int:
        """Values of all adapters and differences, alphas not counted."""
        pairs = sum(a.down.numel() + a.up.numel() for a in self.adapters.values())
        return pairs + sum(diff.numel() for diff in self.diffs.values())

    def to(self, dtype: torch.dtype) -> LoraFile:
        """Return the same file with every tensor in ``dtype``."""
        adapters = {n: replace(a, down=a.down.to(dtype), up=a.up.to(dtype)) for n, a in self.adapters.items()}
        return replace(self, adapters=adapters, diffs={n: d.to(dtype) for n, d in self.diffs.items()})
