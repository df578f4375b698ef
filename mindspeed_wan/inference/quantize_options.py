"""What the command line says about 8-bit weights, checked before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mindspeed_wan.errors import did_you_mean
from mindspeed_wan.models.quantization_spec import MODES, QuantizationSpec

QFLOAT8_MEMORY = "model_cpu_offload_and_qfloat8"
"""VideoX-Fun's memory mode: one expert on the device at a time, its weights in fp8."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Which networks hold their weights in 8 bits.

    Attributes:
        dit: mode of both experts, ``None`` keeps ``--dtype``.
        text: mode of UMT5, ``None`` keeps ``--text_dtype``.
        keep: layers of the DiT's blocks that stay in high precision (``models.quantization_spec``).
    """

    dit: str | None = None
    text: str | None = None
    keep: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.dit or self.text or self.keep)

    @property
    def spec(self) -> QuantizationSpec | None:
        """What is quantised in each expert."""
        return None if self.dit is None else QuantizationSpec(self.dit, self.keep)

    @property
    def text_spec(self) -> QuantizationSpec | None:
        """How UMT5's linear layers are quantised; its embedding and norms never are."""
        return None if self.text is None else QuantizationSpec(self.text)

    def problems(self, *, t5_fsdp: bool) -> list[str]:
        """Return everything that cannot be done."""
        found = []
        for flag, mode in (("quantize", self.dit), ("quantize_text_encoder", self.text)):
            if mode is not None and mode not in MODES:
                hint = did_you_mean(mode, MODES)
                found.append(f"--{flag} {mode!r} is not known; use one of {', '.join(MODES)}"
                             + (f" ({hint})" if hint else ""))
        if self.keep and self.dit is None:
            found.append("--quantize_keep names layers to keep out of --quantize, which is not given")
        if self.text is not None and t5_fsdp:
            found.append("--quantize_text_encoder and --t5_fsdp: sharded rows are cut before a weight could be scaled; "
                         "8 bits halve UMT5, --t5_cpu takes it off the device")
        return found

    def settings(self) -> dict[str, Any]:
        """Return what decides a video's content, JSON-ready."""
        return asdict(self)
