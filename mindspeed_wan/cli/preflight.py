"""What is wrong with a job before any rank starts: flags, files, the tables of its weights. No torch here.

A job of eight ranks takes half a minute to import its libraries; a folder that is not there, the other expert's
weights or a broken annotation are told in half a second instead. Only what the ranks would refuse too is refused, by
the same functions, so what passes here is not thereby right: the ranks check everything again.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_wan.errors import DataError

if TYPE_CHECKING:
    from mindspeed_wan.config.schema import RunConfig

TRAINING, INFERENCE = "pretrain_sora.py", "inference_sora.py"
LARGE_ANNOTATION = 64 << 20
"""Bytes from which annotations are left to the ranks: reading them twice would cost more than it saves."""
_HELP = ("-h", "--help")


def check(script: str | Path, arguments: Sequence[str], world_size: int) -> bool:
    """Check the job of a known script; returns whether it is a dry run, for which one rank is enough.

    Raises:
        WanError: the first part of the job that would stop it.
    """
    name = Path(script).name
    if any(word in _HELP for word in arguments):
        return False
    if name == TRAINING:
        return _training(arguments, world_size)
    if name == INFERENCE:
        _inference(arguments, world_size)
    return False


def _training(arguments: Sequence[str], world_size: int) -> bool:
    from mindspeed_wan.config import flags

    env = {**os.environ, "WORLD_SIZE": str(world_size)}
    if any(word in ("both", "--expert=both") for word in arguments):
        from mindspeed_wan.training.both import read

        configs, _ = read(arguments, env)
    else:
        configs = [flags.parse(arguments, env)]
    if configs[0].training.dry_run:
        return True  # which checks more than this does
    for config in configs:
        _targets(config)
        _weights(config)
        _annotations(config)
    return False


def _inference(arguments: Sequence[str], world_size: int) -> None:
    if not arguments:
        return  # prints the help
    from mindspeed_wan.inference import flags, sources

    with contextlib.redirect_stdout(io.StringIO()):  # rank 0 prints the notes
        options = flags.parse(arguments, world_size=world_size)
    folder = sources.recognise(options)
    options.check(num_heads=folder.config.num_heads)


def _targets(config: RunConfig) -> None:
    """Match the LoRA targets, ranks and alpha with the model's layers."""
    if config.lora is None:
        return
    from mindspeed_wan.lora.spec import LoraSpec
    from mindspeed_wan.models.wan.config import WanConfig

    section = config.lora
    LoraSpec(rank=section.r, alpha=section.alpha, targets=section.target_modules, rslora=section.rslora,
             rank_pattern=section.rank_pattern).resolve(WanConfig.from_dict(config.model.wan.to_dict()))


def _weights(config: RunConfig) -> None:
    """Recognise what ``--load`` names, its expert, and its tensors where safetensors list them in the open."""
    from mindspeed_wan.checkpoint import sources
    from mindspeed_wan.checkpoint.manifest import TRACKER_NAME
    from mindspeed_wan.models.wan.config import WanConfig

    section = config.checkpoint
    path = section.load_base_model or section.load
    goes_on = section.save is not None and (Path(section.save) / TRACKER_NAME).is_file() and not section.finetune
    if path is None or (goes_on and section.load_base_model is None and config.lora is None):
        return
    found = sources.find(path, step=None if section.load_base_model else section.ckpt_step)
    sources.check_expert(found, config.diffusion.expert)
    if found.kind == "safetensors":
        from mindspeed_wan.models.wan.param_map import parameter_table

        wan = WanConfig.from_dict(config.model.wan.to_dict())
        with sources.open_weights(found, wan) as files:
            sources.check_names_and_shapes(files, {p.mm: p.shape for p in parameter_table(wan)}, wan)


def _annotations(config: RunConfig) -> None:
    """Read the annotations of clips; whether every clip is there is left to the ranks, which may take minutes."""
    from mindspeed_wan.data import manifest

    section = config.data
    if section.kind != "video":
        return
    if section.data_path is None:
        raise DataError("no data set is named", fix="data_path in data.json")
    path = Path(section.data_path).expanduser()
    if not path.is_file() or path.stat().st_size < LARGE_ANNOTATION:
        manifest.load(section.data_path, section.data_folder, check_files=False)
