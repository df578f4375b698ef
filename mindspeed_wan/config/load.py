"""Files and flags to one ``RunConfig``: defaults, then the files, then the flags; all mistakes in one report.

``build`` is called by ``flags.parse``. ``load_files`` reads the files alone, for tools that have no command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mindspeed_wan.config import rules
from mindspeed_wan.config.documents import Document, read_document
from mindspeed_wan.config.expert_range import resolve
from mindspeed_wan.config.flags import CommandLine
from mindspeed_wan.config.fsdp2_file import FSDP2_WHY, Fsdp2File, fsdp2_section
from mindspeed_wan.config.mm_files import WHY, DataFile, DiffusionFile, ModelFile
from mindspeed_wan.config.paths import is_placeholder, resolve_path
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.config.translate import DTYPES, Report, data_section, model_section, tokenizer
from mindspeed_wan.config.validate import dotted, validate, wanted_text
from mindspeed_wan.errors import ConfigError

SECTIONS_OF = {"model": ("model", "diffusion"), "data": ("data", "model"), "valid": ("valid_data",),
               "fsdp2": ("fsdp2",)}
"""Sections that cannot be checked further when a file has errors."""

_DIFFUSION_SAME = ("num_train_timesteps", "shift", "weighting", "normalize_weighting", "density",
                   "density_mean", "density_std", "grid")  # fmt: skip


def build(line: CommandLine, env: Mapping[str, str] | None = None) -> RunConfig:
    """Return the checked configuration of a command line.

    Raises:
        ConfigError: all mistakes found, in one.
    """
    env = os.environ if env is None else env
    report = Report(list(line.errors), list(line.notes), set(line.suspects))
    tree, documents, model_dtype = _from_files(line, report)
    _apply_flags(tree, line, report)
    _derive(tree, line, report, model_dtype)
    if "train_iters" not in tree["training"] and "training" not in report.suspects:
        _bad_flag("--train-iters is missing", report, "say how many optimizer steps the run has")
    config = _validate_tree(tree, line, report)
    ranks = None
    if config is not None:
        ranks = rules.world_size(line.values.get("extra.world_size"), env, config.training.dry_run)
        found = [_located(e, documents) for e in rules.check(config, ranks, skip=frozenset(report.suspects))]
        told = {error.where for error in report.errors} - {None, "command line"}
        report.errors += [error for error in found if error.where not in told]  # a line is reported once
        report.notes[:0] = rules.notes(config)  # likely mistakes before flags without effect
    if report.errors or config is None:
        raise config_errors(report.errors)
    return config.model_copy(update={"notes": tuple(report.notes), "world_size": ranks})


def load_files(
    model: str | Path | None = None, data: str | Path | None = None, fsdp2: str | Path | None = None
) -> RunConfig:
    """Return the configuration that files alone describe (no flags, no check that paths exist).

    Raises:
        ConfigError: all mistakes found in the files, in one.
    """
    line = CommandLine()
    for name, path in (("model", model), ("data", data), ("fsdp2", fsdp2)):
        if path is not None:
            line.values[f"files.{name}"] = str(path)
    report = Report()
    tree, _, model_dtype = _from_files(line, report)
    _derive(tree, line, report, model_dtype)
    config = _validate_tree(tree, line, report)
    if report.errors or config is None:
        raise config_errors(report.errors)
    return config.model_copy(update={"notes": tuple(report.notes)})


def config_errors(errors: list[ConfigError]) -> ConfigError:
    """Return one error that lists all, in the order found, each once."""
    unique = list({str(error): error for error in errors}.values())
    if len(unique) == 1:
        return unique[0]
    lines = [f"{len(unique)} mistakes in the configuration"]
    for number, error in enumerate(unique, start=1):
        lines.append(f"{number:>3}. " + str(error).replace("\n", "\n     "))
    return ConfigError("\n".join(lines))


# ---- files ---------------------------------------------------------------------------------------------------


def _from_files(line: CommandLine, report: Report) -> tuple[dict[str, Any], dict[str, Document], str | None]:
    """Return the sections the files give, the parsed files, and predictor.dtype when the model file has it."""
    tree: dict[str, Any] = {"sources": {}}
    model_dtype = None
    model = _open("model", line, report, tree)
    parsed_model = _parse(ModelFile, "model", model, WHY, report)
    if model and parsed_model:
        tree["model"] = model_section(parsed_model, model, report)
        tree["diffusion"] = _diffusion(parsed_model, model, line, report)
        model_dtype = DTYPES[parsed_model.predictor.dtype] if parsed_model.predictor.dtype else None
    data = _open("data", line, report, tree)
    parsed_data = _parse(DataFile, "data", data, WHY, report)
    if data and parsed_data:
        tree["data"] = data_section(parsed_data, data, report)
        tree.setdefault("model", {}).setdefault("text_encoder", {}).update(tokenizer(parsed_data, data, report))
    valid = _open("valid", line, report, tree)
    parsed_valid = _parse(DataFile, "valid", valid, WHY, report)
    if valid and parsed_valid:
        # A validation loss is that of the real captions, also where the file is the training one with its dropout.
        tree["valid_data"] = {**data_section(parsed_valid, valid, report), "caption_dropout": 0.0}
    fsdp2 = _open("fsdp2", line, report, tree)
    parsed_fsdp2 = _parse(Fsdp2File, "fsdp2", fsdp2, FSDP2_WHY, report)
    if fsdp2 and parsed_fsdp2:
        tree["fsdp2"] = fsdp2_section(parsed_fsdp2, fsdp2, report)
    opened = {"model": model, "data": data, "valid": valid, "fsdp2": fsdp2}
    return tree, {name: document for name, document in opened.items() if document}, model_dtype


def _located(error: ConfigError, documents: dict[str, Document]) -> ConfigError:
    """Put file and line in the place of a rule's ``file:key``; a key that a file leaves out points at the file."""
    name, _, key = (error.where or "").partition(":")
    document = documents.get(name)
    if document is None:
        return ConfigError(error.message, where=None if key else error.where, fix=error.fix)
    parts = tuple(key.split("."))
    for keys in document.positions:
        if _ends_with(keys, parts):
            return ConfigError(error.message, where=document.where(keys), fix=error.fix)
    return ConfigError(error.message, where=document.path, fix=error.fix)


