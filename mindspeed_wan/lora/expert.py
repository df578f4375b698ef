"""Which expert an adapter file is for: what its metadata says, else what its name says. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

OWN_TRAINING = "mindspeed_wan.training"
_NAMES_IN_METADATA = ("ss_output_name", "modelspec.title", "name", "ss_dit_name", "ss_sd_model_name", "ss_base_model")
"""Metadata of musubi-tuner, kohya and ai-toolkit that holds a name: the adapter's own, then its base model's."""

_NOISE = re.compile(r"(?<![a-z])(high|low) ?nois|([高低])噪")
_AFTER_LEVEL = re.compile(
    r"[a-z]{0,5}\d+[a-z]?|lora|loras|model|expert|adapter|checkpoint|wan|[tip]2v|epoch|step|steps|final|last|bf16|comfy"
)
"""Words after which ``high`` is still a place in a file name's scheme: ``high_e20``, ``high_rank64``, ``high_lora``.
Before any other word it describes something (``high_detail``, ``low_light``, ``low-rank``)."""


def expert_of(metadata: Mapping[str, str], path: str | Path) -> str | None:
    """Return ``high`` or ``low``: from what we wrote, else from names in the metadata, the file's, its folder's."""
    path = Path(path)
    names = [metadata.get(key, "") for key in _NAMES_IN_METADATA]
    guesses = map(guess_expert, [*names, path.name, path.absolute().parent.name])
    return told_expert(metadata) or next((guess for guess in guesses if guess), None)


def told_expert(metadata: Mapping[str, str]) -> str | None:
    """Return the expert that the metadata of a file of our own training names."""
    try:
        expert = json.loads(metadata[OWN_TRAINING])["expert"]
    except (KeyError, ValueError, TypeError):
        return None
    return expert if expert in ("high", "low") else None


def guess_expert(name: str) -> str | None:
    """Return ``high`` or ``low`` when a file or folder name says so, else ``None``.

    ``high noise`` in any spelling counts wherever it stands. ``high`` alone counts where it ends the name or only
    technical words follow, ``H`` and ``HN`` in names of Wan 2.2, and ``transformer_2`` is Diffusers' low expert. A name
    that says both says nothing.
    """
    stem = re.sub(r"\.(safetensors|pt|pth|bin|ckpt)$", "", name, flags=re.IGNORECASE)
    parts = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", stem)).split()
    text = " ".join(parts).lower()
    found = {level or {"高": "high", "低": "low"}[sign] for level, sign in _NOISE.findall(text)}
    if not found:
        found = _levels(text.split())
    if not found and re.search(r"\bwan ?2 ?2\b", text):
        letters = {"H": "high", "HN": "high", "L": "low", "LN": "low"}
        found = {letters[part] for part in parts if part in letters}
    if not found and "transformer 2" in text:
        found = {"low"}
    return found.pop() if len(found) == 1 else None


def _levels(words: list[str]) -> set[str]:
    """Return the levels that stand alone in a name, none where it has both: one of them then means something else."""
    places = [place for place, word in enumerate(words) if word in ("high", "low")]
    if len({words[place] for place in places}) > 1:
        return set()
    return {words[place] for place in places
            if place + 1 == len(words) or _AFTER_LEVEL.fullmatch(words[place + 1])}
