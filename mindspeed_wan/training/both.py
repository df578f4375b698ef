"""``--expert both``: one command trains the high-noise expert and then the low-noise one, each as a run of its own.

The two runs share the processes and differ in their expert: ``--save DIR`` becomes ``DIR/high`` and ``DIR/low``,
``--load`` names a folder that holds the weights of both, and ``{expert}`` in any value becomes the name
(``--mm-model pretrain_model_{expert}.json``). Started again, the command goes on where it stopped; an expert that is
done is not loaded again. LoRA runs leave their two adapters beside the folders: ``DIR/adapter_high.safetensors`` and
``DIR/adapter_low.safetensors``.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import TRACKER_NAME, checkpoint_folder
from mindspeed_wan.checkpoint.sources import EXPERT_FOLDERS
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import CheckpointError

EXPERTS = ("high", "low")
_FLAG, _ALL = "--expert", "both"
_WEIGHTS = ("--load", "--load-base-model")


def split(argv: Sequence[str]) -> list[list[str]]:
    """Return one command line per expert when ``--expert both`` is on it, else the line itself.

    Raises:
        CheckpointError: the weights' folder does not hold both experts.
    """
    words = [part for word in argv for part in _parted(word)]
    chosen = [value for flag, value in itertools.pairwise(words) if flag == _FLAG]
    if not chosen or chosen[-1] != _ALL:
        return [list(argv)]
    return [_for_expert(words, expert) for expert in EXPERTS]


def _parted(word: str) -> list[str]:
    """Split ``--flag=value`` of the flags that are changed here."""
    flag, equals, value = word.partition("=")
    return [flag, value] if equals and flag in (_FLAG, "--save", *_WEIGHTS) else [word]


def _for_expert(words: Sequence[str], expert: str) -> list[str]:
    line: list[str] = []
    counts = {word: place for place, word in enumerate(words)}  # of a repeated flag the last one counts
    for place, (previous, word) in enumerate(zip(["", *words], words), start=-1):
        value = word.replace("{expert}", expert)
        if previous == _FLAG:
            value = expert
        elif previous == "--save":
            value = os.path.join(value, expert) if value == word else value
        elif previous in _WEIGHTS and counts[previous] == place and value == word:
            value = _expert_folder(word, expert)
        line.append(value)
    return line


def _expert_folder(root: str, expert: str) -> str:
    """Return the folder of ``expert`` inside ``root``, which is a pipeline or holds checkpoints side by side."""
    names = [name for name, holds in EXPERT_FOLDERS.items() if holds == expert] + [expert, f"{expert}_noise"]
    found = [name for name in names if (Path(root).expanduser() / name).is_dir()]
    if not found:
        raise CheckpointError(f"has no folder of the {expert}-noise expert ({', '.join(names)})", where=root,
                              fix="name a folder that holds both experts, or write {expert} where the names differ")
    return os.path.join(root, found[0])


def is_done(config: RunConfig) -> bool:
    """Tell whether this run's last iteration is saved already."""
    section = config.checkpoint
    if section.save is None or section.finetune:
        return False
    tracker = Path(section.save) / TRACKER_NAME
    return tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(config.training.train_iters)


def collect_adapters(configs: Sequence[RunConfig]) -> list[Path]:
    """Copy the last adapter file of each run beside the runs' folders and return the copies. Rank 0."""
    from mindspeed_wan.training.adapters import ADAPTER_FILE

    copies = []
    for config in configs:
        if config.lora is None or config.checkpoint.save is None:
            continue
        save = Path(config.checkpoint.save)
        target = save.parent / f"adapter_{config.diffusion.expert}.safetensors"
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(checkpoint_folder(save, config.training.train_iters) / ADAPTER_FILE, staging)
        os.replace(staging, target)
        copies.append(target)
    return copies