def _ends_with(keys: tuple[str | int, ...], parts: tuple[str, ...]) -> bool:
    """Tell whether a key path, list positions aside, ends with these names."""
    names = tuple(key for key in keys if isinstance(key, str))
    return isinstance(keys[-1] if keys else 0, str) and names[-len(parts) :] == parts


def _open(name: str, line: CommandLine, report: Report, tree: dict[str, Any]) -> Document | None:
    """Read one file; a missing or broken one is an error and its sections become suspect."""
    path = line.values.get(f"files.{name}")
    if path is None:
        return None
    tree["sources"][name] = resolve_path(path, None)
    try:
        return read_document(path)
    except ConfigError as error:
        report.errors.append(error)
        report.suspects.update(SECTIONS_OF[name])
        return None


def _parse(kind: Any, name: str, document: Document | None, why: dict[str, str], report: Report) -> Any:
    if document is None:
        return None
    parsed, errors = validate(kind, document, why)
    report.errors += errors
    if errors:
        report.suspects.update(SECTIONS_OF[name])
    return parsed


def _diffusion(file: ModelFile, document: Document, line: CommandLine, report: Report) -> dict[str, Any]:
    """Return the keyword arguments of ``DiffusionSection``; flags override the file's expert and boundary."""
    given: DiffusionFile = file.diffusion
    start, stop = given.min_timestep_boundary, given.max_timestep_boundary
    has_fractions = start is not None or stop is not None
    section: dict[str, Any] = {name: getattr(given, name) for name in _DIFFUSION_SAME}
    try:
        found = resolve(
            expert=line.values.get("extra.expert", given.expert),
            boundary=line.values.get("extra.boundary", given.boundary),
            fractions=(start or 0.0, 1.0 if stop is None else stop) if has_fractions else None,
            task=file.task,
            shift=given.shift,
            steps=given.num_train_timesteps,
        )
    except ConfigError as error:
        report.fail(error.message, document, ("diffusion", "max_timestep_boundary"), error.fix)
        report.suspects.add("diffusion")
        return section
    if has_fractions and found.boundary is not None:
        report.note(f"timestep boundaries {start or 0:g}..{1.0 if stop is None else stop:g} at shift {given.shift:g} "
                    f"are the {found.expert} expert, boundary {found.boundary:g}")  # fmt: skip
    return {**section, **found.section()}


