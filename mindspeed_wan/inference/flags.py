"""The command line of ``inference_sora.py``: Wan's own flags, MindSpeed-MM's, and ours, into one ``GenerateOptions``.

Hyphens and underscores are the same in a flag's name. Every problem of a command line is reported at once; an unknown
flag gets the nearest known one. No torch here: a wrong flag answers in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import ConfigError, did_you_mean
from mindspeed_wan.inference.cache_options import CacheOptions, parse_coefficients
from mindspeed_wan.inference.guidance_options import GuidanceOptions, parse_sigmas, parse_steps
from mindspeed_wan.inference.lora_options import MEMORY_NAMES, PRESETS, LoraOptions
from mindspeed_wan.inference.options import GenerateOptions, parse_guidance, parse_size, read_lines
from mindspeed_wan.inference.quantize_options import QFLOAT8_MEMORY, QuantizeOptions
from mindspeed_wan.parallel.inference_layout import InferenceLayout, raise_problems
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions


def parse_bool(text: str) -> bool:
    """Read true/false, yes/no, on/off, 1/0 in any case."""
    word = text.lower()
    if word in ("true", "yes", "on", "1", "t", "y"):
        return True
    if word in ("false", "no", "off", "0", "f", "n"):
        return False
    raise ConfigError(f"{text!r} is not true or false")


def _parse_tile(text: str) -> tuple[int, int]:
    height, _, width = text.replace("x", ",").replace("*", ",").partition(",")
    return int(height), int(width or height)


@dataclass(frozen=True)
class Flag:
    """One flag: ``--name VALUE``; ``kind`` reads the value. ``many`` takes all words up to the next flag."""

    name: str
    field: str
    kind: Callable[[str], Any]
    help: str
    many: bool = False


_GROUPS: dict[str, tuple[Flag, ...]] = {
    "weights": (
        Flag("ckpt_dir", "ckpt_dir", Path, "Diffusers, original Wan, or high/ and low/ expert folder"),
        Flag("task", "task", str, "t2v-A14B, i2v-A14B, inp-A14B, t2v-14B, i2v-14B; read from the weights when absent"),
        Flag("load", "high_noise_ckpt", Path, "high-noise expert by itself (MM, DCP, safetensors)"),
        Flag("high_noise_ckpt", "high_noise_ckpt", Path, "the same as --load"),
        Flag("low_noise_ckpt", "low_noise_ckpt", Path, "low-noise expert by itself"),
        Flag("vae", "vae", Path, "VAE folder or Wan2.1_VAE.pth, when not in ckpt_dir"),
        Flag("text_encoder", "text_encoder", Path, "UMT5 folder or .pth file, when not in ckpt_dir"),
        Flag("tokenizer", "tokenizer", Path, "tokenizer folder, when not in ckpt_dir"),
        Flag("image_encoder", "image_encoder", Path, "CLIP of Wan2.1 I2V, when not in ckpt_dir"),
        Flag("mm_model", "mm_model", str, "MindSpeed-MM's inference_model.json; flags override it"),
    ),
    "what to make": (
        Flag("prompt", "prompts", str, "one prompt or several, each in quotes", many=True),
        Flag("prompt_file", "prompt_file", str, "text file with one prompt per line"),
        Flag("negative_prompt", "negative_prompt", str, "what to avoid; Wan's own text by default"),
        Flag("image", "images", str, "I2V: first frame, one for all prompts or one for each", many=True),
        Flag("last_image", "last_images", str, "I2V: last frame, likewise", many=True),
        Flag("start_frames", "start_frames", int, "I2V: frames taken from the start of --image CLIP.mp4"),
        Flag("size", "size", parse_size, "WIDTH*HEIGHT in pixels, multiples of 16; I2V keeps the image's shape"),
        Flag("frame_num", "num_frames", int, "frames, 4k+1"),
        Flag("fps", "fps", int, "frames per second of the mp4"),
        Flag("num_videos", "videos_per_prompt", int, "videos per prompt, with seeds base_seed, base_seed + 1 ..."),
        Flag("base_seed", "base_seed", int, "seed of each prompt's first video; -1 draws one"),
        Flag("noise", "noise", str, "ours (same on every device), diffusers (torch CPU generator) or official"),
        Flag("clean_prompts", "clean_prompts", parse_bool, "clean prompts as the official code does"),
        Flag("conditioning", "conditioning", str, "I2V: official, diffusers or videox"),
    ),
    "sampler": (
        Flag("sample_steps", "steps", int, "steps"),
        Flag("sample_shift", "shift", float, "flow shift"),
        Flag("sample_solver", "solver", str, "unipc, dpm++ or euler"),
        Flag("sigma_grid", "grid", str, "official, diffusers or diffsynth"),
        Flag("sample_guide_scale", "guidance", parse_guidance, "LOW,HIGH, or one scale for both experts"),
        Flag("boundary", "boundary", float, "sigma at which the experts change"),
        Flag("sample_preset", "preset", str, "lightx2v: 4 Euler steps without guidance, for distilled adapters"),
    ),
    "guidance at some steps only": (
        Flag("cfg_skip_ratio", "limits_skip_ratio", float, "share of the steps, at the end, without guidance"),
        Flag("cfg_sigmas", "limits_sigmas", parse_sigmas, "LOW,HIGH: guidance at LOW < sigma <= HIGH only"),
        Flag("cfg_steps", "limits_steps", parse_steps, "FIRST,END: guidance at steps FIRST to END - 1 only, from 0"),
        Flag("cfg_gate", "limits_gate", int, "from this step on, add the branches' last difference again"),
    ),
    "adapters (LoRA, any format)": (
        Flag("lora_path", "lora_low_paths", Path, "low-noise expert: one file or several", many=True),
        Flag("lora_weight", "lora_low_weights", float, "their weights, one for all or one for each", many=True),
        Flag("lora_high_path", "lora_high_paths", Path, "high-noise expert: one file or several", many=True),
        Flag("lora_high_weight", "lora_high_weights", float, "their weights, likewise", many=True),
        Flag("lora_merge", "lora_merge", parse_bool, "merge into the weights instead of computing beside them"),
        Flag("lora_alpha", "lora_alpha", float, "alpha of files that carry none (VideoX-Fun's PEFT files)"),
        Flag("lora_allow_unmatched", "lora_allow_unmatched", parse_bool, "leave out keys that match nothing in it"),
    ),
    "step cache": (
        Flag("step_cache", "cache_method", str, "none, teacache, magcache or taylorseer: reuse earlier changes"),
        Flag("cache_threshold", "cache_threshold", float, "teacache, magcache: larger is faster and worse"),
        Flag("cache_max_skips", "cache_max_skips", int, "magcache: most steps reused in a row"),
        Flag("cache_retention", "cache_retention", float, "magcache: share of each expert's first steps that compute"),
        Flag("cache_interval", "cache_interval", int, "taylorseer: compute every so many steps"),
        Flag("cache_order", "cache_order", int, "taylorseer: order of the extrapolation"),
        Flag("cache_table", "cache_table", Path, "magcache, teacache: what --calibrate_cache wrote"),
        Flag("cache_coefficients", "cache_coefficients", parse_coefficients, "teacache: a,b,c,d,e, or HIGH/LOW"),
        Flag("calibrate_cache", "cache_calibrate", Path, "measure this uncached run for both, write it here"),
    ),
    "ranks": (
        Flag("cfg_size", "cfg", int, "2 runs both guidance branches at the same time"),
        Flag("ulysses_size", "ulysses", int, "ranks that exchange heads"),
        Flag("ring_size", "ring", int, "ranks that pass keys and values on"),
        Flag("tensor_size", "tensor", int, "tensor-parallel ranks"),
        Flag("pipefusion", "pipefusion_on", parse_bool, "patches follow each other through the stages (approximate)"),
        Flag("pipefusion_patches", "pipefusion_patches", int, "pieces of the video's tokens (default: 2 per stage)"),
        Flag("pipefusion_warmup", "pipefusion_warmup", int, "whole steps at the start of each expert (default: 2)"),
        Flag("dit_fsdp", "dit_fsdp", parse_bool, "shard the DiT's weights over the ranks of a video"),
        Flag("t5_fsdp", "t5_fsdp", parse_bool, "shard the text encoder likewise"),
        Flag("vae_parallel", "vae_parallel", parse_bool, "exact VAE over the ranks of a video"),
        Flag("distributed_timeout_minutes", "timeout_minutes", float, "minutes a collective may wait"),
    ),
    "memory and precision": (
        Flag("device", "device", str, "npu, cuda or cpu"),
        Flag("dtype", "dtype", str, "bf16, fp32 or fp16"),
        Flag("vae_dtype", "vae_dtype", str, "bf16 or fp32"),
        Flag("text_dtype", "text_dtype", str, "precision of UMT5; the DiT's by default"),
        Flag("quantize", "quantize_dit", str, "hold the experts in 8 bits: fp8_weight_only, fp8_dynamic, "
             "int8_weight_only"),
        Flag("quantize_text_encoder", "quantize_text", str, "the same for UMT5"),
        Flag("quantize_keep", "quantize_keep", str, "block layers that stay as they are: blocks.0 ffn.2", many=True),
        Flag("memory", "memory", str, "auto, resident, sequential (one expert on the device) or block (stream blocks)"),
        Flag("gpu_memory_mode", "memory", str, "VideoX-Fun's names: model_full_load, model_cpu_offload ..."),
        Flag("attention", "attention", str, "auto, sdpa, torch_flash, torch_efficient, torch_math, cudnn, flash2, "
             "flash3, sage or npu"),
        Flag("compile", "compile_blocks", parse_bool, "torch.compile each block; the first step takes a minute or so"),
        Flag("offload_model", "offload_model", parse_bool, "true is --memory sequential, false is --memory resident"),
        Flag("t5_cpu", "t5_cpu", parse_bool, "encode prompts on the CPU"),
        Flag("vae_tile", "vae_tile_size", _parse_tile, "tile HEIGHT,WIDTH in latent pixels (30,52 as in DiffSynth)"),
        Flag("vae_tile_stride", "vae_tile_stride", _parse_tile, "tile stride in latent pixels (15,26)"),
    ),
    "output": (
        Flag("save_file", "save_file", Path, "OUT.mp4"),
        Flag("save_path", "save_path", Path, "folder for video_0.mp4, video_1.mp4 ..."),
        Flag("save_latents", "save_latents", Path, "OUT.safetensors: normalised latents before the VAE"),
        Flag("save_frames", "save_frames", parse_bool, "also a folder of PNG frames"),
        Flag("contact_sheet", "contact_sheet", parse_bool, "also one PNG with twelve frames"),
        Flag("resume", "resume", parse_bool, "skip videos that an earlier run with the same settings finished"),
        Flag("crf", "crf", int, "H.264 quality: 0 lossless, 18 default, 51 worst"),
    ),
    "MindSpeed-MM's spellings": (
        Flag("tensor_model_parallel_size", "tensor", int, "the same as --tensor_size"),
        Flag("context_parallel_size", "context", int, "ranks that share the tokens of a video"),
        Flag("context_parallel_algo", "context_algo", str, "ulysses_cp_algo, megatron_cp_algo (ring), hybrid_cp_algo"),
        Flag("ulysses_degree_in_cp", "ulysses_in_cp", int, "Ulysses part of a hybrid context group"),
        Flag("pipeline_model_parallel_size", "pipeline", int, "stages that each hold a part of the DiT's blocks"),
        Flag("bf16", "bf16", parse_bool, "--dtype bf16"),
        Flag("fp16", "fp16", parse_bool, "--dtype fp16"),
        Flag("seed", "base_seed", int, "the same as --base_seed"),
    ),
}
FLAGS: dict[str, Flag] = {flag.name: flag for group in _GROUPS.values() for flag in group}

# Flags that MindSpeed-MM's inference.sh carries because Megatron's parser insists on them, and Wan's own that say
# what is always so here. The value counts the words they take.
_INERT: dict[str, int] = {
    **dict.fromkeys(("lr", "min_lr", "train_iters", "micro_batch_size", "global_batch_size", "num_workers",
                     "adam_beta1", "adam_beta2", "adam_eps", "lr_decay_style", "weight_decay", "lr_warmup_init",
                     "lr_warmup_iters", "clip_grad", "attention_mask_type", "distributed_backend", "num_layers",
                     "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings", "tokenizer_type",
                     "vocab_size", "position_embedding_type", "rotary_base", "attention_dropout", "hidden_dropout",
                     "init_method_std", "log_interval", "save_interval", "eval_interval", "eval_iters", "mm_tool",
                     "ckpt_format", "normalization", "make_vocab_size_divisible_by",
                     "virtual_pipeline_model_parallel_size"), 1),
    **dict.fromkeys(("no_gradient_accumulation_fusion", "no_load_optim", "no_load_rng", "no_save_optim", "no_save_rng",
                     "finetune", "use_fused_rmsnorm", "use_fused_swiglu", "use_flash_attn", "use_mcore_models",
                     "untie_embeddings_and_output_weights", "use_distributed_optimizer", "overlap_grad_reduce",
                     "overlap_param_gather", "swiglu", "no_masked_softmax_fusion", "convert_model_dtype",
                     "sequence_parallel", "use_cpu_initialization", "bind_cpu"), 0),
}
_REFUSED = {
    "use_prompt_extend": "prompt extension needs a language model; write the long prompt yourself",
    "use_teacache": "step caches are set with --step_cache teacache (or magcache, taylorseer)",
}


def help_text() -> str:
    """Return the text of ``--help``."""
    lines = ["usage: inference_sora.py --ckpt_dir DIR --prompt TEXT [flags]",
             "       inference_sora.py --mm-model inference_model.json --load HIGH_EXPERT [flags]"]
    for title, flags in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  --{flag.name:<30}{flag.help}" for flag in flags)]
    return "\n".join(lines)


def parse(argv: Sequence[str], *, world_size: int | None = None) -> GenerateOptions:
    """Read a command line; ``world_size`` is the launcher's (``WORLD_SIZE``) by default.

    Raises:
        ConfigError: everything that is wrong with it, in one message.
    """
    problems: list[str] = []
    raw = _read_words(list(argv), problems)
    raise_problems(problems, fix="inference_sora.py --help lists every flag")
    values: dict[str, Any] = {}
    if "mm_model" in raw:
        from mindspeed_wan.inference.mm_file import read_inference_file

        values.update(read_inference_file(raw.pop("mm_model")))
    if "save_file" in raw:
        values.pop("save_path", None)
    if "prompt_file" in raw:
        values["prompts"] = (*raw.pop("prompts", ()), *read_lines(raw.pop("prompt_file"), "prompt"))
    layout = _layout(raw, world_size, problems)
    _memory(raw, problems)
    if cache := _prefixed(raw, "cache_"):
        values["cache"] = CacheOptions(**cache)
    if pipefusion := _prefixed(raw, "pipefusion_"):
        values["pipefusion"] = PipeFusionOptions(**pipefusion)
    if lora := _prefixed(raw, "lora_"):
        values["lora"] = LoraOptions(**lora)
    if limits := _prefixed(raw, "limits_"):
        values["guidance_limits"] = GuidanceOptions(**limits)
    quantize = {name[len("quantize_"):]: raw.pop(name) for name in list(raw) if name.startswith("quantize_")}
    if quantize:
        values["quantize"] = QuantizeOptions(**quantize)
    preset = raw.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        problems.append(f"--sample_preset {preset!r} is not known; use one of {', '.join(PRESETS)}")
    values.update(PRESETS.get(preset, {}))
    values.update(raw)
    raise_problems(problems)
    options = GenerateOptions(**values, layout=layout)
    options.check()
    return options


def _prefixed(raw: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take the values whose field starts with ``prefix`` out of ``raw``."""
    return {name[len(prefix):]: raw.pop(name) for name in list(raw) if name.startswith(prefix)}


