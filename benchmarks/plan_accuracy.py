"""How far the planner is off: memory against measured peaks, time against published figures.

    python benchmarks/plan_accuracy.py             # both; writes benchmarks/results/plan_accuracy.json
    python benchmarks/plan_accuracy.py --published # only the published figures (no training runs, under a second)

Every published figure says whether a constant was fitted to it. Figures of other programs carry what those programs
do and ours does not (``Program``): the official code repeats a per-token time MLP on every rank and runs its
element-wise work unfused; these numbers are solved from three of its figures per device, the rest are predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_memory import Case, GenerationCase, measure, measure_generation
from mindspeed_wan.cli.plan import WEIGHT_ONLY
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.flops import latent_shape
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import PRESETS, device
from mindspeed_wan.planning.duration import plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import plan_memory

RESULT = Path(__file__).parent / "results" / "plan_accuracy.json"
MODEL = WanConfig()
SIZES = {"480p": (81, 480, 832), "720p": (81, 720, 1280), "480p61": (61, 480, 832), "480p93": (93, 480, 832)}

# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What another program costs beyond ours: factors on attention and other compute, seconds per token and run."""

    attention: float = 1.0
    other: float = 1.0
    repeated: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A published time. ``fitted`` names the constant that was fitted to it, if any."""

    source: str
    what: str
    job: Job
    seconds: float
    whole: bool
    fitted: str | None = None
    program: Program = Program()
    note: str | None = None

    def planned(self) -> float:
        """Return our number: of a whole run, of all its denoising steps, or of one optimizer step."""
        time, program = plan_duration(self.job), self.program
        if self.job.training:
            return time.step + (program.attention - 1) * time.parts["attention"] \
                + (program.other - 1) * time.parts["other compute"]
        extra = (program.attention - 1) * time.parts["attention"] + (program.other - 1) * time.parts["other compute"]
        return (time.step + extra) * time.steps + program.repeated * self.job.tokens + (time.once if self.whole else 0)


def generation(name: str, size: str, devices: int = 1, *, cfg: int = 1, steps: int = 40, fsdp2: bool = False) -> Job:
    """Return a generation of one video by Ulysses over all devices (halved where the guidance branches are split)."""
    dims = ParallelDims(world_size=devices, context=devices // cfg)
    # Both experts there: how others exchange theirs is not known, and part of what is fitted to them.
    return Job(model=MODEL, latent=latent_shape(*SIZES[size]), device=device(name), dims=dims, training=False,
               fsdp2=fsdp2, cfg=cfg, steps=steps, experts=2)


def training(name: str, devices: int, *, batch: int, tensor: int = 1, context: int = 1, recomputed: int = 0,
             shard: int | None = None) -> Job:
    """Return a training step from cached features at 93 x 480 x 832, context parallel as a ring."""
    dims = ParallelDims(world_size=devices, tensor=tensor, sequence_parallel=tensor > 1, context=context, ulysses=1,
                        shard=shard)
    return Job(model=MODEL, latent=latent_shape(*SIZES["480p93"]), device=device(name), dims=dims, encoders=False,
               recomputed=recomputed, accumulation=batch // dims.data)


OFFICIAL = {
    "H100": {"480p": (326.9, 91.7, 51.5), "720p": (1041.5, 288.7, 155.1)},
    "A100": {"480p": (785.7, 215.2, 119.9), "720p": (2735.7, 725.3, 386.7)},
    "H20": {"480p": (1133.9, 306.6, 170.5), "720p": (4048.7, 1067.8, 564.7)},
}
"""Wan2.2's own table (comp_effic.png): seconds on 1, 4 and 8 GPUs, T2V A14B, 81 frames, 40 steps."""
COUNTS = (1, 4, 8)
FITTED = {("480p", 1), ("720p", 1), ("720p", 8)}


def official_program(name: str) -> Program:
    """Solve attention, other compute and repeated work from three of a device's six official figures."""
    rows, right = [], []
    for size, count in sorted(FITTED):
        time = plan_duration(generation(name, size, count, fsdp2=count > 1))
        tokens = MODEL.num_tokens(latent_shape(*SIZES[size]))
        attention, other = (time.parts[part] * time.steps for part in ("attention", "other compute"))
        rows.append([attention, other, tokens])
        right.append(OFFICIAL[name][size][COUNTS.index(count)] - (time.total - attention - other))
    return Program(*(float(x) for x in np.linalg.solve(np.array(rows), np.array(right))))


