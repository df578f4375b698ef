"""Which start a command asks for, and whether it has been made already.

``--finetune`` and ``--ckpt-step`` leave what ``--save`` holds and start elsewhere. The same command started again (by a
user, a launcher or a batch system) goes on from its own last save instead of starting over: every save names the
command that wrote it, and from the same place the same command comes to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.manifest import RELEASE, checkpoint_folder, named_iteration
from mindspeed_wan.checkpoint.sources import find
from mindspeed_wan.config.schema import CheckpointSection, RunConfig
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.training.metrics import METRICS_FILE, VALIDATION_FILE


def command_digest(config: RunConfig) -> str:
    """Return what tells this configuration from any other one."""
    text = json.dumps(config.resolved(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def goes_on_from_save(config: RunConfig) -> bool:
    """Tell whether the run starts from what ``--save`` holds, if it holds anything."""
    section = config.checkpoint
    if section.save is None or not Path(section.save).is_dir():
        return False
    elsewhere = section.finetune or _chosen_step(config) is not None
    return not elsewhere or _last_command(section) == command_digest(config)


def leave_other_branches(config: RunConfig) -> str | None:
    """Move the saves of ``--save`` that this run does not go on from out of its way; returns what to tell. Rank 0.

    Call before the run writes anything into the folder.
    """
    section = config.checkpoint
    assert section.save is not None
    save, spare = Path(section.save), None
    above: int | str | None
    if goes_on_from_save(config):
        above = named_iteration(save)
        if above is None:
            return None
        spare = save / RELEASE if above == RELEASE else None
    else:
        own = section.load is not None and _is_inside(Path(section.load), save)
        above = None if section.finetune or not own else _chosen_step(config)
        spare = find(str(section.load), step=section.ckpt_step).path if section.finetune and own else None
    aside = dcp.set_aside(save, above=above if isinstance(above, int) else None, spare=spare,
                          files=(METRICS_FILE, VALIDATION_FILE, "config.json"))
    if aside is None:
        return None
    names = ", ".join(sorted(folder.name for folder in aside.glob("iter_*")))
    return f"left behind by this start and moved to {aside}: {names} (nothing is deleted; --load {aside} goes on there)"


def _chosen_step(config: RunConfig) -> int | None:
    """Return the iteration that the command names, by ``--ckpt-step`` or as one folder of ``--save``."""
    section = config.checkpoint
    if section.load is None or (config.lora is not None and section.load_base_model is None):
        return None  # --load names base weights
    load = Path(section.load)
    if section.ckpt_step is not None:
        return section.ckpt_step
    if section.save is not None and (load / dcp.PROGRESS_FILE).is_file() and _same(load.parent, Path(section.save)):
        return find(load).iteration
    return None


def _last_command(section: CheckpointSection) -> str | None:
    """Return the digest that the newest save carries."""
    root = Path(str(section.save))
    try:
        named = named_iteration(root)
        return None if named in (None, RELEASE) else dcp.read_progress(checkpoint_folder(root, named)).command
    except CheckpointError:
        return None  # torn or gone: it says nothing; whoever loads it says what is wrong


def _is_inside(load: Path, save: Path) -> bool:
    """True for the save folder itself and for one of its checkpoints."""
    return _same(load, save) or _same(load.parent, save)


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)
