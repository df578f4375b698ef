"""Every way to generate faster, measured on the learned world: quality against speed.

Quality is twofold: PSNR and SSIM against the videos of the exact run, and the share of videos that the detector still
finds right. Speed is the time in the denoising loop.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mindspeed_wan.demo.world import scenes
from mindspeed_wan.demo.world.job import World
from mindspeed_wan.demo.world.judging import generate, judge, likeness

_TABLE = "step_cache_table.json"
_MOST_COPIES = 3

VARIANTS: dict[str, list[str]] = {
    "exact": ["--calibrate_cache", _TABLE],
    "magcache": ["--step_cache", "magcache", "--cache_table", _TABLE],
    "teacache": ["--step_cache", "teacache", "--cache_table", _TABLE],
    "taylorseer": ["--step_cache", "taylorseer", "--cache_interval", "2"],
    "guidance skipped in the last quarter": ["--cfg_skip_ratio", "0.25"],
    "int8 weights": ["--quantize", "int8_weight_only"],
    "fp8 weights": ["--quantize", "fp8_weight_only"],
}
"""Name -> flags of the inference command."""


def measure(world: World) -> dict[str, Any]:
    """Generate the held-out captions with each variant; return right share, PSNR, SSIM and speed-up of each."""
    copies = min(_MOST_COPIES, world.effort.copies)
    found: dict[str, dict[str, Any]] = {}
    for name, flags in VARIANTS.items():
        place = [str(world.out / "files" / _TABLE) if word == _TABLE else word for word in flags]
        folder = _folder(name)
        generate(world, folder, world.model("t2v_trained"), scenes.held_out(), *place, copies=copies)
        marks = judge(world, folder, scenes.held_out(), copies=copies)
        quality = likeness(world, _folder("exact"), folder, marks["videos"])
        found[name] = {"right": marks["right"], **quality, "denoise_seconds": _denoise_seconds(world, name)}
    exact = found["exact"]["denoise_seconds"]
    for values in found.values():
        values["speed_up"] = round(exact / values["denoise_seconds"], 2)
    return {"variants": found}


def _folder(name: str) -> str:
    return f"fast_{name.replace(' ', '_')}"


def _denoise_seconds(world: World, name: str) -> float:
    """Median over the videos, each from the record beside it."""
    records = sorted(world.videos(_folder(name)).glob("video_*.json"))
    stages = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in records]
    seconds = [stage["high"] + stage["low"] for stage in stages]
    return round(float(np.median(seconds)), 3)
