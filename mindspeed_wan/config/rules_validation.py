"""Rules about validation: clips set aside for a loss, prompts and weights for videos. Each returns its mistakes."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.config.documents import nearby_files
from mindspeed_wan.config.rule import RuleRow, mistake
from mindspeed_wan.config.rules_model import features_agree, frames_fit, paths_exist, sizes_fit
from mindspeed_wan.config.schema import RunConfig, ValidationSection
from mindspeed_wan.errors import ConfigError


def validation_data_is_read(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Clips that are set aside need evaluations that read them."""
    if config.valid_data is None or (config.training.eval_interval and config.training.eval_iters):
        return []
    message = "--valid-mm-data without evaluations: nothing would read it"
    return mistake(message, "add --eval-interval N and an --eval-iters above 0, or leave it out")


def validation_data_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The clips of the validation loss obey the rules of the training clips."""
    if config.valid_data is None:
        return []
    sources = {**config.sources, "data": config.sources.get("valid", "")}
    as_data = config.model_copy(update={"data": config.valid_data, "sources": sources})
    errors = [error for rule in (frames_fit, sizes_fit, features_agree, paths_exist) for error in rule(as_data, ranks)]
    return [ConfigError(error.message, where="valid:" + error.where.removeprefix("data:"), fix=error.fix)
            for error in errors if error.where is not None and error.where.startswith("data:")]


def videos_are_asked_for(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Validation videos need prompts, an interval and a folder; their other settings need them."""
    given = config.validation
    if given.prompts and given.video_interval:
        if config.checkpoint.save:
            return []
        return mistake("validation videos are written under --save, which is not given", "add --save DIR")
    if given.prompts:
        return mistake("--validation-prompts without --validation-video-interval", "say every how many iterations")
    if given.video_interval:
        return mistake("--validation-video-interval without --validation-prompts", "name a file of prompts")
    default = ValidationSection()
    unread = [name for name in ("other_expert", "steps", "shift", "guidance", "negative_prompt")
              if getattr(given, name) != getattr(default, name)]
    if not unread:
        return []
    named = ", ".join(f"--validation-{name.replace('_', '-')}" for name in unread)
    return mistake(f"{named} without --validation-prompts: no video is made", "add the prompts, or leave it out")


def videos_can_be_sampled(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Sampling starts from noise, which is the high expert's; some layouts and models cannot sample while training."""
    given = config.validation
    found: list[ConfigError] = []
    if not given.prompts:
        return found
    expert = config.diffusion.expert
    if expert == "low" and not given.other_expert:
        message = "the low-noise expert cannot start from noise: a video needs the high-noise expert too"
        found += mistake(message, "name its weights with --validation-other-expert, or leave the prompts out")
    if expert is None and given.other_expert:
        found += mistake("--validation-other-expert, but this model has one expert", "leave it out")
    if config.parallel.pipeline > 1:
        message = "validation videos do not combine with pipeline stages"
        found += mistake(message, "leave --validation-prompts out, and generate from the saved checkpoints")
    if config.model.wan.pos_embed_len is not None:
        found += mistake("validation videos of a first-and-last-frame model are not made while training",
                         "leave --validation-prompts out, and generate from the saved checkpoints")
    return found


def video_files_exist(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Prompts, the other expert, and the encoders (also where training reads cached features) are there."""
    given, model = config.validation, config.model
    if not given.prompts:
        return []
    wanted = [("--validation-prompts", given.prompts), ("ae.from_pretrained", model.vae.path),
              ("text_encoder.from_pretrained", model.text_encoder.path)]
    if given.other_expert:
        wanted.append(("--validation-other-expert", given.other_expert))
    if model.wan.image_dim is not None:
        wanted.append(("ae.i2v_processor.image_encoder.from_pretrained", model.image_encoder.path))
    found = []
    for name, path in wanted:
        if path is None:
            found += mistake(f"{name} is not given; validation videos need it", "name it in the model file")
        elif not Path(path).exists():
            found += mistake(f"{name}: {path} does not exist (validation videos need it)", nearby_files(path))
    return found


RULES: tuple[RuleRow, ...] = (
    (validation_data_is_read, frozenset({"training", "valid_data"})),
    (validation_data_fits, frozenset({"model", "valid_data"})),
    (videos_are_asked_for, frozenset({"validation", "checkpoint"})),
    (videos_can_be_sampled, frozenset({"validation", "diffusion", "parallel", "model"})),
    (video_files_exist, frozenset({"validation", "model"})),
)
"""Every rule of this file, with the sections it reads."""
