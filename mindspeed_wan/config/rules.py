"""All rules over a configuration, the ranks they are checked for, and notes on likely mistakes.

The rules themselves are in ``rules_run`` (ranks, optimizer, checkpoints), ``rules_model`` (expert, data, paths) and
``rules_validation``.
"""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_wan.config import rules_model, rules_run, rules_validation
from mindspeed_wan.config.expert_range import OFFICIAL_BOUNDARY
from mindspeed_wan.config.rule import RuleRow
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError

RULES: tuple[RuleRow, ...] = rules_model.RULES + rules_run.RULES + rules_validation.RULES
"""Every rule, in the order its errors are shown."""


def check(config: RunConfig, ranks: int | None, *, skip: frozenset[str] = frozenset()) -> list[ConfigError]:
    """Return the errors of all rules.

    Args:
        config: values that are right one by one.
        ranks: ranks of the job, or None when unknown (a dry run outside torchrun).
        skip: sections that have errors already; rules that read them would only repeat those.
    """
    return [error for rule, reads in RULES if not reads & skip for error in rule(config, ranks)]


def world_size(asked: int | None, env: Mapping[str, str], dry_run: bool) -> int | None:
    """Return the ranks of the job: --world-size, then torchrun's WORLD_SIZE, then 1 (None for a bare dry run)."""
    if asked is not None:
        return asked
    text = env.get("WORLD_SIZE", "")
    if text.isdigit() and int(text) > 0:
        return int(text)
    return None if dry_run else 1


def notes(config: RunConfig) -> list[str]:
    """Return likely mistakes that do not stop the run."""
    return [*_notes_on_noise(config), *_notes_on_pace(config)]


def _notes_on_noise(config: RunConfig) -> list[str]:
    model, diffusion, found = config.model, config.diffusion, []
    official = OFFICIAL_BOUNDARY[model.task]
    if diffusion.boundary is not None and abs(diffusion.boundary - official) > 1e-9:
        found.append(
            f"boundary {diffusion.boundary:g} differs from Wan2.2's {official:g} for {model.task}: "
            "inference must use the same"
        )
    if diffusion.expert is None and diffusion.sigma_range == (0.0, 1.0):
        found.append("no expert is chosen: all sigmas are trained, as for a model with one expert")
    return found


def _notes_on_pace(config: RunConfig) -> list[str]:
    training, checkpoint, optimizer, found = config.training, config.checkpoint, config.optimizer, []
    if checkpoint.save and checkpoint.save_interval and checkpoint.save_interval > training.train_iters:
        found.append(
            f"--save-interval {checkpoint.save_interval} is beyond --train-iters {training.train_iters}: "
            "only the end of the run is saved"
        )
    if not checkpoint.save and not training.dry_run:
        found.append("--save is not given: nothing is kept")
    if checkpoint.save and checkpoint.no_save_optim:
        found.append("--no-save-optim: these checkpoints cannot be resumed exactly")
    if training.eval_interval and training.eval_interval <= training.train_iters and config.valid_data is None:
        found.append("the validation loss is that of the first training clips; --valid-mm-data names others")
    if config.fsdp2.model_fields_set and not config.uses_fsdp2:
        found.append("--fsdp2-config-path without --use-torch-fsdp2: the file is not used")
    recompute = training.recompute
    if recompute.granularity == "full" and recompute.method == "uniform" and recompute.num_layers > 1:
        found.append(
            f"--recompute-num-layers {recompute.num_layers}: every block is recomputed alone, with the same gradients"
        )
    if optimizer.lr == 0:
        found.append("--lr 0: the weights will not change")
    elif optimizer.lr > 1e-2:
        found.append(f"--lr {optimizer.lr:g} is very high for AdamW; NaN losses are likely")
    if training.precision == "fp32" and config.model.wan.dim >= 5120:
        found.append("fp32 compute for a 14B expert; --bf16 halves memory and is several times faster")
    return found
