"""What ``--pipefusion`` takes, and what it does not go with. No torch; ``inference.pipefusion`` does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspeed_wan.parallel.inference_layout import InferenceLayout


@dataclass(frozen=True, kw_only=True)
class PipeFusionOptions:
    """``--pipefusion`` and what belongs to it.

    Attributes:
        on: use it.
        patches: pieces of the token axis; ``None`` is two per stage.
        warmup: whole steps at the start of each expert.
    """

    on: bool = False
    patches: int | None = None
    warmup: int = 2

    def __bool__(self) -> bool:
        return self.on

    def problems(self, layout: InferenceLayout, *, caches: bool, compiles: bool) -> list[str]:
        """Return what does not go with it, one sentence each."""
        if not self.on:
            default = PipeFusionOptions()
            changed = [name for name in ("patches", "warmup") if getattr(self, name) != getattr(default, name)]
            return [f"--pipefusion_{name} does nothing without --pipefusion" for name in changed]
        found = []
        if layout.pipeline == 1:
            found.append("--pipefusion sends patches through stages: give --pipeline_model_parallel_size 2 or more")
        if layout.context > 1:
            found.append("--pipefusion cuts the tokens itself; drop --ulysses_size and --ring_size")
        if caches:
            found.append("--pipefusion with --step_cache: both reuse the step before, and their errors add up; use one")
        if compiles:
            found.append("--pipefusion with --compile: patches of changing place and size would be compiled anew")
        if self.patches is not None and self.patches < 1:
            found.append(f"--pipefusion_patches is {self.patches}, at least 1 is needed")
        if self.warmup < 1:
            found.append(f"--pipefusion_warmup is {self.warmup}; patches need the keys and values of one whole step")
        return found

    def settings(self, layout: InferenceLayout) -> dict[str, Any]:
        """Return what decides the content of a video."""
        return {"patches": self.count(layout), "warmup": self.warmup, "stages": layout.pipeline}

    def count(self, layout: InferenceLayout) -> int:
        """Return the number of patches."""
        return self.patches or 2 * layout.pipeline
