"""`mindspeed-wan eval loss`: the validation loss of one checkpoint, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_wan.config.flag_table import BATCH, CHECKPOINT, EXPERT, FILES, LORA, PARALLEL, PRECISION, Flag
from mindspeed_wan.errors import ConfigError

HELP = "validation loss of a checkpoint: the number that training reports for it"

_OF_GROUPS = {
    "--seed", "--micro-batch-size", "--global-batch-size", "--eval-iters", "--load", "--ckpt-step", "--verify",
    "--bf16", "--fp32", "--deterministic", "--max-bad-fraction",
}  # fmt: skip
"""Flags of the groups about batches, precision and checkpoints that decide the number."""
_NOT_HERE = {"--lora-dropout", "--lora-format", "--world-size", "--expert-ranks"}

_ARITY: dict[str, Any] = {"switch": 0, "texts": "+"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those flags of ``pretrain_sora.py`` that a loss depends on."""
    parser.description = (
        "Flags and files mean what they do in pretrain_sora.py. With --load SAVE_FOLDER all others default to those of "
        "that run. Start it with torchrun for several ranks."
    )
    parser.set_defaults(words=[])
    for flag in _flags():
        choices = f" ({', '.join(flag.choices)})" if flag.choices else ""
        parser.add_argument(flag.name, nargs=_ARITY.get(flag.kind, 1), action=_Keep, dest="words",
                            metavar="" if flag.kind == "switch" else flag.kind.upper(), help=flag.help + choices)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the loss and its quarters there, too")


def _flags() -> list[Flag]:
    chosen = [flag for flag in (*BATCH, *PRECISION, *CHECKPOINT) if flag.name in _OF_GROUPS]
    return [flag for flag in (*FILES, *EXPERT, *chosen, *PARALLEL, *LORA) if flag.name not in _NOT_HERE]


class _Keep(argparse.Action):
    """Collects the words as they were typed; ``config.flags`` reads them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        """Append the flag and its values."""
        namespace.words = [*namespace.words, option_string, *(values or ())]


def run(args: argparse.Namespace) -> int:
    """Print the loss and its quarters; rank 0 writes ``--json``."""
    from mindspeed_wan.config import flags
    from mindspeed_wan.evaluation.output import write_text
    from mindspeed_wan.parallel.agreement import is_first
    from mindspeed_wan.parallel.failures import explained
    from mindspeed_wan.parallel.groups import destroy
    from mindspeed_wan.platforms import get_platform
    from mindspeed_wan.training.evaluate import flag_words, validation_loss

    load = _last(args.words, "--load")
    if load is None:
        raise ConfigError("no weights are named", fix="add --load with a run's save folder, or other weights")
    config = flags.parse(flag_words(args.words, load))
    with explained():
        found = validation_loss(config, get_platform(config.training.device))
    if is_first():
        print(f"validation loss: {found.describe()}")
        if args.json is not None:
            values = {"loss": found.loss, "quartiles": list(found.quartiles), "sigma_bounds": list(found.sigma_bounds),
                      "expert": config.diffusion.expert, "load": config.checkpoint.load, "seed": config.training.seed}
            write_text(args.json, json.dumps(values, indent=1) + "\n")
    destroy()
    return 0


def _last(words: Sequence[str], name: str) -> str | None:
    values = [words[at + 1] for at, word in enumerate(words[:-1]) if word == name]
    return values[-1] if values else None
