"""The world's inputs: model folders around the shipped VAE, clips, and MindSpeed-MM's model.json and data.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mindspeed_wan.demo.model_folder import FolderTask, write_model_folder
from mindspeed_wan.demo.model_json import write_model_json
from mindspeed_wan.demo.world import scenes
from mindspeed_wan.demo.world.job import EXPERTS, TASKS, World
from mindspeed_wan.demo.world.vae import ASSET

SIZES: dict[str, Any] = {
    "num_layers": 6, "num_heads": 4, "head_dim": 32, "ffn_dim": 512, "text_dim": 64, "freq_dim": 256, "text_len": 16,
}
"""Of the world's DiT: 2.3 million parameters per expert, 27 tokens a clip."""
CAPTION_DROPOUT = 0.1
NEW_CLIPS = 12
"""Clips of each combination with the new colour, which the LoRA trains on."""


def write_models(world: World) -> None:
    """Write the T2V and I2V folders: frozen UMT5, the shipped VAE, experts still to be trained."""
    for task in TASKS:
        write_model(world.model(task), task=task, seed=world.seed)


def write_model(folder: Path, *, task: FolderTask = "t2v", seed: int = 0) -> None:
    """Write one Diffusers folder in the world's sizes, with its VAE."""
    captions = [scene.caption for scene in scenes.combinations((*scenes.COLOURS, scenes.NEW_COLOUR))]
    write_model_folder(folder, task=task, seed=seed, captions=captions, trainable=True, **SIZES)
    shutil.rmtree(folder / "vae")
    shutil.copytree(ASSET, folder / "vae")


def write_clips(world: World) -> dict[str, Any]:
    """Write the training clips and those of the new colour."""
    base, new = scenes.trained(), scenes.combinations((scenes.NEW_COLOUR,))
    scenes.write_dataset(world.data("base"), base, clips_per_scene=world.effort.clips_per_scene, seed=world.seed + 1)
    scenes.write_dataset(world.data("new"), new, clips_per_scene=min(NEW_CLIPS, world.effort.clips_per_scene),
                         seed=world.seed + 2)
    return {"trained": len(base), "held_out": [scene.caption for scene in scenes.held_out()]}


def write_run_files(world: World) -> None:
    """Write model.json per expert and data.json, as clips (to encode) and as features (to train on)."""
    for name, task, data in (("t2v", "t2v", "base"), ("i2v", "i2v", "base"), ("new", "t2v", "new")):
        folder = world.files(name)
        folder.mkdir(parents=True, exist_ok=True)
        for expert in EXPERTS:
            write_model_json(folder / f"model_{expert}.json", world.repository, world.model(task), task, expert,
                             cached=True)
        write_data_json(folder, world.data(data), world.model(task), world.cache(name))


def write_data_json(folder: Path, data: Path, model: Path, cache: Path) -> None:
    """Write ``clips.json`` (the clips, to encode) and ``data.json`` (their features, to train on)."""
    settings = json.loads((data / "data.json").read_text(encoding="utf-8"))
    parameters = settings["dataset_param"]
    parameters["tokenizer_config"] = {
        "autotokenizer_name": "AutoTokenizer", "hub_backend": "hf", "from_pretrained": str(model / "tokenizer"),
        "model_max_length": SIZES["text_len"],
    }
    _write(folder / "clips.json", settings)
    parameters["dataset_type"] = "feature"
    parameters["basic_parameters"].update(data_path=str(cache), data_folder="")
    parameters["preprocess_parameters"]["cfg"] = CAPTION_DROPOUT
    _write(folder / "data.json", settings)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
