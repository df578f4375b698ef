"""A plan as text, as JSON and as plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import ResourceError
from mindspeed_wan.lora.spec import DEFAULT_TARGETS
from mindspeed_wan.planning.devices import GIB
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.layouts import Layout, Plan
from mindspeed_wan.planning.memory import plan_stage
from mindspeed_wan.planning.scaling import ScalingRow
from mindspeed_wan.planning.stages import bubble, held, on_a_rank, stages
from mindspeed_wan.planning.traffic import bytes_between_stages, collectives

SHOWN = 6
"""Layouts and refusals listed unless all are asked for."""
EXAMPLE_CLIP = (21, 60, 104)
"""Latent size of 81 frames of 480x832, which the examples' data files ask for."""


def text(plan: Plan, *, everything: bool = False) -> str:
    """Return the ranking, the details of the best layout, and the refusals."""
    lines: list[str] = []
    limit = None if everything else SHOWN
    if plan.layouts:
        lines += ["layouts, fastest first:", *ranking(plan.layouts[:limit]), "", *details(plan.layouts[0])]
    else:
        lines.append("no layout of these devices runs this job")
    if plan.refused:
        shown = plan.refused[:limit]
        lines += ["", f"refused ({len(plan.refused)}):", *(f"  {r.name}: {r.reason}" for r in shown)]
        if len(shown) < len(plan.refused):
            lines.append(f"  ... and {len(plan.refused) - len(shown)} more (--all)")
    return "\n".join(lines)


def ranking(layouts: Sequence[Layout]) -> list[str]:
    """Return a table with a line per layout."""
    training = bool(layouts) and layouts[0].job.training
    head = "clips/s" if training else "s/video"
    width = max(len(layout.name) for layout in layouts)
    lines = [f"  {'layout':<{width}}  {'GiB':>6}  {'s/step':>7}  {head:>8}  {'MFU':>5}  exposed"]
    for layout in layouts:
        time = layout.duration
        rate = f"{time.clips_per_second:8.3f}" if training else f"{time.total:8.1f}"
        lines.append(f"  {layout.name:<{width}}  {layout.memory.total / GIB:6.1f}  {time.step:7.2f}  {rate}"
                     f"  {time.mfu:4.0%}  {time.exposed / time.step:6.1%}")
    return lines


def details(layout: Layout) -> list[str]:
    """Return memory by part, time by part and bytes by collective of one layout."""
    memory, time, job = layout.memory, layout.duration, layout.job
    peak = memory.peak
    lines = [f"{layout.name}: {memory.total / GIB:.1f} of {job.device.memory / GIB:.0f} GiB per device, most at:"
             f" {peak.name}"]
    lines += _columns({**peak.parts, "fragmentation": memory.fragmentation * peak.tensors,
                       "runtime": memory.runtime}, GIB, "GiB")
    if memory.host:
        lines += _host_traffic(job)
        lines.append(f"page-locked host memory: {memory.host / GIB:.1f} GiB per device,"
                     f" {memory.host * min(job.device.per_node, job.dims.world_size) / GIB:.0f} GiB per node")
    if job.dims.pipeline > 1:
        lines += _stage_lines(layout)
    lines.append("time of one step")
    lines += _columns(time.parts, 1.0, "s")
    found = collectives(job)
    if found:
        lines.append("collectives (bytes of one call; calls per block, * per pass or step)")
        lines += [f"  {c.purpose:<36} {c.kind:<14} {c.phase:<8} x{c.calls}{' ' if c.per_block else '*'}"
                  f" {c.payload / 1e6:10.2f} MB  over {c.size} ranks" for c in found]
    return lines


def _host_traffic(job: Job) -> list[str]:
    """Return what comes from host memory during a generation."""
    if job.training:
        return []
    if job.takes_turns:
        return [f"from host memory: {on_a_rank(job, job.base_bytes) / 1e9:.1f} GB at each exchange of the experts"]
    return [f"from host memory: {job.branches * job.blocks * job.base_bytes.block / 1e9:.1f} GB per step"]


