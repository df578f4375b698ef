"""What another trainer's command line means: the ``Job`` that every importer returns, and what their parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mindspeed_wan.config.expert_range import ExpertRange
from mindspeed_wan.errors import ConfigError, nearest_option
from mindspeed_wan.lora.spec import match_targets, parse_targets
from mindspeed_wan.models.wan.config import PRESETS, WanConfig

STEPS = 1000
"""Indices of every Wan trainer's schedule."""


@dataclass
class Job:
    """One training run.

    ``size`` is (height, width), or ``None`` where ``max_pixels`` rules. ``diffusion`` holds further keys of the model
    file's block of that name, ``conditioning`` those of ``ae.i2v_processor``; ``flags`` are appended to the launcher.
    ``processes`` counts those of all ``machines``. ``base_lora`` is an adapter that the weights hold before anything is
    trained.
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
    machines: int
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

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "data repeats": self.repeat, "gradient accumulation steps": self.accumulation,
                  "clips per step": self.micro_batch, "height and width": min(self.size or (1,)),
                  "pixels": self.max_pixels, "learning rate": self.learning_rate}
        if self.lora is not None:
            counts["LoRA rank"] = self.lora["r"]
            match_targets(parse_targets(self.lora["targets"]), PRESETS[f"{self.task}-A14B"])
        for name, count in counts.items():
            if not count > 0:
                raise ConfigError(f"the command's {name}: {count} is not positive")


class ImportParser(argparse.ArgumentParser):
    """A strict parser of another tool's flags: no abbreviations, unknown ones get the nearest name."""

    def __init__(self, tool: str) -> None:
        super().__init__(prog="train.py", add_help=False, allow_abbrev=False)
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving."""
        known = [option for action in self._actions for option in action.option_strings]
        raise ConfigError(f"{self.tool}'s command: {message}", fix=nearest_option(message, known) or
                          f"give the words after the script as {self.tool}'s Wan examples write them")


def architecture(folder: Path) -> WanConfig | None:
    """Return the sizes that an expert's folder states, ``None`` before it is downloaded."""
    if not (folder / "config.json").is_file():
        return None
    from mindspeed_wan.lora.model_config import config_of

    return config_of(folder)


def whole_frames(frames: int, warnings: list[str], flag: str = "--num_frames") -> int:
    """Return the largest 4k+1 up to ``frames``, with a warning where that is another number."""
    if frames < 1:
        raise ConfigError(f"{flag} {frames} is not positive")
    down = (frames - 1) // 4 * 4 + 1
    if down != frames:
        warnings.append(f"{flag} {frames} is not 4k+1; {down} frames are trained")
    return down


def processes(before: Sequence[str], warnings: list[str]) -> tuple[int | None, int]:
    """Return accelerate's number of processes and of machines, from its flags or its configuration file."""
    flags = dict(zip(before, [*before[1:], ""])) | dict(word.split("=", 1) for word in before if "=" in word)
    given = {name: flags[f"--{name}"] for name in ("num_processes", "num_machines")
             if flags.get(f"--{name}", "").isdigit()}
    file = flags.get("--config_file")
    if file is not None:
        given = {**_accelerate_file(Path(file), warnings), **given}
        if "num_processes" not in given:
            warnings.append(f"{file} does not say how many processes there are: set NPROC_PER_NODE")
    total = int(given["num_processes"]) if "num_processes" in given else None
    return total, max(1, int(given.get("num_machines", 1)))


def _accelerate_file(file: Path, warnings: list[str]) -> dict[str, Any]:
    """Return the counts that an accelerate configuration states."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {name: int(values[name]) for name in ("num_processes", "num_machines") if name in values}
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        warnings.append(f"{file} cannot be read ({type(error).__name__})")
        return {}
