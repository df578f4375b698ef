"""Wan-AI's own layout: ``high_noise_model/`` and ``low_noise_model/`` (Wan2.2), or shards at the root (Wan2.1)."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.formats import folder
from mindspeed_wan_converters.plan import Layout, Weights

EXPERT_FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}


def read(path: Path, expert: str | None = None, hint: WanConfig | None = None) -> Weights:
    """Read one expert in the original names."""
    return folder.read(path, "original", expert, hint)


def lay_out(weights: Weights, code: str | None, max_shard: int) -> Layout:
    """Return the files of a ``high_noise_model/`` folder that Wan-AI's ``WanModel.from_pretrained`` loads."""
    return folder.lay_out(weights, "original", code, max_shard)
