"""Low-rank approximation: an adapter out of a fine-tuned expert, and an adapter of another rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.sources import check_names_and_shapes, find, open_weights
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora.formats.file import Adapter, LoraFile
from mindspeed_wan.lora.spec import DEFAULT_TARGETS, match_targets
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

EXACT_BELOW = 512
"""Matrices whose smaller side is at most this are decomposed exactly; larger ones by a randomised range finder."""
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4


@dataclass(frozen=True)
class Approximation:
    """An adapter file and, by module, the share of the wanted change's energy (squared norm) that it holds."""

    lora: LoraFile
    energy: dict[str, float]


def extract(
    base: str | Path,
    tuned: str | Path,
    config: WanConfig,
    rank: int,
    *,
    targets: Iterable[str] = DEFAULT_TARGETS,
    with_diffs: bool = False,
    on_module: Callable[[str], None] | None = None,
) -> Approximation:
    """Return the best adapter of ``rank`` for the difference ``tuned - base`` of two experts on disk.

    Args:
        base, tuned: anything ``checkpoint.sources`` understands.
        with_diffs: also store the exact differences of biases, norms and modulation tables.

    Raises:
        CheckpointError: weights of another model or with values that are not finite, or no difference at all.
        ConfigError: unknown targets, or a rank that is not positive.
    """
    _check_rank(rank)
    modules = match_targets(targets, config)
    adapters: dict[str, Adapter] = {}
    diffs: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    shapes = {p.mm: p.shape for p in parameter_table(config)}
    with open_weights(find(base), config) as old, open_weights(find(tuned), config) as new:
        for files in (old, new):
            check_names_and_shapes(files, shapes, config)
        for mm in modules:
            if on_module is not None:
                on_module(mm)
            delta = new.read(f"{mm}.weight").float() - old.read(f"{mm}.weight").float()
            _check_finite(f"{mm}.weight", delta)
            if bool(delta.any()):
                adapters[mm], energy[mm] = approximate(delta, rank)
        if with_diffs:
            others = [n for n in shapes if n.rpartition(".")[0] not in modules or not n.endswith(".weight")]
            for name in others:
                diff = new.read(name).float() - old.read(name).float()
                _check_finite(name, diff)
                if bool(diff.any()):
                    diffs[name] = diff
    if not adapters and not diffs:
        raise CheckpointError(f"{base} and {tuned} have the same weights in the targeted modules")
    return Approximation(LoraFile(adapters, diffs), energy)


def resize(lora: LoraFile, rank: int) -> Approximation:
    """Return the best adapters of another rank; the effective update ``scale * B A`` is what is approximated.

    Growing keeps the update exactly. Alpha becomes the rank (scale 1), dtype stays.

    Raises:
        CheckpointError: values that are not finite.
        ConfigError: a rank that is not positive.
    """
    _check_rank(rank)
    adapters, energy = {}, {}
    for mm, adapter in lora.adapters.items():
        _check_finite(mm, adapter.up, adapter.down)
        # B A = Qb (Rb Ra^T) Qa^T: the decomposition of a rank x rank matrix instead of an out x in one.
        qb, rb = torch.linalg.qr(adapter.up.double() * adapter.scale)
        qa, ra = torch.linalg.qr(adapter.down.double().T)
        u, s, vt = torch.linalg.svd(rb @ ra.T)
        resized = _factors(qb @ u, s, vt @ qa.T, min(rank, len(s)))
        adapters[mm] = _padded(resized, rank, adapter.up.dtype)
        energy[mm] = _share(s, rank)
    return Approximation(replace(lora, adapters=adapters), energy)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"lora rank {rank} is not positive")


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise CheckpointError(f"{name} holds values that are not finite", fix="download or save the weights again")


def approximate(delta: Tensor, rank: int) -> tuple[Adapter, float]:
    """Return the adapter of ``rank`` (alpha = rank, fp32) nearest to ``delta`` [out, in], and the energy it holds."""
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= EXACT_BELOW:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights give the same adapter
            u, s, v = torch.svd_lowrank(delta, q=min(rank + _OVERSAMPLING, *delta.shape), niter=_POWER_ITERATIONS)
        vt = v.T
    adapter = _factors(u, s, vt, rank)
    return adapter, float(s[:rank].double().square().sum() / delta.double().square().sum())


def _factors(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> Adapter:
    """Split the singular values evenly, so that A and B have entries of like size."""
    root = s[:rank].sqrt()
    down, up = (root[:, None] * vt[:rank]).float(), (u[:, :rank] * root).float()
    return Adapter(down.contiguous(), up.contiguous(), float(rank))


def _padded(adapter: Adapter, rank: int, dtype: torch.dtype) -> Adapter:
    extra = rank - adapter.rank
    down = torch.nn.functional.pad(adapter.down, (0, 0, 0, extra))
    up = torch.nn.functional.pad(adapter.up, (0, extra))
    return Adapter(down.to(dtype), up.to(dtype), float(rank))


def _share(s: Tensor, rank: int) -> float:
    total = float(s.square().sum())
    return float(s[:rank].square().sum()) / total if total else 1.0
