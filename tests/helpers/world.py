"""A tiny training job as a user has it: model folder, mp4 clips, MindSpeed-MM files and a command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_wan.models.wan.config import WanConfig
from tests.helpers.tiny import tiny_clips, tiny_pipeline_folder

REPOSITORY = Path(__file__).resolve().parents[2]
HIGH = (0.0, 0.417)
LOW = (0.417, 1.0)
EXPERT_FOLDER = {"high": "transformer", "low": "transformer_2"}


@dataclass(frozen=True)
class World:
    """Files of one job; ``flags`` is its command line."""

    model: Path
    data: Path
    files: Path

    def flags(self, save: Path | str, *more: str, expert: str = "high", iters: int = 3, batch: int = 4) -> list[str]:
        """Return the command line of a short fp32 run on the CPU; ``more`` is appended and wins."""
        return [
            "--mm-model", str(self.files / f"model_{expert}.json"), "--mm-data", str(self.files / "data.json"),
            "--load", str(self.model / EXPERT_FOLDER[expert]), "--save", str(save), "--device", "cpu", "--fp32",
            "--micro-batch-size", "1", "--global-batch-size", str(batch), "--train-iters", str(iters),
            "--lr", "1e-3", "--min-lr", "1e-3", "--weight-decay", "0.01", "--clip-grad", "1.0", "--num-workers", "0",
            "--seed", "7", *more,
        ]


def make_world(folder: Path, *, task: str = "t2v", **clips: Any) -> World:
    """Write the files of a job into ``folder``; the model and the clips are shared by all tests that only read them.

    ``task`` is ``tiny_pipeline_folder``'s: t2v, i2v, wan2.1-t2v or wan2.1-i2v.
    """
    model = tiny_pipeline_folder(task=task)
    options = {"num_clips": 6, "size": (48, 80), "num_frames": 9, "fps": 16, "seed": 3, **clips}
    data = tiny_clips(**options)
    folder.mkdir(parents=True, exist_ok=True)
    for expert, (start, stop) in (("high", HIGH), ("low", LOW)):
        write_json(folder / f"model_{expert}.json", model_json(model, task, start, stop))
    write_json(folder / "data.json", json.loads((data / "data.json").read_text(encoding="utf-8")))
    return World(model, data, folder)


def model_json(model: Path, task: str, start: float, stop: float) -> dict[str, Any]:
    """Return MindSpeed-MM's model file for the tiny folder ``model``."""
    kind = task.removeprefix("wan2.1-")  # Wan2.1 has one expert, and its I2V reads CLIP states
    boundaries = {"min_timestep_boundary": start, "max_timestep_boundary": stop} if kind == task else {}
    clip = {"i2v_processor": {"image_encoder": {"from_pretrained": str(model / "image_encoder")}}}
    wan = WanConfig.from_diffusers(json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8")))
    return {
        "task": kind, "load_video_features": False, "load_text_features": False, "encoder_offload_interval": 1,
        "diffusion": {"model_id": "wan_flow_match_scheduler", "num_train_timesteps": 1000, "shift": 5,
                      **boundaries},
        "predictor": {"model_id": "wandit", "model_type": kind if kind != task else f"wan2.2-{task}", "dtype": "bf16",
                      "in_dim": wan.in_channels, "out_dim": wan.out_channels, "hidden_size": wan.dim,
                      "ffn_dim": wan.ffn_dim, "freq_dim": wan.freq_dim, "text_dim": wan.text_dim, "text_len": 512,
                      "num_heads": wan.num_heads, "num_layers": wan.num_layers, "patch_size": [1, 2, 2],
                      **({"img_dim": wan.image_dim} if wan.image_dim else {})},
        "ae": {"model_id": "wan_video_vae", "from_pretrained": str(model / "vae"), "dtype": "fp32",
               **(clip if wan.image_dim else {})},
        "text_encoder": {"model_id": "UMT5", "from_pretrained": str(model / "text_encoder"), "dtype": "fp32"},
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def metrics(save: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(save: Path) -> list[float]:
    """Return the losses of a run in order of iteration."""
    return [row["loss"] for row in metrics(save)]


def train_rank(rank: int, world_size: int, argv: list[str]) -> int:
    """Run ``pretrain_sora``'s main as one rank of ``run_ranks``."""
    from mindspeed_wan.platforms import reset_platform
    from mindspeed_wan.training.pretrain import main

    reset_platform()
    return main(argv)


def train_until_stopped(rank: int, world_size: int, argv: list[str]) -> int:
    """``train_rank`` for a run that is expected to stop early; returns its exit code."""
    from mindspeed_wan.errors import StopRequested
    from mindspeed_wan.parallel.groups import destroy

    try:
        return train_rank(rank, world_size, argv)
    except StopRequested as stop:
        destroy()
        return stop.exit_code


def checkpoint_tensors(folder: Path) -> dict[str, Any]:
    """Return every tensor of a training checkpoint, whole."""
    from mindspeed_wan.checkpoint.sources import open_dcp

    with open_dcp(folder) as files:
        return {name: files.read(name) for name in files.tensors}


def edit_json(source: Path, target: Path, **changes: Any) -> None:
    """Copy a JSON file with some top-level keys changed."""
    write_json(target, {**json.loads(source.read_text(encoding="utf-8")), **changes})


def with_cached_features(world: World, folder: Path) -> World:
    """Encode the clips of ``world`` once and return the same job reading the cache (no encoder is loaded)."""
    import argparse

    from mindspeed_wan.cli import features

    parser = argparse.ArgumentParser()
    features.add_arguments(parser)
    features.run(parser.parse_args(["build", "--mm-data", str(world.files / "data.json"), "--mm-model",
                                    str(world.files / "model_high.json"), "--out", str(folder / "cache"),
                                    "--seed", "7", "--device", "cpu"]))
    for expert in EXPERT_FOLDER:
        edit_json(world.files / f"model_{expert}.json", folder / f"model_{expert}.json",
                  load_video_features=True, load_text_features=True)
    data = json.loads((world.files / "data.json").read_text(encoding="utf-8"))
    data["dataset_param"]["dataset_type"] = "feature"
    data["dataset_param"]["basic_parameters"].update(data_path=str(folder / "cache"), data_folder="")
    write_json(folder / "data.json", data)
    return World(world.model, world.data, folder)
