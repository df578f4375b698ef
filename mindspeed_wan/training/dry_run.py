"""``--dry-run``: open everything a run would open, up to the tables of its weights, and train nothing.

One process answers for a job of any size: layout rules are arithmetic, weights are compared by name and shape.
"""

from __future__ import annotations

import os
from pathlib import Path

from mindspeed_wan.checkpoint.sources import check_expert, check_names_and_shapes, open_weights
from mindspeed_wan.checkpoint.weights import checked
from mindspeed_wan.config.describe import describe
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.build import open_data
from mindspeed_wan.errors import ResourceError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.training.adapters import check_adapter
from mindspeed_wan.training.other_expert import check_other
from mindspeed_wan.training.restore import check_card, training_checkpoint, weights_found
from mindspeed_wan.training.source import evaluation_data
from mindspeed_wan.training.validation_prompts import read_prompts


def check(config: RunConfig) -> str:
    """Check the run and return its description.

    Raises:
        WanError: the first thing that would stop the run.
    """
    wan = WanConfig.from_dict(config.model.wan.to_dict())
    lines = [describe(config), f"{'weights':<12}{_check_start(config, wan)}"]
    if config.lora is not None:
        lines.append(f"{'adapter':<12}{check_adapter(config, wan)}")
    lines += [*_check_data(config), *_check_videos(config, wan)]
    _check_save_folder(config)
    return "\n".join([*lines, "dry run: everything this run needs is in place"])


def _check_start(config: RunConfig, wan: WanConfig) -> str:
    found = training_checkpoint(config)
    if found is not None:
        check_card(found, config, wan, resuming=True)
        return f"goes on from {found.path}"
    found = weights_found(config, wan)
    if found is None:
        return "random (--from-scratch)"
    checked(found)
    check_expert(found, config.diffusion.expert)
    with open_weights(found, wan) as files:
        check_names_and_shapes(files, {p.mm: p.shape for p in parameter_table(wan)}, wan)
        return f"{len(files.tensors)} tensors, {found.kind}, {found.path}"


def _check_data(config: RunConfig) -> list[str]:
    data, batch = open_data(config), config.training.global_batch_size or 1
    data.bad_sample_log(None, config.data.max_bad_fraction)
    evaluated = evaluation_data(config, data)
    lines = data.describe(batch)
    return lines if evaluated is data else [*lines, *(f"validation {line}" for line in evaluated.describe(batch))]


def _check_videos(config: RunConfig, wan: WanConfig) -> list[str]:
    given = config.validation
    if given.prompts is None:
        return []
    told = f"{len(read_prompts(given.prompts, task=config.model.task))} prompts"
    if given.other_expert is not None:
        told += f", other expert {check_other(config, given.other_expert, wan).path}"
    return [f"{'videos':<12}{told}"]


def _check_save_folder(config: RunConfig) -> None:
    """The nearest folder that exists above ``--save`` can be written to."""
    if config.checkpoint.save is None:
        return
    folder = Path(config.checkpoint.save)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError("cannot be written to", where=str(folder), fix="choose another --save")
