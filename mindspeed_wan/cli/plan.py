"""`mindspeed-wan plan`: memory, time and layouts of a job before it starts, and how it scales."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mindspeed_wan.errors import ConfigError, ResourceError, did_you_mean
from mindspeed_wan.models.wan.config import PRESETS, SAMPLING_DEFAULTS
from mindspeed_wan.models.wan.flops import latent_shape
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions
from mindspeed_wan.planning import joint_report, report
from mindspeed_wan.planning.devices import GB, GIB, Device, device
from mindspeed_wan.planning.devices import PRESETS as DEVICES
from mindspeed_wan.planning.job import EightBits, Job
from mindspeed_wan.planning.joint import JointPlan, plan_joint
from mindspeed_wan.planning.layouts import Layout, Refusal, Search, search
from mindspeed_wan.planning.scaling import scaling

SCALING_LIMIT = 4096
LEAST = {"devices": 1, "devices_per_node": 1, "lora": 0, "micro_batch_size": 1, "global_batch_size": 1, "steps": 1,
         "tp": 1, "cp": 1, "ulysses": 1, "pp": 1, "vp": 1, "shard": 0, "recompute": 0, "cfg": 1, "max_devices": 1,
         "pipefusion_patches": 1, "pipefusion_warmup": 1}
"""The smallest value of every whole number."""
HARDWARE = {"memory": ("memory", GIB), "tflops": ("peak_flops", 1e12), "intra": ("intra", GB), "inter": ("inter", GB)}
"""Flags that replace a preset's value: its field and unit."""
TRAINING_ONLY = ("lora", "base_dtype", "fp32_residual", "micro_batch_size", "global_batch_size", "ema",
                 "recompute_offload", "optimizer_cpu_offload", "optimizer", "features", "vp", "recompute",
                 "no_sp", "expert_ranks", "expert_iters", "scaling", "plot")
GENERATION_ONLY = ("steps", "cfg", "quantize", "memory_mode", "pipefusion", "pipefusion_patches", "pipefusion_warmup")
WEIGHT_ONLY: dict[str, EightBits] = {"fp8_weight_only": "fp8", "int8_weight_only": "int8"}
"""What of a generation's ``--quantize`` is planned: products in 8 bits (fp8_dynamic) have no fitted speed."""
MEMORY_MODES = {"auto": None, "resident": 2, "sequential": 1, "block": 0}
"""Experts on the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    what = parser.add_argument_group("the job")
    what.add_argument("--task", default="t2v-A14B", help=f"model: {', '.join(PRESETS)} (default t2v-A14B)")
    what.add_argument("--infer", action="store_true", help="plan a generation instead of training")
    what.add_argument("--size", default="480x832", help="height x width in pixels (default 480x832)")
    what.add_argument("--frames", type=int, default=81, help="frames of a clip, 4k+1 (default 81)")
    what.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank only")
    what.add_argument("--base-dtype", choices=("fp8", "int8"), help="with --lora: the frozen base in 8 bits")
    what.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    what.add_argument("--fp32-residual", action="store_true", help="keep the residual stream in fp32")
    what.add_argument("--micro-batch-size", type=int, default=1, help="clips per pass and data rank")
    what.add_argument("--global-batch-size", type=int, help="clips per optimizer step (default: one pass;"
                      " with pipeline stages 4 per stage)")
    what.add_argument("--ema", action="store_true", help="keep an average of the weights")
    what.add_argument("--recompute-offload", action="store_true", help="inputs of recomputed blocks in host memory")
    what.add_argument("--optimizer-cpu-offload", action="store_true", help="Adam's moments in host memory")
    what.add_argument("--optimizer", choices=("adamw", "adam8bit"), default="adamw", help="adam8bit: 8-bit moments")
    what.add_argument("--features", action="store_true", help="train from cached latents and text: no encoders")
    what.add_argument("--steps", type=int, help="denoising steps (default: the task's)")
    what.add_argument("--quantize", choices=tuple(WEIGHT_ONLY), help="with --infer: the experts' weights in 8 bits")
    what.add_argument("--memory-mode", choices=tuple(MEMORY_MODES), default="auto",
                      help="with --infer: all experts on the device, one, or two blocks of it (default: what fits)")
    what.add_argument("--pipefusion", action="store_true", help="with --infer and stages: patches follow each other")
    what.add_argument("--pipefusion-patches", type=int, help="its patches (default: two per stage)")
    what.add_argument("--pipefusion-warmup", type=int, default=PipeFusionOptions().warmup,
                      help="its whole steps at the start of each expert (default 2)")
    where = parser.add_argument_group("the devices")
    where.add_argument("--device", default="910B", help=f"preset: {', '.join(DEVICES)} (default 910B)")
    where.add_argument("--devices", type=int, default=8, help="how many (default 8)")
    where.add_argument("--expert-ranks", metavar="HIGH,LOW", help="both experts side by side: so many devices each,"
                       " even, or auto (the sensible split)")
    where.add_argument("--expert-iters", metavar="HIGH,LOW", help="with it: iterations of each (default: equal)")
    for name, unit in (("memory", "GiB"), ("tflops", "dense bf16 TFLOP/s"), ("intra", "GB/s to devices of the node"),
                       ("inter", "GB/s to other nodes"), ("devices-per-node", "devices that share the fast links")):
        where.add_argument(f"--{name}", type=int if name == "devices-per-node" else float, help=unit)
    fixed = parser.add_argument_group("fixed degrees (left out: the planner chooses)")
    for name, text in (("tp", "tensor parallel"), ("cp", "context parallel"), ("ulysses", "Ulysses part of it"),
                       ("pp", "pipeline stages, without FSDP2"), ("vp", "virtual chunks on each stage (training)"),
                       ("shard", "FSDP2 sharding size, 0: no FSDP2"), ("recompute", "blocks recomputed"),
                       ("cfg", "guidance branches on their own ranks, 1 or 2")):
        fixed.add_argument(f"--{name}", type=int, help=text)
    fixed.add_argument("--no-sp", action="store_true", help="tensor parallel without sequence parallel")
    output = parser.add_argument_group("output")
    output.add_argument("--scaling", action="store_true", help="weak and strong scaling of the best layout")
    output.add_argument("--max-devices", type=int, default=SCALING_LIMIT, help=f"its end (default {SCALING_LIMIT})")
    output.add_argument("--plot", type=Path, metavar="PNG", help="also plot the scaling")
    output.add_argument("--all", action="store_true", help="list every layout and every refusal")
    output.add_argument("--json", action="store_true", help="everything as JSON (bytes, seconds)")


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigError: sizes that no model or device has, or degrees that do not factor.
        ResourceError: no layout fits into the devices' memory.
    """
    _check_values(args)
    _check_purpose(args)
    job, wanted = _job(args), _search(args)
    if args.expert_ranks is not None:
        return _run_joint(args, job, wanted)
    if args.expert_iters is not None:
        raise ConfigError("--expert-iters without --expert-ranks", fix="say how the devices are divided: auto")
    plan = search(job, wanted)
    values = report.as_dict(plan)
    if not args.json:
        print(report.text(plan, everything=args.all))
    if plan.layouts:
        best = plan.layouts[0]
        if not args.json:
            start = report.start if job.training else report.start_generation
            print("", *start(best, args.task), sep="\n")
        if args.scaling or args.plot:
            values["scaling"] = _scaling(args, best)
    if args.json:
        print(json.dumps(values, indent=1))
    if not plan.layouts:
        raise _nothing_runs(args.devices, plan.refused)
    return 0


