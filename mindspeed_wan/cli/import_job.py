"""What another trainer's command line means: the ``Job`` that every importer returns, and what their parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mindspeed_wan.config.expert_range import ExpertRange
from mindspeed_wan.errors import ConfigError, did_you_mean

STEPS = 1000
"""Indices of every Wan trainer's schedule."""


@dataclass
class Job:
    """One training run.

    ``size`` is (height, width), or ``None`` where ``max_pixels`` rules. ``diffusion`` holds further keys of the model
    file's block of that name, ``conditioning`` those of ``ae.i2v_processor``; ``flags`` are appended to the launcher.
    ``base_lora`` is an adapter that the weights hold before anything is trained.
    """

    task: str
    expert: ExpertRange
    weights: Path
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    data: Path
    data_folder: Path
    num_frames: int
    size: tuple[int, int] | None
    max_pixels: int
    lora: dict[str, Any] | None
    lora_checkpoint: Path | None
    learning_rate: float
    weight_decay: float
    epochs: int
    repeat: int
    accumulation: int
    save_steps: int | None
    output: Path
    processes: int | None
    workers: int
    diffusion: dict[str, Any]
    lora_format: str
    conditioning: dict[str, Any] | None = None
    frame_interval: int = 1
    caption_dropout: float = 0.0
    clip_grad: float = 0.0
    micro_batch: int = 1
    seed: int | None = None
    flags: tuple[str, ...] = ()
    base_lora: Path | None = None
    warnings: list[str] = field(default_factory=list)


class ImportParser(argparse.ArgumentParser):
    """A strict parser of another tool's flags: no abbreviations, unknown ones get the nearest name."""

    def __init__(self, tool: str) -> None:
        super().__init__(prog="train.py", add_help=False, allow_abbrev=False)
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving."""
        word = next((w for w in message.split() if w.startswith("--")), "").partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        raise ConfigError(f"{self.tool}'s command: {message}", fix=did_you_mean(word, known) or
                          f"give the words after the script as {self.tool}'s Wan examples write them")


def whole_frames(frames: int, warnings: list[str], flag: str = "--num_frames") -> int:
    """Return the largest 4k+1 up to ``frames``, with a warning where that is another number."""
    down = (frames - 1) // 4 * 4 + 1
    if down != frames:
        warnings.append(f"{flag} {frames} is not 4k+1; {down} frames are trained")
    return down


def processes(before: Sequence[str], warnings: list[str]) -> int | None:
    """Return accelerate's number of processes, from its flags or its configuration file."""
    flags = dict(zip(before, [*before[1:], ""])) | dict(word.split("=", 1) for word in before if "=" in word)
    if flags.get("--num_processes", "").isdigit():
        return int(flags["--num_processes"])
    file = flags.get("--config_file")
    if file is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        return int(values["num_processes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        warnings.append(f"{file} does not say how many processes there are ({type(error).__name__}): set "
                        "NPROC_PER_NODE")
        return None
