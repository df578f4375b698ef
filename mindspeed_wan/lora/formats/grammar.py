"""The endings of adapter keys, and the formats as a table of data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mindspeed_wan.models.wan.param_map import Layout

Role = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b", "diff_m"]

_ENDINGS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("down", re.compile(r"\.lora_(?:A(?:\.(?P<adapter>[^.]+))?|down)\.weight$|\.lora\.down\.weight$")),
    ("up", re.compile(r"\.lora_(?:B(?:\.(?P<adapter>[^.]+))?|up)\.weight$|\.lora\.up\.weight$")),
    # PEFT's lora_bias=True: a bias of B, scaled as B is
    ("up_bias", re.compile(r"\.lora_(?:B(?:\.(?P<adapter>[^.]+))?|up)\.bias$|\.lora\.up\.bias$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.diff$")),
    ("diff_b", re.compile(r"\.diff_b$")),
    ("diff_m", re.compile(r"\.diff_m$")),
)
DIFF_LEAF: dict[Role, str] = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}

_OTHER_METHODS = {
    "hada_w": "LoHa (Hadamard products)", "lokr_w": "LoKr (Kronecker products)", "dora_scale": "DoRA (magnitudes)",
    "lora_magnitude_vector": "DoRA (magnitudes)", "oft_blocks": "OFT (orthogonal blocks)", "lora_mid": "LoCon (mid)",
}


def split_key(key: str) -> tuple[str, Role, str | None] | None:
    """Split a key into (module stem, role, adapter name), or ``None`` when it does not end like one."""
    for role, pattern in _ENDINGS:
        match = pattern.search(key)
        if match:
            return key[: match.start()], role, match.groupdict().get("adapter")
    return None


def other_method(key: str) -> str | None:
    """Return the name of an adapter method other than LoRA that ``key`` belongs to."""
    return next((name for mark, name in _OTHER_METHODS.items() if mark in key), None)


@dataclass(frozen=True)
class Format:
    """How one producer spells an adapter file.

    Attributes:
        prefix: before the module name.
        layout: dialect of the module name.
        squash: dots of the module name are underscores.
        down, up: endings of A and B.
        alpha: a scalar tensor per module (``tensor``), PEFT's JSON (``peft``), our JSON (``own``), or nothing, so that
            the scale has to be multiplied into B for that producer's loader (``folded``).
        diffs: whether its loaders know ``.diff``, ``.diff_b`` and ``.diff_m``.
        up_bias: ending of a bias of B, for formats whose loaders know that instead.
    """

    prefix: str
    layout: Layout
    down: str
    up: str
    alpha: Literal["tensor", "peft", "own", "folded"]
    squash: bool = False
    diffs: bool = False
    up_bias: str | None = None


FORMATS: dict[str, Format] = {
    # musubi-tuner, kohya; ComfyUI and this package's inference read it
    "kohya": Format("lora_unet_", "original", ".lora_down.weight", ".lora_up.weight", "tensor", True, True),
    # VideoX-Fun's own network, hence the Fun reward LoRAs: its root module has an empty name
    "kohya2": Format("lora_unet__", "original", ".lora_down.weight", ".lora_up.weight", "tensor", True, True),
    # diffusion-pipe, ai-toolkit, ComfyUI
    "comfy": Format("diffusion_model.", "original", ".lora_A.weight", ".lora_B.weight", "tensor", diffs=True),
    "lightx2v": Format("diffusion_model.", "original", ".lora_down.weight", ".lora_up.weight", "tensor", diffs=True),
    "diffsynth": Format("", "original", ".lora_A.default.weight", ".lora_B.default.weight", "folded"),
    # WanPipeline.load_lora_weights; one file per expert
    "diffusers": Format("transformer.", "hf", ".lora_A.weight", ".lora_B.weight", "peft", up_bias=".lora_B.bias"),
    # a folder with adapter_config.json for peft.PeftModel on diffusers' transformer
    "peft": Format("base_model.model.", "hf", ".lora_A.weight", ".lora_B.weight", "peft", up_bias=".lora_B.bias"),
    "mm": Format("base_model.model.", "mm", ".lora_A.default.weight", ".lora_B.default.weight", "own",
                 up_bias=".lora_B.default.bias"),
}


def detect(prefix: str, layout: Layout, key: str) -> str:
    """Return the format that spells ``key`` so; ``prefix`` and ``layout`` are what the name table found."""
    if prefix.startswith("lora_unet__"):
        return "kohya2"
    if prefix.startswith(("lora_unet_", "lora_transformer_", "lycoris_")):
        return "kohya"
    if "diffusion_model." in prefix:
        return "comfy" if ".lora_A." in key or ".lora_B." in key else "lightx2v"
    if layout == "hf":
        return "peft" if prefix.startswith("base_model.") else "diffusers"
    if layout == "mm" and ("proj_" in key or prefix.startswith("base_model.")):
        return "mm"
    return "diffsynth"
