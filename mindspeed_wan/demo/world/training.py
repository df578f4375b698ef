"""The world's training stages, each the command a user types: features, pretraining, I2V from T2V, LoRA, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mindspeed_wan.demo.commands import Command, python, require
from mindspeed_wan.demo.world.job import EXPERTS, TRANSFORMER, World

_LEARNING_RATE = {"t2v": "1e-3", "i2v": "1.5e-3"}
"""I2V needs the higher one although it starts from trained weights: at half of it, the input channels of the picture,
zero at first, were not learned in the steps there are, and first frames came out 2 to 3 dB worse."""
_LORA = {"LORA_R": "16", "LORA_ALPHA": "16", "LR": "2e-3"}
_CONVERTER = {"t2v": "Wan2.2T2VConverter", "i2v": "Wan2.2I2VConverter"}


def encode(world: World) -> None:
    """Encode the clips for T2V, for I2V and for the LoRA, two caches at a time."""
    def build(name: str) -> Command:
        files = world.files(name)
        return Command(f"features_{name}", [
            *python("mindspeed_wan.cli.main"), "features", "build", "--mm-data", str(files / "clips.json"),
            "--mm-model", str(files / "model_high.json"), "--out", str(world.cache(name)), "--device", "cpu",
        ])

    world.run(build("t2v"), build("i2v"))
    world.run(build("new"))


def pretrain(world: World, task: str) -> dict[str, Any]:
    """Train both experts side by side through the launchers, T2V from random weights, I2V from T2V's."""
    iterations = world.effort.iterations_t2v if task == "t2v" else world.effort.iterations_i2v
    world.run(*(_pretrain(world, task, expert, iterations) for expert in EXPERTS))
    return {expert: losses(world.runs(task, expert)) for expert in EXPERTS}


def _pretrain(world: World, task: str, expert: str, iterations: int) -> Command:
    launcher = world.repository / "examples" / "wan2.2" / "A14B" / task / f"pretrain_{expert}.sh"
    start = ["--from-scratch"] if task == "t2v" else []
    return Command(f"pretrain_{task}_{expert}", ["bash", str(launcher), *start, "--log-interval", "50"], {
        **_run_environment(world, task, iterations),
        "MM_MODEL": str(world.files(task) / f"model_{expert}.json"),
        "LOAD_PATH": "" if start else str(world.model("i2v") / TRANSFORMER[expert]),
        "SAVE_PATH": str(world.runs(task, expert)),
        "LR": _LEARNING_RATE[task], "MIN_LR": "1e-5", "LR_DECAY_STYLE": "cosine",
    })


def _run_environment(world: World, name: str, iterations: int) -> dict[str, str]:
    """One rank in fp32 without FSDP2: on a CPU the fastest for a model this small."""
    return {
        "DEVICE": "cpu", "NPROC_PER_NODE": "1", "FSDP_CONFIG": "", "NUM_WORKERS": "0",
        "MM_DATA": str(world.files(name) / "data.json"), "MBS": str(world.effort.batch_size),
        "TRAIN_ITERS": str(iterations), "SAVE_INTERVAL": str(max(1, iterations // 4)), "KEEP_LAST": "1",
        "WARMUP_ITERS": str(min(100, iterations // 10)), "SEED": str(world.seed + 1234),
    }


def export(world: World, task: str) -> None:
    """Write both trained experts as the Diffusers folder ``TASK_trained``."""
    for expert in EXPERTS:
        world.run(Command(f"export_{task}_{expert}", [
            *python("mindspeed_wan_converters"), _CONVERTER[task], "dcp_to_hf",
            "--cfg.source_path", str(world.runs(task, expert)),
            "--cfg.target_path", str(world.model(f"{task}_trained") / TRANSFORMER[expert]),
            "--cfg.hf_dir", str(world.model(task)), "--overwrite",
        ]))
    require(world.model(f"{task}_trained") / "model_index.json")


def swap(world: World) -> None:
    """Make a folder whose experts have changed places: the ablation.

    Only what diffusers reads is copied: our own cards say which expert a folder holds, and the swap would be refused.
    """
    source, target = world.model("t2v_trained"), world.model("t2v_swapped")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*TRANSFORMER.values()))
    cards = shutil.ignore_patterns("wan.json", "manifest.json")
    for expert, other in (("high", "low"), ("low", "high")):
        shutil.copytree(source / TRANSFORMER[other], target / TRANSFORMER[expert], ignore=cards)


def start_i2v(world: World) -> None:
    """Give the I2V experts the weights of the trained T2V ones; their 20 further input channels begin at zero."""
    import torch
    from safetensors.torch import load_file, save_file

    for folder in TRANSFORMER.values():
        source, target = world.model("t2v_trained") / folder, world.model("i2v") / folder
        weights = load_file(_only_weights(source))
        patch = weights["patch_embedding.weight"]
        channels = json.loads((target / "config.json").read_text(encoding="utf-8"))["in_channels"] - patch.shape[1]
        zeros = torch.zeros(patch.shape[0], channels, *patch.shape[2:], dtype=patch.dtype)
        weights["patch_embedding.weight"] = torch.cat([patch, zeros], dim=1)
        save_file(weights, _only_weights(target), metadata={"format": "pt"})


def _only_weights(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def finetune(world: World) -> dict[str, Any]:
    """Teach both experts the new colour: one launcher, two adapters."""
    launcher = world.repository / "examples" / "wan2.2" / "A14B" / "t2v" / "finetune_lora_both.sh"
    save = world.runs("lora", "high").parent
    world.run(Command("finetune_lora", ["bash", str(launcher), "--log-interval", "50"], {
        **_run_environment(world, "new", world.effort.iterations_lora), **_LORA,
        "MM_MODEL": str(world.files("new") / "model_{expert}.json"),
        "LOAD_PATH": str(world.model("t2v_trained")), "SAVE_PATH": str(save),
    }))
    for expert in EXPERTS:
        require(adapter(world, expert))
    return {expert: losses(world.runs("lora", expert)) for expert in EXPERTS}


def adapter(world: World, expert: str) -> Path:
    """Return the trained adapter of one expert."""
    return world.runs("lora", expert).parent / f"adapter_{expert}.safetensors"


def losses(run: Path) -> list[float]:
    """Return the run's loss, averaged over fiftieths of it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [row["loss"] for row in rows if "loss" in row]
    size = max(1, len(values) // 50)
    return [round(sum(values[i : i + size]) / len(values[i : i + size]), 5) for i in range(0, len(values), size)]
