"""Where a run starts: its own last save, another training checkpoint, weights alone, or random numbers.

Order of precedence: a checkpoint under ``--save`` (the run was stopped or killed and is started again by the same
command), a training checkpoint under ``--load``, weights under ``--load``, ``--from-scratch``. ``--finetune`` takes
only weights and starts at iteration 0, as in Megatron, and ``--ckpt-step`` starts from the iteration it names; what
either of them has saved since is gone on from (``start``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.checkpoint.manifest import RELEASE, TRACKER_NAME, read_tracker
from mindspeed_wan.checkpoint.sources import Found, find
from mindspeed_wan.checkpoint.weights import checked, load_model_weights
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.lora.apply import split_views
from mindspeed_wan.models.quantization import weight_views
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import init_weights
from mindspeed_wan.parallel.agreement import first_decides, is_first
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.training import adapters
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.optimizer import AdamW
from mindspeed_wan.training.start import goes_on_from_save

CARD_VERSION = 1


def model_card(config: RunConfig, wan: WanConfig) -> dict[str, Any]:
    """Return the ``wan.json`` of this run's checkpoints."""
    diffusion = config.diffusion
    return {"version": CARD_VERSION, "task": wan.task, "expert": diffusion.expert, "boundary": diffusion.boundary,
            "shift": diffusion.shift, "config": wan.to_dict(), **adapters.card_entries(config)}


def training_checkpoint(config: RunConfig) -> Found | None:
    """Return the training checkpoint this run goes on from, verified, or ``None``. Rank 0."""
    section = config.checkpoint
    if section.save is not None and goes_on_from_save(config):
        found = dcp.newest(section.save, strict=section.strict_resume, full_hash=section.verify, warn=_warn)
        if found is not None:
            return found
        _refuse_to_start_over(Path(section.save))
    if section.finetune:
        return None
    if section.load is None or not Path(section.load).is_dir():
        return None
    if config.lora is not None and section.load_base_model is None:
        return None  # --load names the base weights
    load = Path(section.load)
    if (load / dcp.PROGRESS_FILE).is_file():  # one iter_* folder instead of the root
        return checked(find(load), full_hash=section.verify)
    return dcp.newest(load, step=section.ckpt_step, strict=section.strict_resume, full_hash=section.verify, warn=_warn)


def _refuse_to_start_over(save: Path) -> None:
    """Refuse a save folder whose tracker names an iteration that nothing can be resumed from.

    Raises:
        CheckpointError: its files are damaged, or another program's; starting anew would move the tracker off them.
    """
    if (save / TRACKER_NAME).exists() and (named := read_tracker(save)) != RELEASE:
        raise CheckpointError(f"names iteration {named}, which is not a complete checkpoint of this program",
                              where=str(save / TRACKER_NAME),
                              fix="choose another --save, copy that iteration again, or pass --finetune to start at "
                              "iteration 0 from --load")


def restore(config: RunConfig, model: WanDiT, groups: ParallelGroups, optimizer: AdamW, ema: Ema | None) -> Progress:
    """Fill the model, the optimizer and the average, and return how far the run is. Collective.

    Args:
        config: the resolved configuration.
        model: materialised; its values are undefined.
        groups: its layout.
        optimizer: over its parameters.
        ema: the average, filled as well.
    """
    section, wan = config.checkpoint, model.config
    views = adapters.trained_views(config, model, groups)
    found = first_decides(lambda: training_checkpoint(config))
    if found is None or config.lora is not None:
        _load_weights(config, model, groups, optimizer)
    if found is None:
        if config.lora is not None:
            adapters.start_adapter(config, model, groups)
        if ema is not None:
            ema.restart(optimizer.masters())
        return Progress(seed=config.training.seed)
    check_card(found, config, wan, resuming=True)
    progress = dcp.load(found, views, optimizer, with_moments=not section.no_load_optim,
                        ema=None if ema is None else ema.averages, expert=config.diffusion.expert)
    if ema is not None:
        ema.updates = progress.ema_updates
    if is_first():
        print(f" resumed from {found.path} (iteration {progress.iteration}, "
              f"{progress.consumed_samples} samples consumed)", flush=True)
        if progress.seed != config.training.seed:
            _warn(f"warning: the run was started with --seed {progress.seed}, now {config.training.seed}: "
                  "data order and noise change here")
    progress.seed = config.training.seed
    return progress


