"""What a Wan DiT is: sizes, task and expert ranges. No torch here: converters and ``--help`` read this file.

Source of the values: Wan2.2 ``wan/configs/wan_{t2v,i2v}_A14B.py``, Wan2.1 ``wan/configs``, and the
``config.json`` of the Diffusers conversions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mindspeed_wan.errors import CheckpointError, ConfigError

Task = Literal["t2v", "i2v"]
Expert = Literal["high", "low"]

IMAGE_CONTEXT_LENGTH = 257
"""CLIP ViT-H/14 tokens of Wan2.1 I2V (256 patches + class token)."""

DEFAULT_TEXT_LEN = 512
"""Text tokens of every release."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of one Wan DiT (one expert).

    ``dim`` is the hidden size, ``in_channels`` counts latent plus conditioning channels (16 for T2V, 36 for I2V:
    16 noisy + 4 mask + 16 conditioning latent). ``image_dim`` is set for Wan2.1 I2V only (CLIP width 1280);
    ``pos_embed_len`` for its first-last-frame variant only.
    """

    num_layers: int = 40
    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = DEFAULT_TEXT_LEN
    freq_dim: int = 256
    eps: float = 1e-6
    rope_max_len: int = 1024
    image_dim: int | None = None
    pos_embed_len: int | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"hidden size {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head dim {self.head_dim} is odd; RoPE rotates pairs of channels")
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch_size {self.patch_size}: Wan patches span one latent frame")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads

    @property
    def task(self) -> Task:
        """``i2v`` when conditioning channels are concatenated to the noisy latent, else ``t2v``."""
        return "i2v" if self.in_channels > self.out_channels else "t2v"

    @property
    def patch_volume(self) -> int:
        """Latent voxels in one token."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

    @property
    def has_image_embedder(self) -> bool:
        """True for Wan2.1 I2V, whose cross-attention also reads CLIP image tokens."""
        return self.image_dim is not None

    def num_tokens(self, latent_shape: tuple[int, int, int]) -> int:
        """Return the DiT tokens of one video with latent (frames, height, width)."""
        frames, height, width = latent_shape
        return (frames // self.patch_size[0]) * (height // self.patch_size[1]) * (width // self.patch_size[2])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that ``WanConfig.from_dict`` reads back."""
        return {**asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanConfig:
        """Read what ``to_dict`` wrote."""
        return cls(**{**values, "patch_size": tuple(values["patch_size"])})

    # ---- the Diffusers dialect: transformer/config.json ------------------------------------------------------

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, where: str = "config.json") -> WanConfig:
        """Read a ``WanTransformer3DModel`` config; refuses variants this package does not implement."""
        name = values.get("_class_name", "WanTransformer3DModel")
        if name != "WanTransformer3DModel":
            raise CheckpointError(f"_class_name is {name!r}, not a Wan DiT (WanTransformer3DModel)", where=where)
        if values.get("in_channels") == 48:
            raise CheckpointError("this is TI2V-5B (48 latent channels), which is out of scope", where=where)
        if values.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise CheckpointError(f"qk_norm {values['qk_norm']!r} is not supported", where=where)
        if not values.get("cross_attn_norm", True):
            raise CheckpointError("cross_attn_norm false is not supported", where=where)
        try:
            heads, head_dim = int(values["num_attention_heads"]), int(values["attention_head_dim"])
            return cls(
                num_layers=int(values["num_layers"]),
                dim=heads * head_dim,
                ffn_dim=int(values["ffn_dim"]),
                num_heads=heads,
                in_channels=int(values["in_channels"]),
                out_channels=int(values.get("out_channels") or values["in_channels"]),
                patch_size=tuple(values.get("patch_size", (1, 2, 2))),  # type: ignore[arg-type]
                text_len=int(values.get("text_len", DEFAULT_TEXT_LEN)),
                text_dim=int(values.get("text_dim", 4096)),
                freq_dim=int(values.get("freq_dim", 256)),
                eps=float(values.get("eps", 1e-6)),
                rope_max_len=int(values.get("rope_max_seq_len", 1024)),
                image_dim=values.get("image_dim"),
                pos_embed_len=values.get("pos_embed_seq_len"),
            )
        except KeyError as error:
            raise CheckpointError(f"key {error.args[0]!r} is missing", where=where) from None

    def to_diffusers(self) -> dict[str, Any]:
        """Return the ``config.json`` that ``WanTransformer3DModel.from_pretrained`` reads.

        The text length is an argument of diffusers' pipelines (``max_sequence_length``), not of its model; it is
        written only where it is not the release's, so that the model comes back as it was.
        """
        return {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.35.1",
            "added_kv_proj_dim": self.dim if self.has_image_embedder else None,
            "attention_head_dim": self.head_dim,
            "cross_attn_norm": True,
            "eps": self.eps,
            "ffn_dim": self.ffn_dim,
            "freq_dim": self.freq_dim,
            "image_dim": self.image_dim,
            "in_channels": self.in_channels,
            "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers,
            "out_channels": self.out_channels,
            "patch_size": list(self.patch_size),
            "pos_embed_seq_len": self.pos_embed_len,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": self.rope_max_len,
            "text_dim": self.text_dim,
            **({"text_len": self.text_len} if self.text_len != DEFAULT_TEXT_LEN else {}),
        }

    # ---- the official dialect: config.json beside the original shards ----------------------------------------

    @classmethod
    def from_original(cls, values: Mapping[str, Any], *, where: str = "config.json") -> WanConfig:
        """Read the ``config.json`` of Wan-AI's own layout (``dim``, ``ffn_dim``, ``in_dim`` ...)."""
        if values.get("in_dim") == 48:
            raise CheckpointError("this is TI2V-5B (48 latent channels), which is out of scope", where=where)
        try:
            # Wan2.2's I2V has model_type i2v and no CLIP; only Wan2.1's i2v/flf2v have 36 channels with CLIP keys.
            # The config cannot tell them apart, so callers set image_dim when img_emb.* keys are present.
            return cls(
                num_layers=int(values["num_layers"]),
                dim=int(values["dim"]),
                ffn_dim=int(values["ffn_dim"]),
                num_heads=int(values["num_heads"]),
                in_channels=int(values["in_dim"]),
                out_channels=int(values["out_dim"]),
                text_len=int(values.get("text_len", DEFAULT_TEXT_LEN)),
                freq_dim=int(values.get("freq_dim", 256)),
                text_dim=int(values.get("text_dim", 4096)),
                eps=float(values.get("eps", 1e-6)),
            )
        except KeyError as error:
            raise CheckpointError(f"key {error.args[0]!r} is missing", where=where) from None

    def to_original(self) -> dict[str, Any]:
        """Return the ``config.json`` of Wan-AI's own layout."""
        return {
            "_class_name": "WanModel",
            "_diffusers_version": "0.33.0",
            "dim": self.dim,
            "eps": self.eps,
            "ffn_dim": self.ffn_dim,
            "freq_dim": self.freq_dim,
            "in_dim": self.in_channels,
            "model_type": self.task,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "out_dim": self.out_channels,
            "text_dim": self.text_dim,
            "text_len": self.text_len,
        }

    def with_changes(self, **changes: Any) -> WanConfig:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)


