"""Which layers of a Wan DiT are held in 8 bits, and how. No torch here: command lines and memory plans read it.

Only the linear layers of the blocks are quantised: 97 % of the bytes. What stays in high precision is small, and a
rounding error there reaches every token: the embeddings, the time projection, the head, norms and modulation.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mindspeed_wan.errors import ConfigError, did_you_mean
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Param, parameter_table

Format = Literal["fp8", "int8"]
"""``fp8``: e4m3 (finite, +-448). ``int8``: symmetric, +-127. Both with one fp32 scale per output channel."""

MODES: tuple[str, ...] = ("fp8_weight_only", "fp8_dynamic", "int8_weight_only")
"""``weight_only`` saves memory: products run in the compute dtype. ``fp8_dynamic`` also rounds each token's activations
to fp8 and multiplies fp8 by fp8 on the matrix units of sm_89 and later."""

SCALE_SUFFIX = "_scale"
"""The scale of ``x.weight`` is ``x.weight_scale``."""

_BRACES = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")


@dataclass(frozen=True)
class QuantizationSpec:
    """What is quantised.

    Attributes:
        mode: one of ``MODES``.
        keep: block layers that stay in high precision too: a path (``blocks.0``, ``blocks.{0-1,38-39}``,
            ``blocks.3.ffn.2``) with everything below it, or the end of a path (``ffn.2``, ``cross_attn.proj_k``).
    """

    mode: str
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            hint = did_you_mean(self.mode, MODES)
            raise ConfigError(f"quantization mode {self.mode!r} is not known" + (f"; {hint}" if hint else ""),
                              fix=f"use one of {', '.join(MODES)}")

    @property
    def format(self) -> Format:
        """How a weight is stored."""
        return "int8" if self.mode.startswith("int8") else "fp8"

    @property
    def dynamic(self) -> bool:
        """Activations are rounded to fp8 as well."""
        return self.mode == "fp8_dynamic"

    def layers(self, config: WanConfig) -> dict[str, Param]:
        """Return the weights to quantise by the MM name of their layer, in model order.

        Raises:
            ConfigError: an entry of ``keep`` that names no linear layer of a block.
        """
        layers = {p.mm.removesuffix(".weight"): p for p in parameter_table(config)
                  if p.block is not None and p.mm.endswith(".weight") and len(p.shape) == 2}
        kept: set[str] = set()
        for name in self.keep:
            found = _matching(name, layers)
            if not found:
                raise ConfigError(f"{name!r} is no linear layer of a block", where="layers kept in high precision",
                                  fix="name blocks.0, blocks.{0-1,39}, ffn.2 or cross_attn.proj_k; layers outside the "
                                  "blocks are always kept")
            kept |= found
        return {name: param for name, param in layers.items() if name not in kept}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {**asdict(self), "keep": list(self.keep)}


def _matching(name: str, layers: dict[str, Param]) -> set[str]:
    escaped = re.escape(name.strip())
    pattern = _BRACES.sub(_alternatives, escaped.replace(r"\{", "{").replace(r"\}", "}").replace(r"\-", "-"))
    wanted = re.compile(rf"(?:.*\.)?{pattern}(?:\..*)?" if not name.startswith("blocks") else rf"{pattern}(?:\..*)?")
    return {layer for layer in layers if wanted.fullmatch(layer)}


def _alternatives(match: re.Match[str]) -> str:
    numbers: list[str] = []
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        numbers += map(str, range(int(first), int(last or first) + 1))
    return f"(?:{'|'.join(numbers)})"


def expert_bytes(config: WanConfig, *, element: int, quantization: QuantizationSpec | None = None, tensor: int = 1,
                 shard: int = 1) -> float:
    """Return the weight bytes of one expert on one rank.

    Args:
        element: bytes per value of what is not quantised.
        quantization: ``None`` quantises nothing.
        tensor, shard: tensor-parallel ranks and FSDP2 shards.
    """
    chosen = quantization.layers(config) if quantization is not None else {}
    total = 0.0
    for parameter in parameter_table(config):
        quantised = parameter.mm.removesuffix(".weight") in chosen and parameter.mm.endswith(".weight")
        count = math.prod(parameter.shape)
        nbytes = count + 4 * parameter.shape[0] if quantised else count * element
        total += nbytes / (tensor if parameter.tp_axis is not None else 1) / shard
    return total