def _read_words(words: list[str], problems: list[str]) -> dict[str, Any]:
    """Turn ``--name value`` and ``--name=value`` into field values."""
    raw: dict[str, Any] = {}
    ignored: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r} is not a flag; put texts with spaces in quotes")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            words.insert(0, value)
        name = name.lower() if name.lower() in FLAGS else name  # VideoX-Fun's GPU_memory_mode
        if name in _INERT:
            ignored.append(word)
            del words[: _INERT[name]]
        elif name in _REFUSED:
            problems.append(f"--{name}: {_REFUSED[name]}")
            del words[: 1 if words and not words[0].startswith("--") else 0]
        elif name in FLAGS:
            _read_value(FLAGS[name], words, raw, problems)
        else:
            hint = did_you_mean(name, tuple(FLAGS))
            problems.append(f"unknown flag --{name}" + (f"; {hint}" if hint else ""))
            while words and not words[0].startswith("--"):
                words.pop(0)
    if ignored and os.environ.get("RANK", "0") == "0":
        print(f"note: no effect when generating: {' '.join(ignored)}", flush=True)
    return raw


def _read_value(flag: Flag, words: list[str], raw: dict[str, Any], problems: list[str]) -> None:
    taken: list[str] = []
    while words and not words[0].startswith("--") and (flag.many or not taken):
        taken.append(words.pop(0))
    if not taken and flag.kind is parse_bool:
        taken = ["true"]
    if not taken:
        problems.append(f"--{flag.name} needs a value: {flag.help}")
        return
    try:
        parsed = [flag.kind(text) for text in taken]
    except ConfigError as error:
        problems.append(f"--{flag.name}: {error}" if flag.kind is parse_bool else str(error))
        return
    except ValueError:
        problems.append(f"--{flag.name} {' '.join(taken)}: not a valid {_kind_name(flag.kind)}")
        return
    raw[flag.field] = tuple(parsed) if flag.many else parsed[0]


