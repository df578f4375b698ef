"""Where the scale of an adapter file hides: scalar tensors, PEFT's JSON, kohya's and our own metadata, or nowhere."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import CheckpointError

PEFT_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's LoraConfig inside a safetensors file."""
OWN_KEY = "mindspeed_wan_lora"
"""Where this package keeps what a format has no place for: effective alphas, and whether they are folded into B."""
PEFT_CONFIG_FILE = "adapter_config.json"


def load_json(text: str, what: str, where: str) -> dict[str, Any]:
    """Parse a JSON object from metadata or a file, or raise a CheckpointError that says which."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON ({error})", where=where) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", where=where)
    return value


def peft_settings(metadata: Mapping[str, str], file: Path | None, where: str) -> dict[str, Any] | None:
    """Return PEFT's LoraConfig of an adapter file, from its metadata or the JSON beside it, without prefixes."""
    if PEFT_KEY in metadata:
        values = load_json(metadata[PEFT_KEY], f"metadata {PEFT_KEY}", where)
        prefixes = [key.partition(".")[0] for key in values if key.startswith(("transformer.", "transformer_2."))]
        return {key[len(prefixes[0]) + 1 :] if prefixes else key: value for key, value in values.items()}
    beside = file.parent / PEFT_CONFIG_FILE if file is not None else None
    if beside is not None and beside.is_file():
        return load_json(beside.read_text(encoding="utf-8"), PEFT_CONFIG_FILE, str(beside))
    return None


def peft_alpha(settings: Mapping[str, Any], name: str, rank: int, where: str) -> float:
    """Return the effective alpha of the module that PEFT calls ``name``."""
    try:
        alpha = float(_pattern(settings.get("alpha_pattern") or {}, name, settings.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"PEFT metadata: alpha is not a number ({error})", where=where) from None
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if pattern == name or re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def kohya_alpha(metadata: Mapping[str, str]) -> float | None:
    """Return kohya's network alpha from metadata, for files whose ``.alpha`` tensors a conversion dropped."""
    try:
        return float(metadata["ss_network_alpha"])
    except (KeyError, ValueError):
        return None


def own_metadata(alphas: Mapping[str, float], dtypes: Mapping[str, str] | None = None) -> str:
    """Return our metadata: the most common value once, exceptions by MM module name.

    ``dtypes`` are those of the adapters before their scale was multiplied into B, which may have needed a wider one.
    """
    values = dict(zip(("alpha", "alpha_of"), _common(alphas)))
    if dtypes:
        values.update(zip(("folded_from", "folded_from_of"), _common(dtypes)))
    return json.dumps(values, sort_keys=True)


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value and the others by name."""
    common, _ = Counter(values.values()).most_common(1)[0]
    return common, {name: value for name, value in values.items() if value != common}


def own_alpha(own: Mapping[str, Any], mm: str, where: str) -> float:
    """Return the alpha that our metadata gives module ``mm``."""
    try:
        return float(own.get("alpha_of", {}).get(mm, own["alpha"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"metadata {OWN_KEY} is damaged ({error!r})", where=where) from None


def folded_from(own: Mapping[str, Any], mm: str, where: str) -> str | None:
    """Return the dtype that our metadata says module ``mm`` had before folding; ``None`` when nothing was folded."""
    try:
        return own.get("folded_from_of", {}).get(mm, own.get("folded_from"))
    except AttributeError as error:
        raise CheckpointError(f"metadata {OWN_KEY} is damaged ({error!r})", where=where) from None