# ---- flags ---------------------------------------------------------------------------------------------------


def _apply_flags(tree: dict[str, Any], line: CommandLine, report: Report) -> None:
    """Write flag values over the files' values; paths become absolute."""
    for target, value in line.values.items():
        section, _, rest = target.partition(".")
        if section in ("files", "extra"):
            continue
        if target in _PATH_TARGETS:
            value = _flag_path(value, target, line, report)
        node = tree.setdefault(section, {})
        *parents, leaf = rest.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value


_PATH_TARGETS = ("checkpoint.load", "checkpoint.save", "checkpoint.load_base_model", "logging.tensorboard_dir",
                 "validation.prompts", "validation.other_expert")


def _bad_flag(message: str, report: Report, fix: str | None = None) -> None:
    report.errors.append(ConfigError(message, where="command line", fix=fix))


def _flag_path(value: str, target: str, line: CommandLine, report: Report) -> str | None:
    flag = line.flag_of[target]
    if not value.strip():
        _bad_flag(f"{flag} is empty", report)
    elif is_placeholder(value):
        _bad_flag(f"{flag}: the path {value!r} was not filled in", report, "put the real path there")
    else:
        return resolve_path(value, None)
    report.suspects.add(target.partition(".")[0])
    return None


def _derive(tree: dict[str, Any], line: CommandLine, report: Report, model_dtype: str | None) -> None:
    """Work out the values that need more than one flag."""
    extra = {name.split(".", 1)[1]: value for name, value in line.values.items() if name.startswith("extra.")}
    _derive_precision(tree, extra, report, model_dtype)
    _derive_lengths(tree, extra, report)
    _derive_lora(tree, extra, report)
    parallel = tree.setdefault("parallel", {})
    if extra.get("virtual_pipeline", 1) != 1:  # launchers pass VP=1, which is no virtual pipeline
        parallel["virtual_pipeline"] = extra["virtual_pipeline"]
    _derive_chunks(tree, extra, report)
    if extra.get("optimizer") == "adam8bit":
        tree.setdefault("optimizer", {})["name"] = "adam8bit"
    selection = extra.get("optimizer_selection")
    tree.setdefault("optimizer", {})["fused"] = bool(selection and selection.startswith("fused"))
    if "files.model" not in line.values and ("expert" in extra or "boundary" in extra):
        fix = "the range of an expert depends on the task and shift of the model file"
        _bad_flag("--expert and --boundary need --mm-model", report, fix)
    if "expert_ranks" in extra:
        _bad_flag("--expert-ranks divides the ranks between two experts, but one is trained", report,
                  "add --expert both, or leave it out")


