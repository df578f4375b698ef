"""Tiny Wan folders in Wan-AI's own layout: what ``--ckpt_dir`` of the official scripts points at.

The weights are those of ``write_model_folder`` with the same options, so the two layouts can be compared.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.demo.model_folder import FolderTask, write_model_folder
from mindspeed_wan.models.original_names import (
    IMAGE_FILE,
    TEXT_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    clip_names,
    umt5_names,
    vae_names,
)
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import by_name

if TYPE_CHECKING:
    import torch


def write_original_folder(
    path: str | Path,
    *,
    task: FolderTask = "t2v",
    seed: int = 0,
    dtype: str = "float32",
    num_shards: int = 2,
    **sizes: Any,
) -> Path:
    """Write a tiny folder in Wan-AI's layout.

    Wan2.2 tasks get ``high_noise_model/`` and ``low_noise_model/``, Wan2.1 tasks their shards at the top; all get
    ``models_t5_umt5-xxl-enc-bf16.pth``, ``Wan2.1_VAE.pth`` and ``google/umt5-xxl``; ``wan2.1-i2v`` the CLIP file too.

    Args:
        path: the folder; created.
        task, seed, dtype, **sizes: as for ``write_model_folder``.
        num_shards: safetensors shards per DiT, named in an index file.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        source = write_model_folder(temporary, task=task, seed=seed, dtype=dtype, **sizes)
        if task.startswith("wan2.1"):
            _write_dit(source / "transformer", root, num_shards)
        else:
            _write_dit(source / "transformer", root / "high_noise_model", num_shards)
            _write_dit(source / "transformer_2", root / "low_noise_model", num_shards)
        _write_encoders(source, root)
        shutil.copytree(source / "tokenizer", root / TOKENIZER_FOLDER, dirs_exist_ok=True)
    return root


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _write_dit(source: Path, target: Path, num_shards: int) -> None:
    """Write one expert under its original names: shards, their index and ``config.json``."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    config = WanConfig.from_diffusers(json.loads((source / "config.json").read_text()))
    names = by_name(config, "hf")
    tensors = {names[name].original: tensor for name, tensor in sorted(_read(source).items())}
    per_shard = -(-len(tensors) // num_shards)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = sorted(tensors)[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: tensors[name] for name in chosen}, target / file)
        weight_map.update(dict.fromkeys(chosen, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (target / "config.json").write_text(json.dumps(config.to_original(), indent=2))


def _write_encoders(source: Path, root: Path) -> None:
    """Write VAE, UMT5 and (where there is one) CLIP as state dicts under their original names."""
    import torch

    text_config = json.loads((source / "text_encoder" / "config.json").read_text())
    vae_config = json.loads((source / "vae" / "config.json").read_text())
    tables = {
        "text_encoder": (TEXT_FILE, umt5_names(num_layers=text_config["num_layers"])),
        "vae": (VAE_FILE, vae_names(num_res_blocks=vae_config["num_res_blocks"])),
    }
    for component, (file, table) in tables.items():
        original = {library: name for name, library in table.items()}
        torch.save({original[name]: tensor for name, tensor in _read(source / component).items()}, root / file)
    if (source / "image_encoder").is_dir():
        _write_clip(source / "image_encoder", root / IMAGE_FILE)


def _write_clip(source: Path, target: Path) -> None:
    """Write the CLIP vision tower; the original keeps q, k and v of a layer in one matrix."""
    import torch

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in _read(source).items()}
    state = {
        original: torch.cat([tensors[name] for name in library])
        for original, library in clip_names(num_layers=layers).items()
    }
    state["visual.cls_embedding"] = state["visual.cls_embedding"].reshape(1, 1, -1)
    state["visual.pos_embedding"] = state["visual.pos_embedding"].unsqueeze(0)
    torch.save(state, target)
