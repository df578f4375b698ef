"""The architecture an adapter is for: from a preset's name, or from what lies beside an expert's weights."""

from __future__ import annotations

import json
from pathlib import Path

from mindspeed_wan.checkpoint.sources import find
from mindspeed_wan.errors import CheckpointError, ConfigError, did_you_mean
from mindspeed_wan.models.wan.config import PRESETS, WanConfig


def config_of(model: str | Path) -> WanConfig:
    """Return the configuration of a preset (``t2v-A14B``), a ``config.json``, or an expert's folder of any layout.

    Raises:
        ConfigError: neither a preset nor a path.
        CheckpointError: a folder that does not say what it is.
    """
    if str(model) in PRESETS:
        return PRESETS[str(model)]
    path = Path(model)
    if not path.exists():
        raise ConfigError(f"{str(model)!r} is neither a model nor a path. {did_you_mean(str(model), list(PRESETS))}",
                          fix=f"use one of {', '.join(PRESETS)}, or the folder of an expert")
    if path.is_file() and path.suffix == ".json":
        return _from_json(path)
    if (path / "config.json").is_file():
        return _from_json(path / "config.json")
    card = find(path).card
    if isinstance(card.get("config"), dict):
        return WanConfig.from_dict(card["config"])
    raise CheckpointError("does not say which model it is (no config.json, no wan.json)", where=str(path),
                          fix=f"name the model: {', '.join(PRESETS)}")


def _from_json(path: Path) -> WanConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from None
    if "num_attention_heads" in values:
        return WanConfig.from_diffusers(values, where=str(path))
    return WanConfig.from_original(values, where=str(path))