def _derive_chunks(tree: dict[str, Any], extra: dict[str, Any], report: Report) -> None:
    """Turn Megatron's blocks per chunk into chunks per stage."""
    size, parallel = extra.get("layers_per_chunk"), tree["parallel"]
    layers = tree.get("model", {}).get("wan", {}).get("num_layers")
    if size is None or layers is None:
        return
    stages = parallel.get("pipeline", 1)
    if size < 1 or layers % (stages * size):
        _bad_flag(f"--num-layers-per-virtual-pipeline-stage {size} does not divide {layers} blocks of {stages} stages",
                  report, "use a divisor, or --virtual-pipeline-model-parallel-size")
    elif parallel.get("virtual_pipeline", layers // (stages * size)) != layers // (stages * size):
        _bad_flag(f"--num-layers-per-virtual-pipeline-stage {size} is {layers // (stages * size)} chunks per stage, "
                  f"not {parallel['virtual_pipeline']}", report, "give one of the two flags")
    elif layers > stages * size:
        parallel["virtual_pipeline"] = layers // (stages * size)


def _derive_precision(tree: dict[str, Any], extra: dict[str, Any], report: Report, model_dtype: str | None) -> None:
    """Settle one compute type: flag, then the FSDP2 file, then predictor.dtype, then fp32."""
    fsdp2 = tree.get("fsdp2", {})
    asked = extra.get("precision")
    uses_fsdp2 = tree.get("parallel", {}).get("use_torch_fsdp2", False)
    in_file = fsdp2.get("param_dtype") if uses_fsdp2 else None
    precision = asked or in_file or model_dtype or "fp32"
    if asked and in_file and asked != in_file:
        report.note(f"--{asked} overrides param_dtype {in_file} of the FSDP2 file")
    tree.setdefault("training", {})["precision"] = precision
    if fsdp2.get("param_dtype"):
        fsdp2["param_dtype"] = precision


def _derive_lengths(tree: dict[str, Any], extra: dict[str, Any], report: Report) -> None:
    """Turn lengths given in clips or as a fraction into iterations."""
    training, optimizer = tree.setdefault("training", {}), tree.setdefault("optimizer", {})
    in_samples = {"train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"} & extra.keys()
    batch = training.get("global_batch_size")
    if in_samples and not batch:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(in_samples))
        _bad_flag(f"{names} needs --global-batch-size", report)
        in_samples = set()
    if "train_samples" in in_samples:
        if "train_iters" in training:
            _bad_flag("--train-iters and --train-samples both say how long", report, "keep one of them")
        else:
            training["train_iters"] = -(-extra["train_samples"] // batch)
    for name, target in (("lr_decay_samples", "decay_iters"), ("lr_warmup_samples", "warmup_iters"),
                         ("lr_wsd_decay_samples", "wsd_decay_iters")):  # fmt: skip
        if name in in_samples:
            optimizer[target] = extra[name] / batch
    if "lr_warmup_fraction" in extra:
        if optimizer.get("warmup_iters"):
            _bad_flag("--lr-warmup-fraction and a warm-up length are both given", report, "keep one of them")
        decay = optimizer.get("decay_iters") or training.get("train_iters", 1)
        optimizer["warmup_iters"] = extra["lr_warmup_fraction"] * decay


def _derive_lora(tree: dict[str, Any], extra: dict[str, Any], report: Report) -> None:
    targets, ranks = extra.get("lora_target_modules"), extra.get("lora_rank_pattern")
    if targets:
        tree.setdefault("lora", {})["target_modules"] = tuple(dict.fromkeys(targets))
    if ranks:
        pattern = {}
        for entry in ranks:
            name, _, rank = entry.rpartition("=")
            if not name or not rank.isdigit() or int(rank) < 1:
                _bad_flag(f"--lora-rank-pattern {entry!r} is not NAME=RANK", report, "write it like ffn.0=64")
                report.suspects.add("lora")
                continue
            pattern[name] = int(rank)
        tree.setdefault("lora", {})["rank_pattern"] = pattern


# ---- result --------------------------------------------------------------------------------------------------


def _validate_tree(tree: dict[str, Any], line: CommandLine, report: Report) -> RunConfig | None:
    """Return the typed configuration; a value out of range is reported by its flag or key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            target = dotted(tuple(part for part in item["loc"] if isinstance(part, int | str)))
            flag = line.flag_of.get(target)
            message = f"{flag or target} = {item['input']}: {wanted_text(item)}"
            report.errors.append(ConfigError(message, where="command line" if flag else None))
            report.suspects.add(target.partition(".")[0])
    kept = {name: value for name, value in tree.items() if name not in report.suspects}
    try:
        return RunConfig.model_validate(kept)
    except ValidationError:
        return None
