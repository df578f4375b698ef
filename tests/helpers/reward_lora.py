"""A stand-in for the Wan2.2-Fun reward LoRAs: the exact key grammar, counts and statistics, no download.

VideoX-Fun's network trained with ``--lora_skip_name ffn``: every linear of the model but those of the FFNs, so
8 per block and 6 outside, three tensors each. At A14B size: 326 modules, 978 tensors, 429,171,014 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_wan.lora.spec import linear_modules
from mindspeed_wan.models.wan.config import WanConfig

NUM_MODULES, NUM_TENSORS, NUM_VALUES = 326, 978, 429_171_014
RANK, ALPHA = 128, 64.0
STD_UP, STD_DOWN = 0.001245, 0.008388


def reward_lora(
    config: WanConfig, *, rank: int = RANK, alpha: float = ALPHA, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Return the file's tensors in bf16; with ``device="meta"`` only alpha has a value."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def draw(shape: tuple[int, int], std: float) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    for module in linear_modules(config).values():
        if ".ffn." in module.original:
            continue
        stem = "lora_unet__" + module.original.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = draw((rank, module.in_features), STD_DOWN)
        tensors[f"{stem}.lora_up.weight"] = draw((module.out_features, rank), STD_UP)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    return tensors
