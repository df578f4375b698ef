"""What a VideoX-Fun training command for Wan2.2 A14B (T2V, I2V, Fun-InP) means, in this package's terms.

``understand`` reads the words after ``train_lora.py`` or ``train.py`` (or a whole ``accelerate launch`` line) and
returns a ``Job``; where VideoX-Fun does something else than the command says, a warning tells the difference.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mindspeed_wan.cli.import_job import ImportParser, Job, architecture, processes, whole_frames
from mindspeed_wan.config.expert_range import OFFICIAL_BOUNDARY, ExpertRange
from mindspeed_wan.errors import ConfigError

SHIFT = {"t2v": 12.0, "i2v": 5.0}
"""Flow shift of VideoX-Fun's configuration files."""
CAPTION_DROPOUT = 0.1
_FOLDERS = {"high": ("high_noise_model", "transformer_2"), "low": ("low_noise_model", "transformer")}
"""Expert folders of the published weights, and of VideoX-Fun's own pipelines."""
_DECAY = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_NEEDLESS = ("gradient_checkpointing", "low_vram", "use_deepspeed", "use_fsdp", "save_state", "allow_tf32")
"""What FSDP2, recomputation and complete checkpoints do here without being asked."""
_LEFT_OUT = ("use_ema", "motion_sub_loss", "train_text_encoder", "resume_from_checkpoint", "transformer_path",
             "validation_prompts", "use_8bit_adam", "use_came", "weighting_scheme", "abnormal_norm_clip_start",
             "vae_mini_batch", "report_to", "tracker_project_name", "validation_epochs", "validation_steps")
_SWITCHES = ("enable_bucket", "random_hw_adapt", "training_with_video_token_length", "random_ratio_crop",
             "keep_all_node_same_token_length", "use_peft_lora", "enable_text_encoder_in_dataloader",
             "uniform_sampling", "random_frame_crop", "use_ema", "motion_sub_loss", "train_text_encoder",
             "use_8bit_adam", "use_came")


def _parser() -> ImportParser:
    parser = ImportParser("VideoX-Fun")
    add = parser.add_argument
    for name in ("pretrained_model_name_or_path", "train_data_meta", "boundary_type"):
        add(f"--{name}", required=True)
    for name in ("train_data_dir", "config_path", "target_name", "lora_skip_name", "transformer_path", "vae_path",
                 "resume_from_checkpoint", "mixed_precision", "report_to", "tracker_project_name", "weighting_scheme",
                 "validation_prompts", "abnormal_norm_clip_start"):
        add(f"--{name}")
    add("--output_dir", default="output_dir")
    add("--train_mode", default="normal")
    add("--lr_scheduler", default="constant", choices=tuple(_DECAY))
    add("--trainable_modules", nargs="+")
    add("--fix_sample_size", nargs=2, type=int)
    for name, default in (("image_sample_size", None), ("video_sample_size", 512), ("token_sample_size", 512),
                          ("video_sample_stride", 4), ("video_sample_n_frames", 17), ("train_batch_size", 1),
                          ("video_repeat", 1), ("gradient_accumulation_steps", 1), ("dataloader_num_workers", 0),
                          ("num_train_epochs", 100), ("max_train_steps", None), ("checkpointing_steps", 500),
                          ("checkpoints_total_limit", None), ("seed", None), ("vae_mini_batch", None), ("rank", 128),
                          ("validation_epochs", None), ("validation_steps", None), ("lr_warmup_steps", 0)):
        add(f"--{name}", type=int, default=default)
    for name, number in (("learning_rate", 1e-4), ("adam_weight_decay", 1e-2), ("adam_epsilon", 1e-8),
                         ("adam_beta1", 0.9), ("adam_beta2", 0.999), ("max_grad_norm", 1.0), ("network_alpha", 64.0),
                         ("motion_sub_loss_ratio", 0.25)):
        add(f"--{name}", type=float, default=number)
    for name in (*_NEEDLESS, *_SWITCHES):
        add(f"--{name}", action="store_true")
    return parser


def understand(words: Sequence[str]) -> Job:
    """Return the job of a command line.

    Raises:
        ConfigError: not VideoX-Fun's words, or another model or method.
    """
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    before, after = list(words[: max(script, 0)]), list(words[script + 1 :])
    name = Path(words[script]).name if script >= 0 else "train_lora.py"
    if name not in ("train.py", "train_lora.py"):
        raise ConfigError(f"{name} is not imported", fix="train.py and train_lora.py are")
    given = _parser().parse_args(after)
    warnings: list[str] = []
    root = Path(given.pretrained_model_name_or_path)
    expert = _expert(given, root)
    weights = _weights(root, expert)
    task = _task(given, weights)
    _warn(given, warnings)
    pixels = given.token_sample_size if given.training_with_video_token_length else given.video_sample_size
    total, machines = processes(before, warnings)
    return Job(
        task=task, expert=ExpertRange(expert, OFFICIAL_BOUNDARY[task]), weights=weights,
        vae=Path(given.vae_path) if given.vae_path else root / "Wan2.1_VAE.pth",
        text_encoder=root / "models_t5_umt5-xxl-enc-bf16.pth", tokenizer=root / "google" / "umt5-xxl",
        data=Path(given.train_data_meta), data_folder=Path(given.train_data_dir or Path(given.train_data_meta).parent),
        num_frames=whole_frames(given.video_sample_n_frames, warnings, "--video_sample_n_frames"),
        size=_fixed_size(given, warnings), max_pixels=pixels**2,
        lora=_lora(given) if name == "train_lora.py" else None, lora_checkpoint=None,
        learning_rate=given.learning_rate, weight_decay=given.adam_weight_decay, epochs=given.num_train_epochs,
        repeat=given.video_repeat, accumulation=given.gradient_accumulation_steps,
        save_steps=given.checkpointing_steps, output=Path(given.output_dir), processes=total, machines=machines,
        workers=given.dataloader_num_workers, diffusion={"shift": SHIFT[task], "weighting": "none"},
        lora_format="kohya2", conditioning={"mode": "masks"} if given.train_mode == "inpaint" else None,
        frame_interval=given.video_sample_stride, caption_dropout=CAPTION_DROPOUT, clip_grad=given.max_grad_norm,
        micro_batch=given.train_batch_size, seed=given.seed,
        flags=_flags(given), warnings=warnings,
    )