PRESETS: dict[str, WanConfig] = {
    "t2v-A14B": WanConfig(),
    "i2v-A14B": WanConfig(in_channels=36),
    "inp-A14B": WanConfig(in_channels=36),
    "t2v-14B": WanConfig(),
    "i2v-14B": WanConfig(in_channels=36, image_dim=1280),
}
"""Official sizes by task name. ``*-A14B`` is Wan2.2 (two experts), ``*-14B`` Wan2.1 (one)."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """A task's official inference settings. ``guidance`` is (low, high) as in Wan's own configs.

    ``boundary`` is the sigma at which the experts change; ``None`` for a model with one expert.
    """

    num_steps: int = 40
    shift: float = 12.0
    boundary: float | None = 0.875
    guidance: tuple[float, float] = (3.0, 4.0)
    num_frames: int = 81
    fps: int = 16


SAMPLING_DEFAULTS: dict[str, SamplingDefaults] = {
    "t2v-A14B": SamplingDefaults(),
    "i2v-A14B": SamplingDefaults(shift=5.0, boundary=0.900, guidance=(3.5, 3.5)),
    "inp-A14B": SamplingDefaults(num_steps=50, shift=5.0, boundary=0.900, guidance=(6.0, 6.0)),
    "t2v-14B": SamplingDefaults(num_steps=50, shift=5.0, boundary=None, guidance=(5.0, 5.0)),
    "i2v-14B": SamplingDefaults(num_steps=40, shift=5.0, boundary=None, guidance=(5.0, 5.0)),
}

BOUNDARY: dict[Task, float] = {"t2v": 0.875, "i2v": 0.900}
"""Wan2.2's expert boundary as a sigma: the high expert owns [boundary, 1], the low expert [0, boundary)."""