def _stage_lines(layout: Layout) -> list[str]:
    job = layout.job
    lines = [f"pipeline: {_passes(job)}, {idle_share(layout):.1%} of their time in the bubble,"
             f" {bytes_between_stages(job) / 1e9:.2f} GB sent per step and rank"]
    for stage in stage_rows(layout):
        lines.append(f"  stage {stage['stage']}: {'+'.join(map(str, stage['chunks']))} blocks,"
                     f" {stage['parameters'] / 1e9:.2f} G parameters, {stage['memory_bytes'] / GIB:.1f} GiB")
    return lines


def _passes(job: Job) -> str:
    if job.training:
        return f"{job.accumulation} micro-batches"
    passes = f"{job.branches} pass{'es' * (job.branches > 1)} per step"
    return passes if job.patches == 1 else f"{passes} in {job.patches} patches after {job.whole_steps} whole steps"


def idle_share(layout: Layout) -> float:
    """Return the share of a step's passes in which a stage stands still."""
    job, parts = layout.job, layout.duration.parts
    if job.training:
        return bubble(job.dims.pipeline, job.dims.virtual, job.accumulation)
    idle = parts["pipeline bubble"]
    return idle / (idle + sum(parts[name] for name in ("attention", "other compute", "repeated by patches")
                              if name in parts))


def stage_rows(layout: Layout) -> list[dict[str, Any]]:
    """Return blocks, parameters on one rank and bytes of every pipeline stage."""
    job = layout.job
    if job.dims.pipeline == 1:
        return []
    return [{"stage": stage.number, "chunks": list(stage.chunks), "parameters": held(job.sizes, stage),
             "memory_bytes": plan_stage(job, stage).total} for stage in stages(job)]


def _columns(parts: Mapping[str, float], unit: float, name: str) -> list[str]:
    shown = {key: value for key, value in parts.items() if value > 0}
    return [f"  {key:<26} {value / unit:9.3f} {name}" for key, value in shown.items()]


def scaling_table(rows: Sequence[ScalingRow]) -> list[str]:
    """Return one line per number of devices."""
    head = ("devices", 7), ("batch", 6), ("s/step", 7), ("clips/s", 9), ("MFU", 4), ("efficiency", 10), ("GiB", 6)
    lines = ["  " + "  ".join(f"{name:>{width}}" for name, width in head)]
    lines += [f"  {r.devices:7d}  {r.global_batch:6d}  {r.step_seconds:7.2f}  {r.clips_per_second:9.3f}  {r.mfu:4.0%}"
              f"  {r.efficiency:10.1%}  {r.memory / GIB:6.1f}" for r in rows]
    return lines


def as_dict(plan: Plan, *, everything: bool = True) -> dict[str, Any]:
    """Return a plan as JSON-ready values: bytes and seconds."""
    limit = None if everything else SHOWN
    return {"layouts": [layout_dict(layout) for layout in plan.layouts[:limit]],
            "refused": [{"name": refusal.name, "reason": refusal.reason, "needs_bytes": refusal.needs}
                        for refusal in plan.refused[:limit]]}