def official() -> list[Figure]:
    """Return the official inference table, 18 figures of which nine are predictions."""
    found = []
    for name, sizes in OFFICIAL.items():
        program = official_program(name)
        for size, figures in sizes.items():
            for count, seconds in zip(COUNTS, figures):
                job = generation(name, size, count, fsdp2=count > 1)
                fitted = "the official program on this device" if (size, count) in FITTED else None
                found.append(Figure("Wan2.2 comp_effic.png", f"{count} x {name}, {size}", job, seconds, True, fitted,
                                    program))
    return found


def cann_recipes() -> list[Figure]:
    """Return the 8-card Ascend figures; the repeated time MLP is fitted to one of them."""
    job = generation("910B", "720p", 8, fsdp2=True)
    program = Program(repeated=(430.17 - plan_duration(job).total) / job.tokens)
    rows = (("480p", 125.95, None, "CANN 8.3"), ("720p", 430.17, "the program's repeated work", "CANN 8.3"),
            ("720p", 418.01, None, "CANN 8.5"), ("480p61", 102.54, None, "CANN 8.5, 61 frames"))
    return [Figure("cann-recipes wan2.2-i2v", f"8 x 800I A2, {size}", generation("910B", size, 8, fsdp2=True), seconds,
                   True, fitted, program, note) for size, seconds, fitted, note in rows]


def others() -> list[Figure]:
    """Return programs whose overheads are not known: planned as ours."""
    eager = official_program("H100").other
    unmodelled = "eight GPUs hold 28.6 GB of states each: the run offloads or accumulates in a way the table omits"
    return [
        Figure("sglang#28304", "4 x H100, CFG 2 x Ulysses 2, 720p", generation("H100", "720p", 4, cfg=2), 206.1, False,
               "H100 linear and attention share"),
        Figure("LightX2V README", "1 x H100, 480p", generation("H100", "480p"), 40 * 5.18, False,
               "H100 linear and attention share"),
        Figure("LightX2V README", "8 x H100, 480p", generation("H100", "480p", 8), 40 * 0.75, False),
        Figure("sglang#18149", "1 GPU (type not stated), 720p", generation("H100", "720p"), 40 * 19.39, False,
               note="compared as an H100"),
        Figure("sglang#28304", "4 x B200, CFG 2 x Ulysses 2, 720p", generation("B200", "720p", 4, cfg=2), 105.1, False,
               "B200 attention share"),
        Figure("MindIE-SD quick start", "1 x 800I A2, 480p, 50 steps", generation("910B", "480p", steps=50), 860.2,
               True, "910B linear and attention share"),
        Figure("DFM performance summary", "32 x GB200, CP2, FSDP", training("GB200", 32, batch=64, context=2), 13.7,
               False, "share left in training"),
        Figure("DFM performance summary", "32 x B200, CP2, FSDP", training("B200", 32, batch=64, context=2), 15.4,
               False),
        Figure("DFM performance summary", "32 x GB300, CP2, DDP", training("GB300", 32, batch=64, context=2, shard=1),
               12.0, False, note="its attention units are twice as fast as the GB200's, which we do not credit"),
        Figure("DFM performance summary", "128 x H100, TP2 CP4, recompute 8",
               training("H100", 128, batch=128, tensor=2, context=4, recomputed=8), 19.0, False),
        Figure("DFM performance summary", "64 x H100, FSDP2 (diffusers' model)",
               training("H100", 64, batch=64, recomputed=40), 27.0, False, program=Program(other=eager)),
        Figure("DFM performance summary", "8 x H100, FSDP2 (diffusers' model)",
               training("H100", 8, batch=8, recomputed=40), 35.2, False, program=Program(other=eager), note=unmodelled),
    ]


def published() -> list[dict[str, Any]]:
    """Return a row per figure: published and planned seconds, relative error, what was fitted."""
    rows = []
    for figure in (*official(), *cann_recipes(), *others()):
        planned = figure.planned()
        rows.append({"source": figure.source, "what": figure.what, "published_seconds": figure.seconds,
                     "planned_seconds": round(planned, 2), "error": round(planned / figure.seconds - 1, 4),
                     "fitted": figure.fitted, "note": figure.note})
    return rows