def _expert(given: argparse.Namespace, root: Path) -> str:
    if given.boundary_type == "full" or re.search(r"5B|Control|VACE|Animate|S2V|Camera", root.name):
        raise ConfigError("only the two experts of Wan2.2 A14B (T2V, I2V, Fun-InP) are imported",
                          where=f"{root.name}, --boundary_type {given.boundary_type}")
    if given.boundary_type not in _FOLDERS:
        raise ConfigError(f"--boundary_type {given.boundary_type} names no expert", fix="high or low")
    return str(given.boundary_type)


def _weights(root: Path, expert: str) -> Path:
    """Return the expert's folder: the one that is there, else the published name."""
    return next((root / name for name in _FOLDERS[expert] if (root / name).is_dir()), root / _FOLDERS[expert][0])


def _task(given: argparse.Namespace, weights: Path) -> str:
    """Return what the weights are by their channels; before they are downloaded, what the command says."""
    if given.train_mode not in ("normal", "inpaint", "i2v"):
        raise ConfigError(f"--train_mode {given.train_mode} is not imported", fix="normal, inpaint and i2v are")
    image = given.train_mode != "normal"
    wan = architecture(weights)
    if wan is not None and image != (wan.in_channels == 36):
        raise ConfigError(f"--train_mode {given.train_mode} on weights with {wan.in_channels} input channels",
                          where=str(weights), fix="inpaint and i2v are for 36 channels, normal for 16")
    return "i2v" if image else "t2v"


def _fixed_size(given: argparse.Namespace, warnings: list[str]) -> tuple[int, int] | None:
    if given.fix_sample_size is None:
        return None
    height, width = (side // 16 * 16 for side in given.fix_sample_size)
    if [height, width] != given.fix_sample_size:
        warnings.append(f"{given.fix_sample_size} are no multiples of 16; {height}x{width} is trained")
    return height, width


def _lora(given: argparse.Namespace) -> dict[str, object]:
    """Return rank, alpha and targets; without --target_name VideoX-Fun's own network takes every linear layer."""
    targets = given.target_name
    if targets is None:
        targets = "attention" if given.lora_skip_name == "ffn" else "all-linear"
    return {"r": given.rank, "alpha": given.network_alpha, "targets": targets}


def _flags(given: argparse.Namespace) -> tuple[str, ...]:
    """Return what the launcher has no variable for."""
    values = {"--adam-eps": given.adam_epsilon, "--adam-beta1": given.adam_beta1, "--adam-beta2": given.adam_beta2,
              "--lr-decay-style": _DECAY[given.lr_scheduler], "--lr-warmup-iters": given.lr_warmup_steps or None,
              "--keep-last": given.checkpoints_total_limit, "--train-iters": given.max_train_steps}
    return tuple(word for flag, value in values.items() if value is not None
                 for word in (flag, f"{value:g}" if isinstance(value, float) else str(value)))


def _warn(given: argparse.Namespace, warnings: list[str]) -> None:
    """Name what the command does other than it says, and what is left out."""
    if not given.uniform_sampling:
        warnings.append("without --uniform_sampling VideoX-Fun draws from all timesteps whatever --boundary_type says; "
                        f"here only the {given.boundary_type}-noise expert's are trained")
    if given.random_frame_crop or given.keep_all_node_same_token_length:
        warnings.append("with --random_frame_crop or --keep_all_node_same_token_length VideoX-Fun trains a quarter of "
                        "the frames (81 become 21); here all of them are trained")
    if given.lora_skip_name and given.target_name is None:
        warnings.append(f"--lora_skip_name {given.lora_skip_name}: here the linear layers of attention are adapted")
    if given.use_peft_lora:
        warnings.append("VideoX-Fun's --use_peft_lora files lose alpha; the files written here carry it")
    if given.target_name and {"k", "o"} & set(given.target_name.split(",")) and not given.use_peft_lora:
        warnings.append("VideoX-Fun's own network matches parts of names ('k' and 'o' match every block); here layers "
                        "are matched exactly")
    left = [f"--{name}" for name in _LEFT_OUT if getattr(given, name)]
    if left:
        warnings.append(f"left out: {', '.join(left)}; see pretrain_sora.py --help for --ema-decay, --load, "
                        "--optimizer and --validation-prompts")
    if given.trainable_modules not in (None, ["."]):
        raise ConfigError(f"--trainable_modules {' '.join(given.trainable_modules)} is not imported",
                          fix="all modules are trained, or a LoRA")
