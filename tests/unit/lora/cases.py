"""Small models and adapter files for the LoRA tests."""

from __future__ import annotations

import torch

from mindspeed_wan.lora.formats import Adapter, LoraFile
from mindspeed_wan.lora.spec import DEFAULT_TARGETS, match_targets
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

TINY = WanConfig(num_layers=2, dim=48, ffn_dim=96, num_heads=4, text_dim=32, text_len=16, freq_dim=16)


def random_lora(
    config: WanConfig = TINY, *, targets: tuple[str, ...] = DEFAULT_TARGETS, rank: int = 4, alpha: float = 8.0,
    dtype: torch.dtype = torch.float32, diffs: bool = False, seed: int = 0, scale: float = 0.1,
) -> LoraFile:
    """Return random adapters; with ``diffs`` also lightx2v's differences of norms, biases and modulation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    adapters = {mm: Adapter(draw(rank, module.in_features), draw(module.out_features, rank), alpha)
                for mm, module in match_targets(targets, config).items()}
    differences = {}
    if diffs:
        wanted = ("norm3.weight", "norm3.bias", "q_norm.weight", "proj_q.bias", "modulation", "patch_embedding.bias")
        differences = {p.mm: draw(*p.shape) for p in parameter_table(config) if p.mm.endswith(wanted)}
        differences["head.head.weight"] = draw(*(4 * config.out_channels, config.dim))
    return LoraFile(adapters, differences)


def same(a: LoraFile, b: LoraFile) -> bool:
    """Tell whether two files hold the same bits and scales."""
    return (
        list(a.adapters) == list(b.adapters)
        and all(x.alpha == y.alpha and x.down.dtype == y.down.dtype and torch.equal(x.down, y.down)
                and torch.equal(x.up, y.up) for x, y in zip(a.adapters.values(), b.adapters.values()))
        and a.diffs.keys() == b.diffs.keys()
        and all(torch.equal(a.diffs[name], b.diffs[name]) for name in a.diffs)
    )