def layout_dict(layout: Layout) -> dict[str, Any]:
    """Return everything known about a layout as JSON-ready values."""
    job, memory, time = layout.job, layout.memory, layout.duration
    dims = job.dims
    staged = {"stages": stage_rows(layout), "bytes_between_stages": bytes_between_stages(job),
              "bubble": idle_share(layout)} if dims.pipeline > 1 else {}
    return {
        "name": layout.name,
        "tensor": dims.tensor, "sequence_parallel": dims.sequence_parallel, "context": dims.context,
        "ulysses": dims.ulysses_size, "ring": dims.ring, "data": dims.data,
        "pipeline": dims.pipeline, "virtual": dims.virtual, **staged, "base": job.base,
        "shard": dims.shard_size if job.fsdp2 else None,
        "recomputed_blocks": job.recomputed, "keep_attention": job.keep_attention,
        "offload": job.offload, "states": job.states, "host_bytes": memory.host,
        "accumulation": job.accumulation, "cfg": job.cfg, "experts_on_device": None if job.training else job.experts,
        "patches": job.patches, "whole_steps": None if job.training else job.whole_steps,
        "memory_bytes": memory.total, "memory_peak": memory.peak.name,
        "memory_moments": {moment.name: moment.parts for moment in memory.moments},
        "seconds": time.parts, "step_seconds": time.step, "total_seconds": time.total,
        "clips_per_second": time.clips_per_second, "mfu": time.mfu,
        "collectives": [{"purpose": c.purpose, "kind": c.kind, "phase": c.phase, "ranks": c.size, "calls": c.calls,
                         "per_block": c.per_block, "payload_bytes": c.payload, "sent_bytes": c.sent,
                         "seconds": c.seconds(job.device)} for c in collectives(job)],
    }


def start(layout: Layout, task: str, expert: str = "high", *, split: Sequence[str] = (),
          devices: int | None = None) -> list[str]:
    """Return how this layout is started with the launch scripts: the line, and what its files must say.

    Args:
        layout: the layout of one expert.
        task: a model preset.
        expert: ``high``, ``low`` or ``both``.
        split: variables that divide the ranks between both experts.
        devices: ranks of the job where they are more than the layout's.
    """
    job, dims = layout.job, layout.job.dims
    where, ranks = _nodes(job, devices or dims.world_size)
    words = [*ranks, *split, f"TP={dims.tensor}", f"CP={dims.context}"] + (["SP=1"] if dims.sequence_parallel else [])
    words += [f"PP={dims.pipeline}"] if dims.pipeline > 1 else []
    words += [f"VP={dims.virtual}"] if dims.virtual > 1 else []
    if dims.ring > 1:
        words.append("CP_ALGO=megatron_cp_algo" if dims.ulysses_size == 1
                     else f"CP_ALGO=hybrid_cp_algo ULYSSES_DEGREE={dims.ulysses_size}")
    words += [f"MBS={job.micro_batch}", f"GRAD_ACC_STEP={job.accumulation}"]
    words += ["PRECISION=fp32"] if job.precision == "fp32" else []
    if not job.fsdp2:
        words.append("FSDP_CONFIG=")
    words += [*_script(job, task, expert), *_flags(job)]
    return [f"start it{where}: {' '.join(words)}", *_file_lines(job)]


MODES = {2: "resident", 1: "sequential", 0: "block"}
"""``--memory`` of a generation by the experts on the device."""


def start_generation(layout: Layout, task: str) -> list[str]:
    """Return how a generation with this layout is started."""
    job, dims = layout.job, layout.job.dims
    frames, height, width = job.latent
    where, ranks = _nodes(job, dims.world_size)
    flags = {"--size": f"'{8 * width}*{8 * height}'", "--frame_num": 4 * frames - 3, "--sample_steps": job.steps,
             "--cfg_size": job.cfg, "--ulysses_size": dims.ulysses_size, "--ring_size": dims.ring,
             "--tensor_size": dims.tensor, "--pipeline_model_parallel_size": dims.pipeline}
    given = [f"{flag} {value}" for flag, value in flags.items() if value != 1 or flag == "--frame_num"]
    given += ["--dit_fsdp"] if job.fsdp2 else []
    given += ["--pipefusion", f"--pipefusion_patches {job.patches}", f"--pipefusion_warmup {job.warmup}"] \
        if job.patches > 1 else []
    given += [f"--quantize {job.base}_weight_only"] if job.base else []
    given += ["--dtype fp32"] if job.precision == "fp32" else []
    given.append(f"--memory {'resident' if job.experts == job.experts_of_model else MODES[job.experts]}")
    prompt = ["--prompt TEXT"] + (["--image FILE"] if task.startswith("i2v") else [])
    script = f"bash examples/wan2.2/A14B/{'i2v' if task.startswith('i2v') else 't2v'}/inference.sh"
    return [f"start it{where}: {' '.join([*ranks, script, '--ckpt_dir FOLDER', *given, *prompt])}"]


