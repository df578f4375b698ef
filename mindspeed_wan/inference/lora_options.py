"""What the command line says about adapters, checked before torch is imported."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS = ("low", "high")

PRESETS: dict[str, dict[str, Any]] = {
    # sigma 1, 0.9375, 0.8333, 0.625: the four levels the lightx2v adapters were distilled for; no guidance.
    "lightx2v": {"steps": 4, "shift": 5.0, "solver": "euler", "grid": "diffsynth", "guidance": (1.0, 1.0)},
}
"""Samplers by name (``--sample_preset``); flags given beside it win."""

MEMORY_NAMES = {
    "model_full_load": "resident",
    "model_cpu_offload": "sequential",
    "model_cpu_offload_and_qfloat8": "sequential",
    "sequential_cpu_offload": "block",
}
"""VideoX-Fun's names of the memory modes; the one with qfloat8 also sets ``--quantize fp8_weight_only``."""
_DISTILLED = re.compile(r"lightx2v|lightning|4[-_]?steps?\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Adapter files and their strengths for each expert.

    Attributes:
        low_paths, high_paths: files or folders in any format; several act together.
        low_weights, high_weights: one for all of that expert's files, or one for each; 1.0 when none is given.
        merge: merge into the weights instead of computing beside them.
        alpha: use this alpha for files that carry none.
        allow_unmatched: leave out keys that name nothing in the model.
    """

    low_paths: tuple[Path, ...] = ()
    high_paths: tuple[Path, ...] = ()
    low_weights: tuple[float, ...] = ()
    high_weights: tuple[float, ...] = ()
    merge: bool = False
    alpha: float | None = None
    allow_unmatched: bool = False

    def __bool__(self) -> bool:
        return bool(self.low_paths or self.high_paths)

    def of(self, expert: str) -> list[tuple[Path, float]]:
        """Return (file, weight) of the ``high`` or ``low`` expert's adapters."""
        paths, weights = (getattr(self, f"{expert}_{what}") for what in ("paths", "weights"))
        return list(zip(paths, weights * len(paths) if len(weights) == 1 else weights or (1.0,) * len(paths)))

    def problems(self, *, dit_fsdp: bool) -> list[str]:
        """Return everything that cannot be done."""
        found = []
        for expert, prefix in zip(EXPERTS, ("lora", "lora_high")):
            paths, weights = (getattr(self, f"{expert}_{what}") for what in ("paths", "weights"))
            if paths and weights and len(weights) not in (1, len(paths)):
                found.append(f"--{prefix}_weight has {len(weights)} values for {len(paths)} files of --{prefix}_path")
            found += [f"--{prefix}_weight {weight} is not a number" for weight in weights if not math.isfinite(weight)]
            if weights and not paths:
                found.append(f"--{prefix}_weight without --{prefix}_path")
            found += [f"--{prefix}_path {path} does not exist" for path in paths if not path.exists()]
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            found.append(f"--lora_alpha {self.alpha:g} is not positive")
        if self.merge and not self:
            found.append("--lora_merge without --lora_path or --lora_high_path")
        if self.merge and dit_fsdp:
            found.append("--lora_merge and --dit_fsdp: adapters are not merged into sharded weights; drop --lora_merge")
        return found

    def looks_distilled(self) -> bool:
        """Tell whether a file's name says that it is for a few steps without guidance."""
        return any(_DISTILLED.search(str(path)) for path in (*self.low_paths, *self.high_paths))

    def settings(self) -> dict[str, Any]:
        """Return what decides a video's content, JSON-ready: files by name, size and time, and their weights."""
        return {
            **{expert: [[str(path), *_stamp(path), weight] for path, weight in self.of(expert)] for expert in EXPERTS},
            "merge": self.merge, "alpha": self.alpha, "allow_unmatched": self.allow_unmatched,
        }


def _stamp(path: Path) -> list[int]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.is_file()]
    return [sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]
