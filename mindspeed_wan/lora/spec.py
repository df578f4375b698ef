"""Which modules of a Wan DiT an adapter can sit on, what they are called, and what one training run asks for.

Targets are matched exactly, never as substrings: VideoX-Fun's ``k`` matches every ``blocks.*`` because of the k in
"blocks". A target is one of

- a module's name inside its block, in any dialect, with or without the attention it belongs to: ``proj_q`` (MM),
  ``q`` (DiffSynth, Wan-AI), ``to_q`` (Diffusers), ``self_attn.proj_q``, ``attn2.to_out.0``, ``ffn.0``;
- a module outside the blocks by its full name: ``text_embedding.0``, ``proj_out`` is *not* one (MM's attention output);
- one module by its full path: ``blocks.3.ffn.0``;
- a group: ``all-linear`` (every linear layer), ``blocks`` (those of the blocks), ``attention``.

No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mindspeed_wan.errors import ConfigError, nearest
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout, Param, parameter_table

DEFAULT_TARGETS = ("proj_q", "proj_k", "proj_v", "proj_out", "ffn.0", "ffn.2")
"""MindSpeed-MM's and DiffSynth's choice: ten linears per block, 400 in A14B."""

_GROUPS = ("all-linear", "blocks", "attention")


@dataclass(frozen=True)
class LinearModule:
    """A linear layer: its name in every dialect, its size, and how tensor parallelism cuts its weight."""

    mm: str
    hf: str
    original: str
    out_features: int
    in_features: int
    tp_axis: int | None
    block: int | None

    def name(self, layout: Layout) -> str:
        """Return the module's name in ``layout``."""
        return str(getattr(self, layout))


def linear_modules(config: WanConfig) -> dict[str, LinearModule]:
    """Return every linear layer of the DiT by MM name, in model order (406 for A14B: 10 per block and 6 outside)."""
    return {
        param.mm[: -len(".weight")]: LinearModule(
            mm=param.mm[: -len(".weight")],
            hf=param.hf[: -len(".weight")],
            original=param.original[: -len(".weight")],
            out_features=param.shape[0],
            in_features=param.shape[1],
            tp_axis=param.tp_axis,
            block=param.block,
        )
        for param in parameter_table(config)
        if _is_linear_weight(param)
    }


def patch_embedding(config: WanConfig) -> LinearModule:
    """Return the patch embedding: a convolution in name, one product with a matrix here. Files may adapt it."""
    param = next(param for param in parameter_table(config) if param.mm == "patch_embedding.weight")
    module = param.mm.removesuffix(".weight")
    return LinearModule(module, module, module, param.shape[0], math.prod(param.shape[1:]), None, None)


def _is_linear_weight(param: Param) -> bool:
    return param.mm.endswith(".weight") and len(param.shape) == 2


