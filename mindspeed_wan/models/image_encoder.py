"""The frozen CLIP vision tower of Wan2.1 I2V: an image to the 257 states that its cross-attention reads.

transformers builds the network; weights are loaded strictly, as for the other encoders. The states are those before
the last layer, without the final norm, as the official model takes them. Wan2.2 has no image encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models import frozen_weights, original_names

_HEADS = 16
"""Attention heads of ViT-H/14, which the original file does not say."""


class ImageEncoder:
    """CLIP ViT-H/14's vision tower, frozen.

    Attributes:
        model: transformers' ``CLIPVisionModel``.
        side: pixels of the square input.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.side: int = model.config.image_size

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ImageEncoder:
        """Load a Diffusers ``image_encoder/`` folder or the original ``models_clip_*.pth`` strictly.

        Raises:
            CheckpointError: nothing to load, damaged, or another network.
        """
        source = Path(path).expanduser()
        fields, tensors = _read_original(source) if source.is_file() else _read_transformers(source)
        from transformers import CLIPVisionConfig, CLIPVisionModel

        with torch.device("meta"):
            model: Any = CLIPVisionModel(CLIPVisionConfig.from_dict(fields))
        expected = set(model.state_dict())
        # transformers 5 dropped the prefix that files and version 4 have.
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in expected) else ""
        named = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
        named = {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}
        frozen_weights.load_strict(model, frozen_weights.cast_floating(named, dtype), where=str(source))
        for module in model.modules():
            if "position_ids" in dict(module.named_buffers(recurse=False)):
                module.position_ids = torch.arange(module.position_ids.shape[-1]).view(1, -1)
        frozen_weights.freeze(model)
        return cls(model.to(device))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return states [B, 257, 1280] of normalised pixels [B, 3, side, side] (``conditioning.clip_pixels``)."""
        weight = next(self.model.parameters())
        states = self.model(pixel_values=pixels.to(weight.device, weight.dtype), output_hidden_states=True)
        return states.hidden_states[-2]


def _read_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = frozen_weights.read_config(folder)
    config = config.get("vision_config", config)
    if config.get("model_type") != "clip_vision_model":
        raise CheckpointError(f"model_type is {config.get('model_type')!r}, not a CLIP vision tower",
                              where=str(folder / "config.json"))
    tensors = frozen_weights.read_safetensors(frozen_weights.weight_files(folder))
    # The file may hold the projection, or the text tower as well.
    extra = ("visual_projection.", "text_model.", "text_projection.", "logit_scale")
    return config, {name: tensor for name, tensor in tensors.items() if not name.startswith(extra)}


def _read_original(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the vision tower out of the official file and derive its sizes from the shapes."""
    state = frozen_weights.read_pth(file)
    try:
        patch = state["visual.patch_embedding.weight"]
        positions = state["visual.pos_embedding"]
        hidden = state["visual.transformer.0.mlp.0.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"tensor {error.args[0]!r} is missing: not Wan's CLIP file", where=str(file)) from None
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("visual.transformer."))
    tensors: dict[str, Tensor] = {}
    for original, library in original_names.clip_names(num_layers=layers).items():
        if original not in state:
            raise CheckpointError(f"tensor {original!r} is missing", where=str(file))
        tensors.update(zip(library, state[original].chunk(len(library))))
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"].reshape(-1)
    tensors["embeddings.position_embedding.weight"] = positions.reshape(-1, positions.shape[-1])
    width, _, size, _ = patch.shape
    fields = {
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": _HEADS, "patch_size": size,
        "image_size": size * round((tensors["embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5),
        "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    }
    return fields, tensors