def _kind_name(kind: Callable[[str], Any]) -> str:
    names = {int: "whole number", float: "number", parse_coefficients: "list of numbers", parse_sigmas: "LOW,HIGH",
             parse_steps: "FIRST,END"}
    return names.get(kind, "HEIGHT,WIDTH")  # type: ignore[call-overload]


def _layout(raw: dict[str, Any], world_size: int | None, problems: list[str]) -> InferenceLayout:
    world = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    context, algorithm = raw.pop("context", None), raw.pop("context_algo", "ulysses_cp_algo")
    ulysses_in_context = raw.pop("ulysses_in_cp", None)
    if context is not None:
        if "ulysses" in raw or "ring" in raw:
            problems.append("give --context_parallel_size, or --ulysses_size and --ring_size, not both")
        degrees = {"ulysses_cp_algo": context, "megatron_cp_algo": 1, "hybrid_cp_algo": ulysses_in_context}
        ulysses = degrees.get(algorithm)
        if not ulysses or context % ulysses:
            problems.append(f"--context_parallel_algo {algorithm} with --ulysses_degree_in_cp {ulysses_in_context} "
                            f"does not split --context_parallel_size {context}")
            ulysses = context
        raw.update(ulysses=ulysses, ring=context // ulysses)
    names = ("tensor", "ulysses", "ring", "cfg", "pipeline", "dit_fsdp", "t5_fsdp", "vae_parallel")
    return InferenceLayout(world_size=world, **{name: raw.pop(name) for name in names if name in raw})


def _memory(raw: dict[str, Any], problems: list[str]) -> None:
    """Fold Wan's and Megatron's switches into ``memory``, ``text_device``, ``dtype`` and ``vae_tile``."""
    if raw.get("memory") == QFLOAT8_MEMORY and raw.setdefault("quantize_dit", "fp8_weight_only")[:3] != "fp8":
        problems.append(f"memory mode {QFLOAT8_MEMORY} contradicts --quantize {raw['quantize_dit']}")
    if "memory" in raw:
        raw["memory"] = MEMORY_NAMES.get(raw["memory"], raw["memory"])
    offload = raw.pop("offload_model", None)
    if offload is not None:
        memory = "sequential" if offload else "resident"
        if raw.setdefault("memory", memory) not in (memory, "block" if offload else memory):
            problems.append(f"--offload_model {offload} contradicts --memory {raw['memory']}")
    if raw.pop("t5_cpu", False):
        raw["text_device"] = "cpu"
    for dtype in ("bf16", "fp16"):
        if raw.pop(dtype, False) and raw.setdefault("dtype", dtype) != dtype:
            problems.append(f"--{dtype} contradicts --dtype {raw['dtype']}")
    tile, stride = raw.pop("vae_tile_size", None), raw.pop("vae_tile_stride", None)
    if tile is not None:
        stride = stride or tuple(max(1, size // 2) for size in tile)
        raw["vae_tile"] = (*(8 * size for size in tile), *(8 * size for size in stride))
    elif stride is not None:
        problems.append("--vae_tile_stride needs --vae_tile")