def _load_weights(config: RunConfig, model: WanDiT, groups: ParallelGroups, optimizer: AdamW) -> None:
    """Fill the model; fp32 masters of bf16 parameters take the weights as they are stored, not as bf16 rounds them."""
    section, wan = config.checkpoint, model.config
    found = first_decides(lambda: weights_found(config, wan))
    if found is None:
        init_weights(model, config.training.seed, groups)
        optimizer.parameters_to_masters()
        return
    masters = optimizer.masters()
    base, _ = split_views(weight_views(model, groups))
    base = {name: dcp.view_like(view, masters[name]) if isinstance(view, Tensor) and name in masters else view
            for name, view in base.items()}
    report = load_model_weights(found.path, base, wan, expert=config.diffusion.expert,
                                full_hash=section.verify)
    optimizer.masters_to_parameters()
    if is_first():
        print(f" loaded {report.found.kind} weights from {report.found.path} "
              f"({report.bytes_read / 2**20:.1f} MiB on this rank, {report.seconds:.1f} s)", flush=True)


def weights_found(config: RunConfig, wan: WanConfig) -> Found | None:
    """Return the (base) weights that the flags name, ``None`` for random initialisation. Rank 0.

    Raises:
        CheckpointError: nothing to load, another task or boundary, or another program's training checkpoint.
    """
    section = config.checkpoint
    path = section.load_base_model or section.load
    if path is None:
        if not section.from_scratch:
            raise CheckpointError("no weights to start from", where="--load",
                                  fix="set --load, or pass --from-scratch for random initialisation")
        return None
    found = find(path, step=None if section.load_base_model else section.ckpt_step)
    check_card(found, config, wan, resuming=False)
    if found.iteration is not None and not section.finetune and config.lora is None:
        raise CheckpointError(
            f"is iteration {found.iteration} of a run of another program; its optimizer state cannot be continued here",
            where=str(found.path), fix="pass --finetune to take its weights and start at iteration 0",
        )
    return found


def check_card(found: Found, config: RunConfig, wan: WanConfig, *, resuming: bool) -> None:
    """Compare what the checkpoint says it is with what is to be trained.

    Raises:
        CheckpointError: another task or boundary; when resuming, another shift as well.
    """
    card, diffusion = found.card, config.diffusion
    if resuming:
        adapters.check_same_kind(card, config, str(found.path))
    elif "lora" in card:
        raise CheckpointError("holds adapters, not the weights they belong to", where=str(found.path),
                              fix="give the base weights with --load-base-model (LoRA), or merge the adapter first: "
                              "mindspeed-wan lora merge")
    wanted = {"task": wan.task, "boundary": diffusion.boundary, **({"shift": diffusion.shift} if resuming else {})}
    differ = [key for key, value in wanted.items()
              if card.get(key) is not None and value is not None and not _same(card[key], value)]
    if differ:
        made, now = (", ".join(f"{key} {values[key]}" for key in differ) for values in (card, wanted))
        fix = "use the model.json of " + ("that checkpoint" if resuming else "these weights")
        if differ == ["shift"]:  # the only one that may change with --finetune
            fix += ", or pass --finetune"
        raise CheckpointError(f"was made for {made}, this run is configured for {now}",
                              where=str(found.path / "wan.json"), fix=fix)


def _same(stored: Any, wanted: Any) -> bool:
    if isinstance(stored, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(stored, wanted, abs_tol=1e-6)
    return bool(stored == wanted)


def _warn(text: str) -> None:
    print(f" {text}", flush=True)