def _check_values(args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{value} is below {least}", where=_flag(name))
    for name in HARDWARE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{value:g} is not a positive number", where=_flag(name))
    if (args.scaling or args.plot) and args.max_devices < args.devices:
        raise ConfigError(f"{args.max_devices} is below the job's {args.devices} devices", where="--max-devices")
    blocks = PRESETS[args.task].num_layers if args.task in PRESETS else math.inf
    if args.recompute is not None and args.recompute > blocks:
        raise ConfigError(f"{args.recompute} is more than the model's {blocks} blocks", where="--recompute")


def _check_purpose(args: argparse.Namespace) -> None:
    """A flag that the plan would not read is refused."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    unread = [_flag(name) for name in (TRAINING_ONLY if args.infer else GENERATION_ONLY)
              if getattr(args, name) != parser.get_default(name)]
    if unread:
        what, fix = ("training", "leave --infer out, or these") if args.infer else ("a generation", "add --infer")
        raise ConfigError(f"{', '.join(unread)}: only for planning {what}", fix=fix)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run_joint(args: argparse.Namespace, job: Job, wanted: Search) -> int:
    if args.scaling or args.plot:
        raise ConfigError("--expert-ranks with --scaling or --plot: two jobs, which do not grow together",
                          fix="plan the scaling of one expert")
    if SAMPLING_DEFAULTS[args.task].boundary is None:
        raise ConfigError(f"{args.task} has one expert", where="--expert-ranks", fix="leave it out")
    plan: JointPlan = plan_joint(job, wanted, args.expert_ranks, _iterations(args.expert_iters))
    if args.json:
        print(json.dumps(joint_report.as_dict(plan), indent=1))
    else:
        print(joint_report.text(plan, everything=args.all))
        if plan.chosen.runs:
            print(*joint_report.start(plan, args.task), sep="\n")
    for part in plan.chosen.plans:
        if not part.layouts:
            raise _nothing_runs(sum(plan.chosen.sizes), part.refused)
    return 0


def _iterations(text: str | None) -> tuple[int, int]:
    words = ("1,1" if text is None else text).split(",")
    if len(words) != 2 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"'{text}' is not HIGH,LOW", where="--expert-iters", fix="for example 6000,3000")
    return int(words[0]), int(words[1])


def _nothing_runs(devices: int, refused: Sequence[Refusal]) -> ConfigError | ResourceError:
    """Return the error that names the refusal closest to running, which comes first."""
    if not refused:
        return ConfigError(f"no degrees divide {devices} devices", fix="leave a degree out")
    nearest = refused[0]
    if nearest.needs is not None:
        return ResourceError(f"nothing fits; what misses least, {nearest.name}, {nearest.reason}",
                             fix="use more --devices, a smaller --size or fewer --frames")
    return ConfigError(f"no layout of {devices} devices is legal: {nearest.reason}", fix="leave a degree out")


def _job(args: argparse.Namespace) -> Job:
    if args.task not in PRESETS:
        fix = f"{did_you_mean(args.task, tuple(PRESETS))} tasks: {', '.join(PRESETS)}".strip()
        raise ConfigError(f"'{args.task}' is not a task", where="--task", fix=fix)
    sampling = SAMPLING_DEFAULTS[args.task]
    chosen = _device(args)
    if args.optimizer_cpu_offload and args.optimizer == "adam8bit":
        raise ConfigError("--optimizer-cpu-offload with --optimizer adam8bit", fix="8-bit moments stay on the device")
    if args.base_dtype and not args.lora:
        raise ConfigError(f"--base-dtype {args.base_dtype} without --lora", fix="only a frozen base is held in 8 bits")
    return Job(
        model=PRESETS[args.task], latent=_latent(args), device=chosen, dims=ParallelDims(),
        training=not args.infer, precision=args.precision,
        fp32_residual=args.fp32_residual or args.infer,  # a generation always has it
        micro_batch=args.micro_batch_size, lora_rank=args.lora, ema=args.ema,
        base=args.base_dtype or WEIGHT_ONLY.get(args.quantize),
        encoders=not args.features, steps=args.steps or sampling.num_steps,
        experts_of_model=1 if sampling.boundary is None else 2,
        offload=args.recompute_offload,
        states="host" if args.optimizer_cpu_offload else "bytes" if args.optimizer == "adam8bit" else "device",
        kernels="npu" if chosen.name.startswith(("910", "A3")) else "cuda",
    )


def _device(args: argparse.Namespace) -> Device:
    given = {field: getattr(args, flag) * unit for flag, (field, unit) in HARDWARE.items()
             if getattr(args, flag) is not None}
    return device(args.device, per_node=args.devices_per_node, **given)


def _latent(args: argparse.Namespace) -> tuple[int, int, int]:
    height, separator, width = args.size.lower().replace("*", "x").partition("x")
    if not separator or not height.isdigit() or not width.isdigit():
        raise ConfigError(f"'{args.size}' is not HEIGHTxWIDTH", where="--size", fix="for example 720x1280")
    sizes = int(height), int(width)
    if any(size < 16 or size % 16 for size in sizes):
        raise ConfigError(f"{args.size}: both sides must be multiples of 16 pixels", where="--size")
    if args.frames < 1 or args.frames % 4 != 1:
        raise ConfigError(f"{args.frames} frames are not 4k+1", where="--frames",
                          fix=f"use {max(1, args.frames // 4 * 4 + 1)}")
    return latent_shape(args.frames, *sizes)


def _search(args: argparse.Namespace) -> Search:
    return Search(
        devices=args.devices, tensor=args.tp, context=args.cp, ulysses=args.ulysses,
        pipeline=args.pp, virtual=args.vp,
        sequence_parallel=False if args.no_sp else None, shard=args.shard, recomputed=args.recompute,
        global_batch=args.global_batch_size, cfg=args.cfg, experts=MEMORY_MODES[args.memory_mode],
        pipefusion=PipeFusionOptions(on=args.pipefusion, patches=args.pipefusion_patches,
                                     warmup=args.pipefusion_warmup),
    )


def _scaling(args: argparse.Namespace, best: Layout) -> dict[str, list[dict[str, float]]]:
    weak = scaling(best.job, args.max_devices, "weak")
    # Strong scaling starts from a batch that the largest number of devices can still divide.
    whole = best.job.with_changes(accumulation=best.job.accumulation * max(1, args.max_devices // args.devices))
    strong = scaling(whole, args.max_devices, "strong")
    if not args.json:
        for name, rows in (("weak", weak), ("strong", strong)):
            print(f"\n{name} scaling (simulated):", *report.scaling_table(rows), sep="\n")
    if args.plot is not None:
        report.plot_scaling(weak, strong, args.plot, f"{best.name} on {best.job.device.name}")
        if not args.json:
            print(f"plot: {args.plot}")
    return {"weak": [vars(row) for row in weak], "strong": [vars(row) for row in strong]}