# ---- memory ----------------------------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {"dim": 256, "ffn_dim": 704, "num_heads": 4, "num_layers": 3, "latent": (5, 32, 32)}
_MID: dict[str, Any] = {"dim": 512, "ffn_dim": 1376, "num_heads": 8, "num_layers": 4, "latent": (5, 48, 48)}
CASES = (
    Case(name="1 rank", **_TINY),
    Case(name="1 rank, recompute", recompute=True, **_TINY),
    Case(name="1 rank, bf16", precision="bf16", **_TINY),
    Case(name="1 rank, bf16, recompute", precision="bf16", recompute=True, **_TINY),
    Case(name="1 rank, bf16, fp32 residual", precision="bf16", fp32_residual=True, **_TINY),
    Case(name="2 clips", micro_batch=2, **_TINY),
    Case(name="2 clips, bf16", micro_batch=2, precision="bf16", **_TINY),
    Case(name="TP2", tensor=2, **_TINY),
    Case(name="TP2 SP", tensor=2, sequence_parallel=True, **_TINY),
    Case(name="TP2 FSDP2, bf16", tensor=2, fsdp2=True, precision="bf16", **_TINY),
    Case(name="CP2 Ulysses", context=2, **_TINY),
    Case(name="CP2 ring", context=2, algorithm="megatron_cp_algo", **_TINY),
    Case(name="CP2 FSDP2, bf16", context=2, fsdp2=True, precision="bf16", **_TINY),
    Case(name="FSDP2 of 2", data=2, fsdp2=True, **_TINY),
    Case(name="FSDP2 of 2, bf16, recompute", data=2, fsdp2=True, precision="bf16", recompute=True, **_TINY),
    Case(name="TP2 SP CP2 FSDP2, bf16, recompute", tensor=2, sequence_parallel=True, context=2, fsdp2=True,
         precision="bf16", recompute=True, **_TINY),
    Case(name="1 rank, recompute but attention", recompute=True, keep_attention=True, **_TINY),
    Case(name="CP2 ring, recompute but attention", context=2, algorithm="megatron_cp_algo", recompute=True,
         keep_attention=True, **_TINY),
    Case(name="LoRA, fp32", lora_rank=8, **_TINY),
    Case(name="LoRA, FSDP2 of 2, bf16, recompute", lora_rank=8, data=2, fsdp2=True, precision="bf16", recompute=True,
         **_TINY),
    Case(name="1 rank, recompute, 8-bit moments", recompute=True, adam8bit=True, **_TINY),
    Case(name="mid size, bf16", precision="bf16", **_MID),
    Case(name="mid size, FSDP2 of 2, bf16, recompute", data=2, fsdp2=True, precision="bf16", recompute=True, **_MID),
)
"""What is measured; tests take a few of them."""

GENERATIONS = (
    GenerationCase(name="1 rank, both experts", **_TINY),
    GenerationCase(name="1 rank, fp32", precision="fp32", **_TINY),
    GenerationCase(name="1 rank, one expert at a time", memory="sequential", **_TINY),
    GenerationCase(name="1 rank, blocks streamed", memory="block", **_TINY),
    GenerationCase(name="1 rank, fp8 weights", quantize="fp8_weight_only", **_TINY),
    GenerationCase(name="1 rank, int8 weights, blocks streamed", quantize="int8_weight_only", memory="block", **_TINY),
    GenerationCase(name="CFG2", cfg=2, **_TINY),
    GenerationCase(name="Ulysses 2", ulysses=2, **_TINY),
    GenerationCase(name="ring 2", ring=2, **_TINY),
    GenerationCase(name="TP2", tensor=2, **_TINY),
    GenerationCase(name="Ulysses 2, FSDP2 of 2", ulysses=2, dit_fsdp=True, **_TINY),
    GenerationCase(name="PP2", pipeline=2, **_TINY),
    GenerationCase(name="PP2, one expert at a time", pipeline=2, memory="sequential", **_TINY),
    GenerationCase(name="PP2, PipeFusion of 4", pipeline=2, patches=4, **_TINY),
    GenerationCase(name="PP2 CFG2, PipeFusion of 4, fp8 weights", pipeline=2, cfg=2, patches=4,
                   quantize="fp8_weight_only", **_TINY),
    GenerationCase(name="mid size, PP2, PipeFusion of 4", pipeline=2, patches=4, **_MID),
)
"""Generations that are measured."""


