"""A whole generation against diffusers: seconds per stage and step on the same weights, machine and run.

    python benchmarks/generate.py                                    # CPU: a small model made on the spot
    python benchmarks/generate.py --preset mid                       # CPU: width of Wan 1.3B, 4 blocks, 240x416x17
    python benchmarks/generate.py --ckpt_dir DIR --size 832*480 --frames 81 --steps 40 --dtype bf16    # GPU

``stages`` sets each stage beside diffusers': the first video with the weights still on disk, two new prompts, a step of
both guidance passes, the decode, a whole video once everything is warm. ``share_of_gemm`` is the FLOP/s of the
denoising steps over that of one large matrix product measured in the same run: the physical limit is 1. Both sides
alternate, and the best of each counts; on a CPU, which others may use as well, share and speed-up are those of
processor times. They denoise the same noise; the relative L2 distance of their latents is given, so a fast wrong
answer shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform as host
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mindspeed_wan.demo.model_folder import write_model_folder
from mindspeed_wan.inference.options import NEGATIVE_PROMPT, parse_size
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.models.wan.flops import forward_flops, latent_shape
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.platforms.base import Platform

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROMPT, SEED = "A red fox trots through fresh snow between birch trees.", 7
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"size": "96*64", "frames": 17, "steps": 8, "model": {}},
    "mid": {
        "size": "416*240", "frames": 17, "steps": 4,
        "model": {"num_layers": 4, "num_heads": 12, "head_dim": 128, "ffn_dim": 8960, "vae_base_dim": 16},
    },
}


def main() -> int:
    """Run the benchmark and write ``results/generate_<name>.json``."""
    arguments = _arguments()
    platform = get_platform(arguments.device).activate()
    if platform.device_type == "cpu":
        torch.set_num_threads(arguments.threads)
    preset = PRESETS[arguments.preset]
    size = parse_size(arguments.size or preset["size"])
    frames, steps = arguments.frames or preset["frames"], arguments.steps or preset["steps"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.ckpt_dir or write_model_folder(Path(temporary) / "w", dtype="bfloat16"
                      if arguments.dtype == "bf16" else "float32", **preset["model"]))
        result = measure(platform, folder, size, frames, steps, arguments)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is None:
        name = "checkpoint" if arguments.ckpt_dir else arguments.preset
        arguments.output = RESULTS / f"generate_{name}_{platform.name}_{arguments.dtype}.json"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(
    platform: Platform, folder: Path, size: tuple[int, int], frames: int, steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return everything measured, JSON-ready."""
    dtype = DTYPES[arguments.dtype]
    _import_both(arguments.skip_diffusers)
    watch = _Watch(platform)
    generator = WanGenerator.from_pretrained(
        folder, dtype=arguments.dtype, device=platform.name, grid="diffusers", noise="diffusers", steps=steps,
        size=size, num_frames=frames, shift=3.0, guidance=(3.0, 4.0), memory=arguments.memory,
        compile_blocks=arguments.compile, attention=arguments.attention,
    )
    loading = watch.seconds()
    ours, theirs = [_run_ours(generator, platform)], []
    ours[0]["first"] = loading + ours[0]["video"]
    oracle = None
    if not arguments.skip_diffusers:
        watch = _Watch(platform)
        oracle = _diffusers(folder, dtype, platform)
        loading = watch.seconds()
        theirs = [_run_diffusers(oracle, size, frames, steps, platform)]
        theirs[0]["first"] = loading + theirs[0]["video"]
    for _ in range(arguments.repeats):
        ours.append(_run_ours(generator, platform))
        if oracle is not None:
            theirs.append(_run_diffusers(oracle, size, frames, steps, platform))
    config = generator.folder.config
    flops = 2 * forward_flops(config, latent_shape(frames, *size)).total
    clock = "step_cpu_seconds" if platform.device_type == "cpu" else "step_seconds"
    limit = _gemm(dtype, platform)
    stages = {**ours[-1]["stage_seconds"], **{name: ours[0]["stage_seconds"][name] for name in ("text", "load")}}
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"device": platform.device_name(), "torch": torch.__version__, "python": host.python_version(),
                    "threads": torch.get_num_threads() if platform.device_type == "cpu" else None},
        "model": {"dim": config.dim, "layers": config.num_layers, "heads": config.num_heads},
        "video": {"height": size[0], "width": size[1], "frames": frames, "steps": steps},
        "dtype": arguments.dtype, "memory": generator.plan.mode if generator.plan else None,
        "compiled": arguments.compile, "attention": arguments.attention,
        "cfg_step_tflop": flops / 1e12, "gemm_tflops": limit / 1e12,
        "ours": {**_best(ours, clock, flops / limit), "stage_seconds": stages,
                 "peak_memory_gib": ours[-1]["peak"] / 2**30},
    }
    record["stages"] = _stages(ours, theirs, clock)
    if theirs:
        latents = theirs[-1]["latents"].float().cpu()
        record["diffusers"] = _best(theirs, clock, flops / limit)
        record["speedup_per_step"] = record["diffusers"][clock] / record["ours"][clock]
        record["latents_relative_l2"] = ((ours[-1]["latents"] - latents).norm() / latents.norm()).item()
    return record


