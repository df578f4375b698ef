"""`mindspeed-wan import TOOL -- COMMAND`: another trainer's command line as our configuration and launcher."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.manifest import write_text_atomic
from mindspeed_wan.cli import diffsynth, videox
from mindspeed_wan.cli.import_job import STEPS, Job, architecture
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.config import PRESETS

_BARE_SCRIPT = 'bash "${{MINDSPEED_WAN_ROOT:-{root}}}/examples/wan2.2/common/launch.sh" pretrain'

MERGED = "$HERE/base"
"""Where the launcher puts weights with an adapter merged into them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tools whose commands are understood."""
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, (_, text, script) in TOOLS.items():
        tool = tools.add_parser(name, help=text)
        tool.add_argument("--out", type=Path, default=Path("imported"), metavar="DIR",
                          help="folder for model.json, data.json, fsdp2.yaml and train.sh")
        tool.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND",
                          help=f"the words after {script}, or the whole accelerate launch line")


def run(args: argparse.Namespace) -> int:
    """Write the files and say what differs."""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise ConfigError("no command", fix=f"mindspeed-wan import {args.tool} -- accelerate launch ... train.py --...")
    job = TOOLS[args.tool][0](words)
    steps = _iterations(job)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {"model.json": json.dumps(model_file(job), indent=4) + "\n",
             "data.json": json.dumps(data_file(job), indent=4) + "\n", "fsdp2.yaml": FSDP2,
             "train.sh": launcher(job, steps)}
    for name, text in files.items():
        write_text_atomic(args.out / name, text)
    (args.out / "train.sh").chmod(0o755)
    what = f"LoRA of rank {job.lora['r']}" if job.lora else "full fine-tuning"
    print(f"{what} of the {job.expert.expert}-noise expert of Wan2.2 {job.task.upper()} A14B from {job.weights}")
    for warning in job.warnings:
        print(f"warning: {warning}")
    print(f"wrote {args.out}/{{{','.join(files)}}}; start it with: bash {args.out}/train.sh")
    return 0


FSDP2 = """sharding_size: auto
sub_modules_to_wrap: ["predictor.blocks.{*}", predictor.head]
param_dtype: bf16
reduce_dtype: fp32
recompute_modules: ["predictor.blocks.{*}"]
"""


def model_file(job: Job) -> dict[str, Any]:
    """Return the model file: the expert's range by name, the other trainer's way of drawing and weighting noise."""
    wan = architecture(job.weights) or PRESETS[f"{job.task}-A14B"]
    condition = {} if job.conditioning is None else {"i2v_processor": {"conditioning": job.conditioning}}
    return {
        "task": job.task, "load_video_features": False, "load_text_features": False, "encoder_offload_interval": 8,
        "diffusion": {
            "model_id": "wan_flow_match_scheduler", "num_train_timesteps": STEPS,
            "expert": job.expert.expert, "boundary": job.expert.boundary, **job.diffusion,
        },
        "predictor": {
            "model_id": "wandit", "model_type": f"wan2.2-{job.task}", "dtype": "bf16", "in_dim": wan.in_channels,
            "out_dim": wan.out_channels, "hidden_size": wan.dim, "ffn_dim": wan.ffn_dim, "freq_dim": wan.freq_dim,
            "text_dim": wan.text_dim, "text_len": wan.text_len, "num_heads": wan.num_heads,
            "num_layers": wan.num_layers, "patch_size": list(wan.patch_size),
        },
        "ae": {"model_id": "wan_video_vae", "from_pretrained": _absolute(job.vae), "dtype": "fp32", **condition},
        "text_encoder": {"model_id": "UMT5", "from_pretrained": _absolute(job.text_encoder), "dtype": "bf16"},
    }


def data_file(job: Job) -> dict[str, Any]:
    """Return the data file; the metadata table is read as it is."""
    height, width = job.size or (None, None)
    sizes = {"max_height": height, "max_width": width, "force_resolution": True} if job.size else {
        "max_hxw": job.max_pixels, "force_resolution": False}
    return {"dataset_param": {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": _absolute(job.data), "data_folder": _absolute(job.data_folder)},
        "preprocess_parameters": {"num_frames": job.num_frames, "frame_interval": job.frame_interval, "hw_stride": 16,
                                  "cfg": job.caption_dropout, **sizes},
        "tokenizer_config": {"from_pretrained": _absolute(job.tokenizer), "model_max_length": 512},
    }}


def launcher(job: Job, iterations: int | None) -> str:
    """Return the script: variables that can still be set from outside, over the common launcher."""
    weights, merge = _base(job)
    variables = {
        "MM_MODEL": "$HERE/model.json", "MM_DATA": "$HERE/data.json", "FSDP_CONFIG": "$HERE/fsdp2.yaml",
        "LOAD_PATH": weights, "SAVE_PATH": _absolute(job.output), "LR": f"{job.learning_rate:g}",
        "WEIGHT_DECAY": f"{job.weight_decay:g}", "CLIP_GRAD": f"{job.clip_grad:g}",
        "MBS": str(job.micro_batch) if job.micro_batch > 1 else None,
        "SEED": str(job.seed) if job.seed is not None else None, "GRAD_ACC_STEP": str(job.accumulation),
        "TRAIN_ITERS": str(iterations) if iterations else None,
        "SAVE_INTERVAL": str(job.save_steps) if job.save_steps else None,
        "NPROC_PER_NODE": str(max(1, job.processes // job.machines)) if job.processes else None,
        "NNODES": str(job.machines) if job.machines > 1 else None,
        "NUM_WORKERS": str(job.workers) if job.workers else None,
    }
    exports = [f'export {name}="${{{name}:-{value}}}"' for name, value in variables.items() if value is not None]
    flags = list(job.flags)
    if job.lora:
        flags += ["--lora-r", str(job.lora["r"]), "--lora-alpha", str(job.lora["alpha"]), "--lora-target-modules",
                  job.lora["targets"], "--lora-format", job.lora_format]
    if job.lora_checkpoint is not None:
        flags += ["--load-base-model", weights, "--load", _absolute(job.lora_checkpoint)]
        exports = [line for line in exports if "LOAD_PATH" not in line]
    root = Path(__file__).resolve().parents[2]
    start = _BARE_SCRIPT.format(root=root)
    return "\n".join(["#!/usr/bin/env bash", "# Made by mindspeed-wan import.", "set -euo pipefail",
                      'HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)', *merge, *exports,
                      f'exec {start} {shlex.join(flags)} "$@"'.replace(shlex.quote(MERGED), f'"{MERGED}"'), ""])


def _base(job: Job) -> tuple[str, list[str]]:
    """Return the weights the run starts from, and the lines that make them where an adapter goes into them first."""
    if job.base_lora is None:
        return _absolute(job.weights), []
    words = ["mindspeed-wan", "lora", "merge", "--base", _absolute(job.weights), "--lora", _absolute(job.base_lora),
             "--model", f"{job.task}-A14B"]
    return MERGED, ["# The weights with the adapter that the command fuses into them.",
                    f'[[ -d {MERGED} || -n ${{LOAD_PATH:-}} ]] || {shlex.join(words)} --out "{MERGED}"']


def _iterations(job: Job) -> int | None:
    """Return optimizer steps: the command's epochs over the table's rows."""
    from mindspeed_wan.data.manifest import load
    from mindspeed_wan.errors import DataError

    try:
        rows = len(load(job.data, job.data_folder, check_files=False))
    except DataError as error:
        job.warnings.append(f"the length is not known because {job.data} cannot be read ({error.message}); set "
                            "TRAIN_ITERS")
        return None
    if job.processes is None:
        job.warnings.append("the number of processes is not known; the length is for 8")
    per_epoch = math.ceil(rows * job.repeat / (job.processes or 8) / job.micro_batch)
    return max(1, per_epoch * job.epochs // job.accumulation)


def _absolute(path: Path | None) -> str:
    return "" if path is None else str(path.expanduser().absolute())


TOOLS: dict[str, tuple[Callable[[Sequence[str]], Job], str, str]] = {
    "diffsynth": (diffsynth.understand, "DiffSynth-Studio's train.py for Wan2.2 A14B, LoRA or full", "train.py"),
    "videox-fun": (videox.understand, "VideoX-Fun's train_lora.py or train.py for Wan2.2 A14B and Fun-InP",
                   "train_lora.py"),
}
"""Tool -> (what reads its command, help, its script)."""