def job_of(case: Case) -> Job:
    """Return the planner's view of a measured case."""
    dims = ParallelDims(
        world_size=case.world_size, tensor=case.tensor, sequence_parallel=case.sequence_parallel, context=case.context,
        ulysses=1 if case.algorithm == "megatron_cp_algo" else None, shard=None if case.fsdp2 else 1,
    )
    return Job(model=case.config, latent=case.latent, device=PRESETS["910B"], dims=dims, precision=case.precision,
               fp32_residual=case.fp32_residual, fsdp2=case.fsdp2, recomputed=case.recompute * case.num_layers,
               keep_attention=case.keep_attention, states="bytes" if case.adam8bit else "device",
               fused_optimizer=False, micro_batch=case.micro_batch,
               lora_rank=case.lora_rank, encoders=False, kernels="cpu")


def planned_generation(case: GenerationCase) -> float:
    """Return the planned bytes of a measured generation's denoising."""
    dims = ParallelDims(world_size=case.world_size, tensor=case.tensor, context=case.ulysses * case.ring,
                        ulysses=case.ulysses, pipeline=case.pipeline,
                        shard=case.cfg * case.ulysses * case.ring if case.dit_fsdp else 1)
    job = Job(model=case.config, latent=case.latent, device=PRESETS["910B"], dims=dims, training=False,
              precision=case.precision, fp32_residual=True, fsdp2=case.dit_fsdp, encoders=False, kernels="cpu",
              cfg=case.cfg, experts={"resident": 2, "sequential": 1, "block": 0}[case.memory], patches=case.patches,
              base=WEIGHT_ONLY[case.quantize] if case.quantize else None)
    return plan_memory(job).moment("denoising").tensors


def compared_generation(case: GenerationCase, peak: float) -> dict[str, Any]:
    """Return a row: the case, its measured peak, what was planned, the relative error."""
    planned = planned_generation(case)
    print(f"  {case.name:<42} {peak / 1e6:7.1f} MB {planned / peak - 1:+.1%}", flush=True)
    return {"case": asdict(case), "measured_bytes": peak, "planned_bytes": planned,
            "error": round(planned / peak - 1, 4)}


def planned_peaks(case: Case) -> dict[str, float]:
    """Return planned bytes of the backward peak (``step``) and of the optimizer's (``update``)."""
    moments = {moment.name: moment.tensors for moment in plan_memory(job_of(case)).moments}
    update = moments.pop("update")
    return {"step": max(moments.values()), "update": update}


def compared(case: Case, peaks: dict[str, float]) -> dict[str, Any]:
    """Return a row: the case, its measured peaks, what was planned, the relative errors."""
    planned = planned_peaks(case)
    errors = {name: round(planned[name] / peaks[name] - 1, 4) for name in planned}
    print(f"  {case.name:<42} step {peaks['step'] / 1e6:7.1f} MB {errors['step']:+.1%}"
          f"  update {peaks['update'] / 1e6:7.1f} MB {errors['update']:+.1%}", flush=True)
    return {"case": asdict(case), "measured_bytes": peaks, "planned_bytes": planned, "error": errors}


def measured() -> dict[str, list[dict[str, Any]]]:
    """Run every case and compare."""
    from tests.helpers.spawn import run_ranks

    return {"measured_memory": [compared(case, measure(case, run_ranks)) for case in CASES],
            "measured_generation": [compared_generation(case, measure_generation(case, run_ranks))
                                    for case in GENERATIONS]}


def measured_before(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Compare the peaks of an earlier run with what is planned now."""
    def again(row: dict[str, Any], kind: type) -> Any:
        return kind(**{**row["case"], "latent": tuple(row["case"]["latent"])})

    return {"measured_memory": [compared(again(row, Case), row["measured_bytes"])
                                for row in result.get("measured_memory", [])],
            "measured_generation": [compared_generation(again(row, GenerationCase), row["measured_bytes"])
                                    for row in result.get("measured_generation", [])]}


def main() -> None:
    """Print the errors and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="measure nothing: take the peaks that are in the file")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    result["published_times"] = published()
    for row in result["published_times"]:
        print(f"  {row['source']:<26} {row['what']:<38} {row['published_seconds']:8.1f} s {row['error']:+7.1%}"
              f"  {'fitted' if row['fitted'] else ''}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result.update(measured_before(result) if args.published else measured())
    RESULT.parent.mkdir(exist_ok=True)
    temporary = RESULT.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(temporary, RESULT)


if __name__ == "__main__":
    main()