def parse_targets(text: str | Sequence[str]) -> tuple[str, ...]:
    """Split MM's ``--lora-target-modules`` value: one comma-separated string, several words, or both."""
    parts = [text] if isinstance(text, str) else list(text)
    names = [name.strip() for part in parts for name in part.replace(" ", ",").split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def legal_targets(config: WanConfig) -> dict[str, list[str]]:
    """Return every legal target and the MM names it stands for, groups and single modules (``blocks.3...``) aside."""
    table: dict[str, list[str]] = {}
    for mm, module in linear_modules(config).items():
        for alias in _aliases(module):
            table.setdefault(alias, []).append(mm)
    return table


def _aliases(module: LinearModule) -> set[str]:
    """Names of a module without its block number; those in a block also without the attention."""
    if module.block is None:
        # Diffusers calls the head `proj_out`, which inside a block is MM's attention output: only the MM name counts.
        return {module.mm, module.original} | ({module.hf} if module.hf != "proj_out" else set())
    inside = {name.split(".", 2)[2] for name in (module.mm, module.hf, module.original)}
    attention = ("self_attn.", "cross_attn.", "attn1.", "attn2.")
    return inside | {name.split(".", 1)[1] for name in inside if name.startswith(attention)}


def match_targets(targets: Iterable[str], config: WanConfig, *, where: str = "lora target") -> dict[str, LinearModule]:
    """Return the modules that ``targets`` name, by MM name and in model order.

    Raises:
        ConfigError: a target matches nothing, or is an ambiguous tail such as ``0`` or ``linear_1``.
    """
    modules, table = linear_modules(config), legal_targets(config)
    paths = {module.name(layout): mm for mm, module in modules.items() for layout in ("mm", "hf", "original")
             if module.block is not None}
    chosen: set[str] = set()
    for target in targets:
        if target in _GROUPS:
            chosen.update(mm for mm, module in modules.items() if _in_group(module, target))
        elif target in table:
            chosen.update(table[target])
        elif target in paths:
            chosen.add(paths[target])
        else:
            raise _unknown_target(target, table, modules, where)
    if not chosen:
        raise ConfigError("no target modules are named", where=where, fix=f"use {','.join(DEFAULT_TARGETS)}")
    return {mm: module for mm, module in modules.items() if mm in chosen}


def _in_group(module: LinearModule, group: str) -> bool:
    if group == "all-linear":
        return True
    return module.block is not None and (group == "blocks" or "_attn." in module.mm)


def _unknown_target(
    target: str, table: Mapping[str, list[str]], modules: Mapping[str, LinearModule], where: str
) -> ConfigError:
    tails = [mm for mm in modules if mm.endswith("." + target)]
    if tails:
        reason = f"target {target!r} is ambiguous: it ends the names of {len(tails)} modules, such as {tails[0]}"
    elif any(target in mm for mm in modules):
        reason = f"target {target!r} matches no module exactly (targets are not substrings)"
    else:
        reason = f"target {target!r} matches no module"
    close = nearest(target, list(table))
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return ConfigError(reason, where=where, fix=f"{hint}legal: {', '.join(sorted(table))}, {', '.join(_GROUPS)}")


@dataclass(frozen=True)
class AdapterSize:
    """Rank and alpha of one module's adapter; ``alpha`` is effective: the update is ``alpha / rank * B A``."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor on ``B A``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraSpec:
    """What a training run asks for.

    Attributes:
        rank, alpha, dropout: MM's ``--lora-r --lora-alpha --lora-dropout``.
        targets: see the module docstring.
        rslora: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        rank_pattern: other ranks for some targets; alpha keeps its ratio to the rank there.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"lora rank {rank!r} is not a positive whole number")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ConfigError(f"lora alpha {self.alpha} is not positive")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora dropout {self.dropout} is not in [0, 1)")

    def resolve(self, config: WanConfig) -> dict[str, AdapterSize]:
        """Return rank and effective alpha of every targeted module, by MM name."""
        chosen = match_targets(self.targets, config)
        ranks = dict.fromkeys(chosen, self.rank)
        for target, rank in self.rank_pattern.items():
            extra = match_targets([target], config, where="lora rank pattern")
            outside = [name for name in extra if name not in chosen]
            if outside:
                raise ConfigError(f"rank pattern {target!r} names {outside[0]}, which is not a target",
                                  fix="add it to the targets or remove the pattern")
            ranks.update(dict.fromkeys(extra, rank))
        sizes = {}
        for name, rank in ranks.items():
            module = chosen[name]
            if rank > min(module.in_features, module.out_features):
                raise ConfigError(f"lora rank {rank} is larger than {name} ({module.out_features} x "
                                  f"{module.in_features})")
            # One ratio alpha / rank for all modules, or one alpha / sqrt(rank) law, is what PEFT's patterns mean.
            scale = self.alpha / math.sqrt(rank) if self.rslora else self.alpha / self.rank
            sizes[name] = AdapterSize(rank, scale * rank)
        return sizes

    def with_changes(self, **changes: Any) -> LoraSpec:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that ``from_dict`` reads back."""
        return {**asdict(self), "targets": list(self.targets), "rank_pattern": dict(self.rank_pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSpec:
        """Read what ``to_dict`` wrote."""
        return cls(**{**values, "targets": tuple(values["targets"])})
