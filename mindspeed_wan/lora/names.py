"""From a name in an adapter file to a module or parameter of the model.

Every name is looked up in a table built from the model's own parameters, in all three dialects and in the kohya form
where dots have become underscores. Underscores of a key are never turned back into dots, which is ambiguous
(``self_attn``, ``time_embedding``); dots of a key may become underscores, so kohya files that kept some of their dots
(``lora_unet_blocks_0.cross_attn.k``) resolve as well. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout, Param, parameter_table

LAYOUTS: tuple[Layout, ...] = ("original", "mm", "hf")

DOTTED_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.", "predictor.",
    "pipe.dit2.", "pipe.dit.", "dit.", "module.",
)
KOHYA_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")


@dataclass(frozen=True)
class ModuleName:
    """A resolved name: the MM module path, the dialect of the key, and the prefix that was taken off it."""

    mm: str
    layout: Layout
    prefix: str


class NameTable:
    """Resolves module stems (a key without its ``.lora_A.weight``) for one model."""

    def __init__(self, config: WanConfig) -> None:
        self.params: dict[str, Param] = {param.mm: param for param in parameter_table(config)}
        self._dotted: dict[str, tuple[str, Layout]] = {}
        self._squashed: dict[str, tuple[str, Layout]] = {}
        for param in self.params.values():
            for layout in LAYOUTS:
                self._add(param.name(layout).rpartition(".")[0], param.mm.rpartition(".")[0], layout)
                # Modulation tables are parameters without a module of their own; some files name them directly.
                self._add(param.name(layout), param.mm, layout)

    def _add(self, name: str, mm: str, layout: Layout) -> None:
        if name:
            self._dotted.setdefault(name, (mm, layout))
            self._squashed.setdefault(name.replace(".", "_"), (mm, layout))

    def resolve(self, stem: str) -> ModuleName | None:
        """Return the module that ``stem`` names, or ``None``."""
        for prefix in KOHYA_PREFIXES:
            if stem.startswith(prefix):
                found = self._squashed.get(stem[len(prefix) :].replace(".", "_"))
                if found:
                    return ModuleName(*found, prefix=prefix)
        taken = ""
        while True:
            found = self._dotted.get(stem)
            if found:
                return ModuleName(*found, prefix=taken)
            prefixes = [prefix for prefix in DOTTED_PREFIXES if stem.startswith(prefix)]
            if not prefixes:
                return None
            taken, stem = taken + prefixes[0], stem[len(prefixes[0]) :]

    def name_in(self, mm: str, layout: Layout) -> str:
        """Return the name of an MM module or parameter in ``layout``."""
        if mm in self.params:
            return self.params[mm].name(layout)
        for leaf in ("weight", "modulation", "bias", "emb_pos"):
            param = self.params.get(f"{mm}.{leaf}")
            if param is not None:
                return param.name(layout).rpartition(".")[0]
        raise KeyError(mm)
