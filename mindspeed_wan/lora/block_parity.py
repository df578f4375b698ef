"""One transformer block with an adapter beside its weights and with the adapter merged into them: the same output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mindspeed_wan.lora.apply import load_adapter, unload
from mindspeed_wan.lora.formats.file import LoraFile
from mindspeed_wan.lora.merge_model import merge_into_model
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.rope import rotary_tables

GRID = (2, 6, 8)
"""Tokens (frames, height, width) of the test input: small, and no power of two."""
VISIBLE_CHANGE = 0.05
"""The adapter is strengthened until it changes the block's output by this much, relatively."""


@torch.no_grad()
def block_parity(
    lora: LoraFile, config: WanConfig, read: Callable[[str], Tensor], device: torch.device, weight: float = 1.0
) -> tuple[float, int | None]:
    """Return (difference, block) for the first block that ``lora`` changes, in fp32 on ``device``.

    The difference is L2, relative to what the adapter does to the block's output; ``None`` when no block is changed.

    Args:
        read: returns a base parameter by MM name, fp32 on the CPU.
    """
    blocks = [int(name.split(".")[1]) for name in (*lora.adapters, *lora.diffs) if name.startswith("blocks.")]
    if not blocks:
        return 0.0, None
    block = min(blocks)
    here = _of_block(lora, block)
    model = _one_block_model(config, read, block, device)
    before = _forward(model)
    change = float((_with_adapter(model, here, weight) - before).norm())
    if change == 0.0:
        return 0.0, block
    # An adapter may change the output by less than fp32 resolves well; made stronger, both ways must still agree.
    weight *= max(1.0, VISIBLE_CHANGE * float(before.norm()) / change)
    beside = _with_adapter(model, here, weight)
    merge_into_model(model, [(here, weight)])
    inside = _forward(model)
    return float((beside - inside).norm() / (inside - before).norm()), block


def _with_adapter(model: WanDiT, lora: LoraFile, weight: float) -> Tensor:
    load_adapter(model, lora, "checked", weight=weight)
    output = _forward(model)
    unload(model, "checked")
    return output


def _of_block(lora: LoraFile, block: int) -> LoraFile:
    """Return the part of ``lora`` for one block, renamed to block 0."""
    prefix = f"blocks.{block}."

    def renamed(name: str) -> str:
        return "blocks.0." + name[len(prefix) :]

    adapters = {renamed(mm): a for mm, a in lora.adapters.items() if mm.startswith(prefix)}
    diffs = {renamed(name): d for name, d in lora.diffs.items() if name.startswith(prefix)}
    return LoraFile(adapters, diffs)


def _one_block_model(config: WanConfig, read: Callable[[str], Tensor], block: int, device: torch.device) -> WanDiT:
    """Return a model whose block 0 holds the weights of ``block``; everything else stays on the meta device."""
    with torch.device("meta"):
        model = WanDiT(config.with_changes(num_layers=1))
    model.blocks[0].to_empty(device=device)
    for name, parameter in model.blocks[0].named_parameters():
        parameter.copy_(read(f"blocks.{block}.{name}"))
    return model.eval()


def _forward(model: WanDiT) -> Tensor:
    config = model.config
    device = next(model.blocks[0].parameters()).device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    length = GRID[0] * GRID[1] * GRID[2]
    x, text = normal(length, 1, config.dim), normal(config.text_len, 1, config.dim)
    image = normal(64, 1, config.dim) if config.has_image_embedder else None
    cos, sin = rotary_tables(config.head_dim, GRID, device)
    return model.blocks[0](x, normal(1, 6, config.dim) * 0.1, cos, sin, text, image=image, length=length,
                           compute_dtype=torch.float32)
