"""What a DiffSynth-Studio training command for Wan2.2 A14B means, in this package's terms.

``understand`` reads the words after ``train.py`` (or a whole ``accelerate launch`` line) and returns a ``Job``; where
the command does something else than it says, the job follows what it says and a warning tells the difference.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mindspeed_wan.cli.import_job import STEPS, ImportParser, Job, processes, whole_frames
from mindspeed_wan.config.expert_range import OFFICIAL_BOUNDARY, from_fractions
from mindspeed_wan.errors import ConfigError

SHIFT = 5.0
"""DiffSynth trains every Wan model on 1000 indices at shift 5."""
INDEX = {"t2v": 0.417, "i2v": 0.358}
"""Where the experts part, as DiffSynth counts: a fraction of the indices, from the noisy end."""
_DIFFSYNTH_MODELS = Path("models")
_FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}


def _parser() -> ImportParser:
    parser = ImportParser("DiffSynth")
    add = parser.add_argument
    for name in ("dataset_base_path", "dataset_metadata_path", "output_path"):
        add(f"--{name}", required=True)
    for name in ("model_paths", "model_id_with_origin_paths", "tokenizer_path", "trainable_models", "lora_base_model",
                 "lora_checkpoint", "extra_inputs", "resume_from_checkpoint", "fp8_models", "offload_models",
                 "quant_options", "remove_prefix_in_ckpt", "audio_processor_path", "config_file", "mixed_precision",
                 "preset_lora_path", "preset_lora_model"):
        add(f"--{name}")
    add("--data_file_keys", default="image,video")
    add("--lora_target_modules", default="q,k,v,o,ffn.0,ffn.2")
    add("--task", default="sft")
    for name, default in (("height", None), ("width", None), ("num_frames", 81), ("max_pixels", 1024 * 1024),
                          ("dataset_repeat", 1), ("dataset_num_workers", 0), ("num_epochs", 1), ("lora_rank", 32),
                          ("gradient_accumulation_steps", 1), ("save_steps", None), ("num_processes", None)):
        add(f"--{name}", type=int, default=default)
    for name, number in (("learning_rate", 1e-4), ("weight_decay", 0.01), ("max_timestep_boundary", 1.0),
                          ("min_timestep_boundary", 0.0)):
        add(f"--{name}", type=float, default=number)
    for name in ("use_gradient_checkpointing", "use_gradient_checkpointing_offload", "find_unused_parameters",
                 "initialize_model_on_cpu", "enable_model_cpu_offload", "framewise_decoding"):
        add(f"--{name}", action="store_true")
    return parser


def understand(words: Sequence[str]) -> Job:
    """Return the job of a command line.

    Raises:
        ConfigError: not DiffSynth's words, another model or method, or no boundary that says which expert it is.
    """
    script = next((i for i, word in enumerate(words) if word.endswith("train.py")), -1)
    before, after = list(words[: max(script, 0)]), list(words[script + 1 :])
    given = _parser().parse_args(after)
    warnings: list[str] = []
    _check_method(given, warnings)
    dits, others = _models(given)
    task = _task(given, [*dits, *others], warnings)
    expert = from_fractions(given.min_timestep_boundary, given.max_timestep_boundary, SHIFT, STEPS)
    if expert.expert is None:
        raise ConfigError("the command does not say which expert's timesteps are trained",
                          fix=f"add --max_timestep_boundary {INDEX[task]} (high) or --min_timestep_boundary "
                              f"{INDEX[task]} (low)")
    if expert.boundary != OFFICIAL_BOUNDARY[task]:
        warnings.append(f"the command parts the experts at sigma {expert.boundary:g}; {task.upper()} A14B changes from "
                        f"one to the other at {OFFICIAL_BOUNDARY[task]:g}, which is {INDEX[task]} in DiffSynth's terms")
    total, machines = processes(before, warnings)
    return Job(
        task=task, expert=expert, weights=_weights(given, dits, expert.expert, warnings),
        vae=next((p for p in others if "VAE" in p.name), None),
        text_encoder=next((p for p in others if "t5" in p.name.lower()), None),
        tokenizer=Path(given.tokenizer_path) if given.tokenizer_path else _tokenizer(others),
        data=Path(given.dataset_metadata_path), data_folder=Path(given.dataset_base_path),
        num_frames=whole_frames(given.num_frames, warnings), size=_size(given, warnings), max_pixels=given.max_pixels,
        lora=None if given.lora_base_model is None else {
            "r": given.lora_rank, "alpha": given.lora_rank, "targets": given.lora_target_modules},
        lora_checkpoint=Path(given.lora_checkpoint) if given.lora_checkpoint else None,
        learning_rate=given.learning_rate, weight_decay=given.weight_decay, epochs=given.num_epochs,
        repeat=given.dataset_repeat, accumulation=given.gradient_accumulation_steps, save_steps=given.save_steps,
        output=Path(given.output_path), processes=total, machines=machines, workers=given.dataset_num_workers,
        diffusion={"shift": SHIFT, "weighting": "mm", "normalize_weighting": False, "grid": "index"},
        lora_format="diffsynth", base_lora=Path(given.preset_lora_path) if given.preset_lora_path else None,
        warnings=warnings,
    )


def _check_method(given: argparse.Namespace, warnings: list[str]) -> None:
    if given.task not in ("sft", "sft:train"):
        raise ConfigError(f"--task {given.task} is not imported", fix="sft is; caches: mindspeed-wan features")
    if given.lora_base_model is None and given.trainable_models is None:
        raise ConfigError("nothing is trained", fix="give --lora_base_model dit or --trainable_models dit")
    for name in ("trainable_models", "lora_base_model"):
        value = getattr(given, name)
        if value is not None and value not in ("dit", "dit2"):
            raise ConfigError(f"--{name} {value} is not imported", fix="dit and dit2 are")
    extra = set((given.extra_inputs or "").split(",")) - {"", "input_image"}
    if extra:
        raise ConfigError(f"--extra_inputs {','.join(sorted(extra))} is not imported",
                          fix="input_image (image to video) is")
    trained = given.lora_base_model or given.trainable_models
    if given.preset_lora_path and (given.preset_lora_model or trained) != trained:
        raise ConfigError(f"--preset_lora_model {given.preset_lora_model} is not the model that is trained ({trained})",
                          fix="leave --preset_lora_path out: the other expert is not loaded here")
    for name in ("audio_processor_path", "framewise_decoding"):
        if getattr(given, name):
            raise ConfigError(f"--{name} belongs to another model", fix="only Wan2.2 T2V and I2V A14B are imported")
    columns = set(given.data_file_keys.split(",")) - {"", "image", "video", "input_image"}
    if columns:
        warnings.append(f"--data_file_keys {','.join(sorted(columns))}: these columns of the table are not read")
    for name in ("fp8_models", "quant_options"):
        if getattr(given, name):
            warnings.append(f"--{name} {getattr(given, name)} is left out: the base is bf16 and sharded; "
                            "start train.sh with --base-dtype fp8 or int8 to hold it in 8 bits")
    if given.resume_from_checkpoint:
        warnings.append("--resume_from_checkpoint is left out: a run here goes on by itself; set LOAD_PATH to start "
                        "from other weights")
    warnings.append("DiffSynth trains the first 5 steps at a third of the learning rate; here it is constant")


def _models(given: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Return (DiT folders in loading order, other files)."""
    paths = [Path(shards[0]) for shards in _model_paths(given.model_paths)] if given.model_paths else []
    for entry in (given.model_id_with_origin_paths or "").split(","):
        if entry:
            model, _, pattern = entry.partition(":")
            paths.append(_DIFFSYNTH_MODELS / model / pattern)
    dits = [path.parent for path in paths if "diffusion_pytorch_model" in path.name]
    return dits, [path for path in paths if "diffusion_pytorch_model" not in path.name]