def _nodes(job: Job, devices: int) -> tuple[str, list[str]]:
    """Return where a job is started, and the variables that say how many ranks are there."""
    node = job.device.per_node
    if devices <= node:
        return "", [f"NPROC_PER_NODE={devices}"]
    if devices % node:
        return f" on nodes with {devices} ranks together", []
    return f" on each of {devices // node} nodes", [f"NPROC_PER_NODE={node}", f"NNODES={devices // node}"]


def _script(job: Job, task: str, expert: str) -> list[str]:
    """Return the launch script of a task, with what it needs to train adapters of the planned rank."""
    name, model = task.split("-")
    folder = "i2v" if name == "inp" else name
    if model == "14B":  # one expert, and one script for full training and for adapters
        adapters = [f"--lora-r {job.lora_rank} --lora-alpha {job.lora_rank}",
                    f"--lora-target-modules {','.join(DEFAULT_TARGETS)}"] if job.lora_rank else []
        return [f"bash examples/wan2.1/14B/{folder}/pretrain.sh", *adapters]
    kind = "finetune_lora" if job.lora_rank else "pretrain"
    rank = [f"LORA_R={job.lora_rank}"] if job.lora_rank else []
    return [*rank, f"bash examples/wan2.2/A14B/{folder}/{kind}_{expert}.sh"]


def _flags(job: Job) -> list[str]:
    words = []
    if job.recomputed and (job.recomputed < job.blocks or job.keep_attention or not job.fsdp2):
        words.append(f"--recompute-granularity full --recompute-method block --recompute-num-layers {job.recomputed}")
    if job.keep_attention:
        words.append("--recompute-skip-core-attention")
    if job.offload and job.recomputed:
        words.append("--recompute-offload")
    words += [f"--base-dtype {job.base}"] if job.base else []
    words += {"device": [], "host": ["--optimizer-cpu-offload"], "bytes": ["--optimizer adam8bit"]}[job.states]
    return words + (["--ema-decay 0.999"] if job.ema else [])


def _file_lines(job: Job) -> list[str]:
    """Return what the FSDP2 file, the model file and the data file must say."""
    lines = ["  with fp32_calculate: true in the model file (MM_MODEL)"] if job.fp32_residual else []
    if job.fsdp2:
        lines += ["  with recompute_modules: [] in the FSDP2 file (FSDP_CONFIG)"] if not job.recomputed else []
        lines += [f"  with sharding_size: {job.dims.shard_size} in the FSDP2 file"] if job.dims.replicas > 1 else []
    if job.latent != EXAMPLE_CLIP:
        frames, height, width = job.latent
        lines.append(f"  with num_frames {4 * frames - 3}, max_height {8 * height} and max_width {8 * width} in the"
                     " data file (MM_DATA)")
    return lines


def plot_scaling(weak: Sequence[ScalingRow], strong: Sequence[ScalingRow], path: Path, title: str) -> None:
    """Write a PNG: clips per second over devices against the straight line, and efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for rows, name in ((weak, "weak scaling"), (strong, "strong scaling")):
        if rows:
            devices = [row.devices for row in rows]
            left.plot(devices, [row.clips_per_second for row in rows], marker="o", label=name)
            right.plot(devices, [100 * row.efficiency for row in rows], marker="o", label=name)
    rows = weak or strong
    ideal = [rows[0].clips_per_second * row.devices / rows[0].devices for row in rows]
    left.plot([row.devices for row in rows], ideal, linestyle=":", color="grey", label="ideal")
    left.set(xscale="log", yscale="log", xlabel="devices", ylabel="clips/s")
    right.set(xscale="log", xlabel="devices", ylabel="efficiency (%)", ylim=(0, 105))
    left.legend()
    figure.suptitle(title)
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(f"the plot cannot be written: {error}", where=str(path)) from None
    finally:
        pyplot.close(figure)
