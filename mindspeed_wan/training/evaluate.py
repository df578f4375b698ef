"""The validation loss of a checkpoint, alone: what training reported for it, bit for bit on the same kernels.

``mindspeed-wan eval loss`` takes the flags that decide this number. What a run was started with is written in its save
folder; ``remembered`` turns it back into flags, so that naming the folder is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.flag_table import USED
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.parallel.groups import build_groups, init_distributed
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training import setup
from mindspeed_wan.training.optimizer import AdamW
from mindspeed_wan.training.restore import restore
from mindspeed_wan.training.source import OwnFeed
from mindspeed_wan.training.validation import Validation, ValidationLoss

CONFIG_FILE = "config.json"

_REMEMBERED = (
    "--seed", "--eval-iters", "--micro-batch-size", "--expert", "--boundary",
    "--timestep-weighting", "--timestep-density", "--timestep-grid",
    "--lora-r", "--lora-alpha", "--lora-rslora", "--load-base-model", "--base-dtype",
)  # fmt: skip
"""Flags that are taken over as they are. Files, precision and lists are translated one by one."""


def remembered(load: str | Path) -> list[str]:
    """Return the flags that the run under ``load`` was started with, as far as they decide its validation loss.

    Args:
        load: a save folder or one ``iter_*`` folder of it; anything else has nothing to remember.

    Raises:
        ConfigError: its ``config.json`` is damaged.
    """
    path = next((p for p in (Path(load) / CONFIG_FILE, Path(load).parent / CONFIG_FILE)
                 if p.is_file() and (p.parent / "versions.json").is_file()), None)
    if path is None:
        return []
    try:
        config = RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"is not the configuration of a run ({error})", where=str(path),
                          fix="give --mm-model, --mm-data and the other flags of the run") from None
    words = []
    for name, file in (("--mm-model", "model"), ("--mm-data", "data"), ("--valid-mm-data", "valid"),
                       ("--fsdp2-config-path", "fsdp2")):
        if config.sources.get(file):
            words += [name, config.sources[file]]
    words += [f"--{config.training.precision}", "--global-batch-size", str(config.global_batch(config.world_size or 1))]
    values = config.to_dict()
    for flag in USED:
        if flag.name in _REMEMBERED:
            words += _as_flag(flag.name, flag.target.replace("extra.", "diffusion."), values)
    return words + _lora_words(config)


def _as_flag(name: str, target: str, values: dict[str, Any]) -> list[str]:
    value: Any = values
    for part in target.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or value is False:
        return []
    return [name] if value is True else [name, str(value)]


def _lora_words(config: RunConfig) -> list[str]:
    """Return what ``_as_flag`` cannot: lists, and the base weights of a run whose ``--load`` named them."""
    lora, checkpoint = config.lora, config.checkpoint
    if lora is None:
        return []
    words = ["--lora-target-modules", *lora.target_modules]
    if lora.rank_pattern:
        words += ["--lora-rank-pattern", *(f"{module}={rank}" for module, rank in lora.rank_pattern.items())]
    if lora.base_keep:
        words += ["--base-keep", *lora.base_keep]
    if checkpoint.load_base_model is None and checkpoint.load is not None:
        words += ["--load-base-model", checkpoint.load]
    return words


def as_evaluation(config: RunConfig) -> RunConfig:
    """Return the configuration that only evaluates: the clips of the loss as the data, weights alone, no workers."""
    data = config.valid_data or config.data
    full = config.lora is None
    return config.model_copy(update={
        "data": data,
        "valid_data": None,
        "training": config.training.model_copy(update={"num_workers": 0}),
        # Adapters are read as the checkpoint of their run, whole weights like any other weights.
        "checkpoint": config.checkpoint.model_copy(update={"finetune": full, "save": None}),
    })


def validation_loss(config: RunConfig, platform: Platform) -> ValidationLoss:
    """Return the validation loss of the weights that ``config`` names. Collective.

    Raises:
        WanError: weights, clips or the layout cannot be used.
    """
    config = as_evaluation(config)
    if config.training.deterministic:
        setup.make_deterministic()
    platform.activate()
    init_distributed(platform, config.parallel.distributed_timeout_minutes)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    groups = build_groups(setup.parallel_dims(config, world_size), platform,
                          timeout_minutes=config.parallel.distributed_timeout_minutes)
    model = setup.build_model(config, WanConfig.from_dict(config.model.wan.to_dict()), groups, platform)
    restore(config, model, groups, AdamW(()), None)
    feed = OwnFeed(config, groups, platform, Progress(seed=config.training.seed))
    step = setup.train_step(config, model, groups, platform)
    return Validation(config, step, feed.evaluation)()


def flag_words(given: Sequence[str], load: str | Path | None) -> list[str]:
    """Return the command line of an evaluation: what the run remembers, then what was given (which wins)."""
    words = remembered(load) if load is not None else []
    return ["--train-iters", "1", "--eval-interval", "1", *words, *given]