def _model_paths(text: str) -> list[list[str]]:
    """Return the shards of every model of ``--model_paths``."""
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    models = [entry if isinstance(entry, list) else [entry] for entry in entries] if isinstance(entries, list) else []
    if not models or not all(shards and all(isinstance(shard, str) for shard in shards) for shards in models):
        raise ConfigError(f"--model_paths {text} is no JSON list of models",
                          fix="write a list of files or of lists of shards")
    return models


def _task(given: argparse.Namespace, paths: Sequence[Path], warnings: list[str]) -> str:
    names = " ".join(map(str, paths))
    if re.search(r"Fun|VACE|Animate|S2V|5B|2\.1-", names):
        raise ConfigError("only Wan2.2 T2V and I2V A14B are imported", where=names[:200])
    conditioned = "input_image" in (given.extra_inputs or "")
    if "I2V" in names and not conditioned:
        warnings.append("without --extra_inputs input_image DiffSynth gives I2V weights no image; here every clip's "
                        "first frame is the image")
    return "i2v" if "I2V" in names or conditioned else "t2v"


def _weights(given: argparse.Namespace, dits: Sequence[Path], expert: str, warnings: list[str]) -> Path:
    """Return the folder of the expert whose timesteps are trained; warn where the command trains the other one.

    DiffSynth calls the first DiT in loading order ``dit`` and the second ``dit2``, whatever they are.
    """
    if not dits:
        raise ConfigError("no DiT among the models",
                          fix="name .../high_noise_model/diffusion_pytorch_model*.safetensors")
    place = {"dit": 0, "dit2": 1}[given.lora_base_model or given.trainable_models]
    if place >= len(dits):
        raise ConfigError("dit2 is trained, but only one DiT is loaded")
    trained = _expert_of(dits[place])
    if trained is None:
        warnings.append(f"{dits[place]} does not say which expert it is; it is taken for the {expert}-noise one")
        return dits[place]
    if trained != expert:
        warnings.append(
            f"the command trains the {trained.upper()}-noise expert's weights ({dits[place].name} is loaded "
            f"{'first' if place == 0 else 'second'}) on {expert.upper()}-noise timesteps. Here the {expert}-noise "
            "expert is trained on them")
    if len(dits) > 1:
        warnings.append("the command holds both experts in memory; here only the trained one is loaded")
    own = next((folder for folder in dits if _expert_of(folder) == expert), None)
    return own or Path(str(dits[place]).replace(_FOLDERS[trained], _FOLDERS[expert]))


def _expert_of(folder: Path) -> str | None:
    return next((name for name, part in _FOLDERS.items() if part in folder.parts), None)


def _tokenizer(others: Sequence[Path]) -> Path | None:
    t5 = next((path for path in others if "t5" in path.name.lower()), None)
    return None if t5 is None else t5.parent / "google" / "umt5-xxl"


def _size(given: argparse.Namespace, warnings: list[str]) -> tuple[int, int] | None:
    if given.height is None or given.width is None:
        if (given.height, given.width) != (None, None):
            warnings.append("--height and --width only count together; clips keep their shape up to --max_pixels")
        return None
    size = given.height // 16 * 16, given.width // 16 * 16
    if size != (given.height, given.width):
        warnings.append(f"{given.height}x{given.width} is not a multiple of 16; {size[0]}x{size[1]} is trained")
    return size