def _stages(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    """Return one row for each stage: our seconds, diffusers' and their ratio; the best warm run of each counts."""
    rows = []
    names = {"first": "first video, weights on disk", "text": "two new prompts", step: "denoising step",
             "decode": "decode", "video": "whole video, warm"}
    for key, title in names.items():
        mine, other = ([run[key] for run in (runs[:1] if key == "first" else runs[1:])] for runs in (ours, theirs))
        row: dict[str, Any] = {"stage": title, "ours_seconds": min(mine)}
        if other:
            row.update(diffusers_seconds=min(other), speedup=min(other) / min(mine))
        rows.append(row)
    return rows


class _Watch:
    """Seconds since it was made: processor time on a CPU, where others may be at work, else wall time."""

    def __init__(self, platform: Platform) -> None:
        self._platform, self._now = platform, time.process_time if platform.device_type == "cpu" else time.perf_counter
        platform.synchronize()
        self._started = self._now()

    def seconds(self) -> float:
        self._platform.synchronize()
        return self._now() - self._started


def _import_both(skip_diffusers: bool) -> None:
    """Import what either side imports lazily, so that no first video pays for it."""
    import transformers  # noqa: F401

    if not skip_diffusers:
        from diffusers import AutoencoderKLWan, WanPipeline  # noqa: F401


def _best(runs: list[dict[str, Any]], clock: str, ideal_seconds: float) -> dict[str, float]:
    best = {name: min(run[name] for run in runs[1:]) for name in ("step_seconds", "step_cpu_seconds")}
    return {**best, "share_of_gemm": ideal_seconds / best[clock]}


_new = itertools.count()


def _new_prompts() -> list[str]:
    """Return two prompts of the usual length that nobody has encoded yet."""
    return [f"{PROMPT} Take {next(_new)}." for _ in range(2)]


def _run_ours(generator: WanGenerator, platform: Platform) -> dict[str, Any]:
    stamps: list[float] = []
    platform.reset_peak_memory()
    watch = _Watch(platform)
    result = generator(PROMPT, seed=SEED, on_progress=lambda *_: stamps.append(time.process_time()))
    video, peak = watch.seconds(), platform.peak_memory_bytes()
    watch = _Watch(platform)
    generator.prompts.encode(_new_prompts())
    text = watch.seconds()
    watch = _Watch(platform)
    generator.vae().decode(result.latents[None].to(platform.device()))
    return {"step_seconds": _median_step(result.steps), "step_cpu_seconds": _median_gap(stamps), "video": video,
            "text": text, "decode": watch.seconds(), "stage_seconds": result.seconds, "peak": peak,
            "latents": result.latents}


def _median_step(steps: dict[str, list[float]]) -> float:
    # The first step of an expert also embeds the texts; it is part of the stage times, not of the step time.
    return statistics.median([seconds for values in steps.values() for seconds in (values[1:] or values)])


def _diffusers(folder: Path, dtype: torch.dtype, platform: Platform) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(folder, vae=vae, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(platform.device())


def _run_diffusers(
    pipe: Any, size: tuple[int, int], frames: int, steps: int, platform: Platform
) -> dict[str, Any]:
    stamps: list[float] = []
    cpu_stamps: list[float] = []

    def after_step(_pipe: Any, _index: int, _t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        platform.synchronize()
        stamps.append(time.perf_counter())
        cpu_stamps.append(time.process_time())
        return inputs

    watch = _Watch(platform)
    latents = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=size[0], width=size[1], num_frames=frames,
        num_inference_steps=steps, guidance_scale=4.0, guidance_scale_2=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(SEED), callback_on_step_end=after_step,
    ).frames
    until_latents = watch.seconds()
    config = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in
                 (config.latents_mean, config.latents_std))
    watch = _Watch(platform)
    with torch.no_grad():
        pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype), return_dict=False)
    decode = watch.seconds()
    watch = _Watch(platform)
    with torch.no_grad():
        one, other = _new_prompts()
        pipe.encode_prompt(prompt=one, negative_prompt=other, device=platform.device())
    return {"step_seconds": _median_gap(stamps), "step_cpu_seconds": _median_gap(cpu_stamps), "text": watch.seconds(),
            "decode": decode, "video": until_latents + decode, "latents": latents[0]}


def _median_gap(stamps: list[float]) -> float:
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(stamps))


def _gemm(dtype: torch.dtype, platform: Platform, side: int | None = None) -> float:
    """Return the FLOP/s of a large square matrix product, the best of a few (by processor time on one CPU thread)."""
    now = time.process_time if platform.device_type == "cpu" else time.perf_counter
    side = side or (2048 if platform.device_type == "cpu" else 8192)
    left, right = (torch.randn(side, side, device=platform.device(), dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        platform.synchronize()
        started = now()
        left @ right
        platform.synchronize()
        best = min(best, now() - started)
    return 2 * side**3 / best


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="model and video made on the spot")
    parser.add_argument("--ckpt_dir", help="a Diffusers T2V A14B folder instead")
    parser.add_argument("--size", help="WIDTH*HEIGHT")
    parser.add_argument("--frames", type=int, help="frames, 4k+1")
    parser.add_argument("--steps", type=int, help="sampling steps, at least 3")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", choices=["npu", "cuda", "cpu"])
    parser.add_argument("--memory", default="auto", help="auto, resident, sequential or block")
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks (diffusers runs eager)")
    parser.add_argument("--attention", default="auto", help="our attention backend")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--skip_diffusers", action="store_true", help="ours only (weights that do not fit twice)")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
