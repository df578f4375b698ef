"""``--expert both``: one command trains both experts, one after the other or side by side, each as a run of its own.

The two runs differ in their expert: ``--save DIR`` becomes ``DIR/high`` and ``DIR/low``, ``--load`` names a folder that
holds the weights of both, ``{expert}`` in any value becomes the name (``--mm-model pretrain_model_{expert}.json``), and
``--high:FLAG`` and ``--low:FLAG`` are flags of one of them only. Started again, the command goes on where it stopped;
an expert that is done is not loaded again. LoRA runs leave their two adapters beside the folders:
``DIR/adapter_high.safetensors`` and ``DIR/adapter_low.safetensors``.

``--expert-ranks HIGH,LOW`` divides the ranks of the job between the experts (``joint``); without it all ranks train the
high-noise expert first and then the low-noise one.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import checkpoint_folder, named_iteration
from mindspeed_wan.checkpoint.sources import EXPERT_FOLDERS
from mindspeed_wan.config import flags
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import CheckpointError, ConfigError

EXPERTS = ("high", "low")
_FLAG, _ALL, _RANKS, _WORLD = "--expert", "both", "--expert-ranks", "--world-size"
_WEIGHTS = ("--load", "--load-base-model")
_FOLDERS = ("--save", "--tensorboard-dir")


def read(argv: Sequence[str], env: Mapping[str, str]) -> tuple[list[RunConfig], tuple[int, int] | None]:
    """Return the checked configuration of every run of a command line, and the ranks of each when side by side.

    Args:
        argv: the words after the program's name.
        env: WORLD_SIZE gives the ranks of the job.

    Raises:
        ConfigError: mistakes of the line, or experts that cannot share a job.
        CheckpointError: the weights' folder does not hold both experts.
    """
    lines, ranks = split(argv), sizes(argv, env)
    if ranks is None or len(lines) == 1:
        return [flags.parse(line, env) for line in lines], None
    configs = [flags.parse(_in_world(line, size), {**env, "WORLD_SIZE": str(size)})
               for line, size in zip(lines, ranks)]
    refuse_unequal(configs, ranks)
    return configs, ranks


def split(argv: Sequence[str]) -> list[list[str]]:
    """Return one command line per expert when ``--expert both`` is on it, else the line itself.

    Raises:
        CheckpointError: the weights' folder does not hold both experts.
    """
    words = [part for word in argv for part in _parted(word)]
    if _value(words, _FLAG) != _ALL:
        return [list(argv)]
    return [_for_expert(_own_words(words, expert), expert) for expert in EXPERTS]


def sizes(argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the ranks of the high and of the low expert, ``None`` for one after the other.

    Raises:
        ConfigError: ``--expert-ranks`` does not divide the ranks of the job.
    """
    words = [part for word in argv for part in _parted(word)]
    asked = _value(words, _RANKS)
    if asked is None or _value(words, _FLAG) != _ALL:
        return None
    world = int(_value(words, _WORLD) or env.get("WORLD_SIZE", "1"))
    if asked == "even":
        if world % 2:
            raise ConfigError(f"{_RANKS} even cannot halve {world} rank{'s' * (world > 1)}",
                              fix=f"start an even number of ranks, or write {_RANKS} HIGH,LOW")
        return world // 2, world // 2
    numbers = asked.split(",")
    if len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"{_RANKS} {asked!r} is neither 'even' nor two numbers", fix=f"write {_RANKS} 8,8")
    high, low = int(numbers[0]), int(numbers[1])
    if high + low != world:
        raise ConfigError(f"{_RANKS} {asked} is for {high + low} ranks, the job has {world}",
                          fix=f"start {high + low} ranks, or write numbers that add up to {world}")
    return high, low


def refuse_unequal(configs: Sequence[RunConfig], ranks: Sequence[int]) -> None:
    """Refuse experts that would not read the same samples: what is encoded for one is of no use to the other.

    Raises:
        ConfigError: names every setting that differs, with both values.
    """
    if all(config.data.kind == "feature" for config in configs):
        return  # each reads the cache for itself
    if any(config.valid_data is not None for config in configs):
        raise ConfigError("--valid-mm-data does not combine with experts that share their clips side by side",
                          fix=f"cache the features, or train one expert after the other (leave out {_RANKS})")
    high, low = (_sharing(config, size) for config, size in zip(configs, ranks))
    different = [f"{name} (high: {high[name]}, low: {low[name]})" for name in high if high[name] != low[name]]
    if different:
        raise ConfigError("side by side, the experts share their clips, but these differ: " + "; ".join(different),
                          fix=f"make them equal, cache the features (mindspeed-wan features build), or train one "
                          f"expert after the other (leave out {_RANKS})")


def _sharing(config: RunConfig, ranks: int) -> dict[str, object]:
    """Return everything that decides which samples are read in which order, and what they are encoded to."""
    model, training, wan = config.model, config.training, config.model.wan
    evaluation = (training.eval_interval, training.eval_iters) if training.eval_interval else None
    return {
        "global batch size": config.global_batch(ranks), "--seed": training.seed, "--eval-interval": evaluation,
        "task": model.task, "ae": model.vae.to_dict(), "text_encoder": model.text_encoder.to_dict(),
        "image encoder": model.image_encoder.to_dict(), "conditioning": model.conditioning.to_dict(),
        "--valid-mm-data": config.valid_data,
        "predictor.img_dim": (wan.image_dim, wan.pos_embed_len), "predictor.text_dim": wan.text_dim,
        **{f"data.{name}": value for name, value in config.data.to_dict().items()},
    }


def _in_world(line: Sequence[str], size: int) -> list[str]:
    """Return the line with ``--world-size`` (of a dry run) as the expert's share."""
    return [str(size) if previous == _WORLD else word for previous, word in zip(["", *line], line)]


def _value(words: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag."""
    values = [value for name, value in itertools.pairwise(words) if name == flag]
    return values[-1] if values else None


def _own_words(words: Sequence[str], expert: str) -> list[str]:
    """Drop ``--expert-ranks`` and the other expert's flags, and take the prefix off this one's."""
    own: list[str] = []
    keep = True
    for word in words:
        name, marked, flag = word.partition(":")
        of = name.removeprefix("--") if marked and name in (f"--{known}" for known in EXPERTS) else None
        if word.startswith("--"):
            keep = word != _RANKS and of in (None, expert)
        if keep:
            own.append(f"--{flag}" if of else word)
    return own


def _parted(word: str) -> list[str]:
    """Split ``--flag=value`` of the flags that are changed here."""
    flag, equals, value = word.partition("=")
    changed = (_FLAG, _RANKS, _WORLD, *_FOLDERS, *_WEIGHTS)
    own = {f"--{expert}:{name.removeprefix('--')}" for expert in EXPERTS for name in changed}
    return [flag, value] if equals and flag in {*changed, *own} else [word]


def _for_expert(words: Sequence[str], expert: str) -> list[str]:
    line: list[str] = []
    counts = {word: place for place, word in enumerate(words)}  # of a repeated flag the last one counts
    for place, (previous, word) in enumerate(zip(["", *words], words), start=-1):
        value = word.replace("{expert}", expert)
        if previous == _FLAG:
            value = expert
        elif previous in _FOLDERS:
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
    from mindspeed_wan.training.start import goes_on_from_save

    save = config.checkpoint.save
    return save is not None and goes_on_from_save(config) and named_iteration(save) == config.training.train_iters


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
