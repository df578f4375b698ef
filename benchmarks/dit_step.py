"""DiT forward and forward+backward against diffusers: same weights, same machine, same run, and the matmul limit.

    python benchmarks/dit_step.py                      # CPU: width of Wan 1.3B, 2 blocks, 4,680 tokens
    python benchmarks/dit_step.py --preset A14B        # default on a GPU: 40 blocks, 480x832x81, bf16

Each case runs ours and diffusers' in turn, so that other load on the machine hits both. On a CPU the clock is the
process's CPU time summed over its threads, which other processes disturb least; elsewhere it is wall time.
``share_of_gemm`` is the FLOP/s of the whole step over that of one large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.flops import forward_flops, latent_shape, training_flops
from mindspeed_wan.models.wan.model import TextContext, WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.platforms.base import Platform

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = WanConfig(num_layers=2, dim=1536, ffn_dim=8960, num_heads=12)


@dataclass(frozen=True)
class Row:
    """One case; seconds are medians of the clock, ``ratio`` above 1 means ours is faster."""

    case: str
    dtype: str
    compiled: bool
    ours_seconds: float
    diffusers_seconds: float
    ratio: float
    ours_tflops: float
    gemm_tflops: float
    share_of_gemm: float
    relative_difference: float


@dataclass
class Inputs:
    """One sample."""

    latents: Tensor
    timestep: Tensor
    text: Tensor


def main() -> int:
    """Measure and write ``benchmarks/results/dit_step_<device>.json``."""
    options = _parse()
    platform = get_platform(options.device).activate()
    preset = options.preset or ("small" if platform.name == "cpu" else "A14B")
    config = SMALL if preset == "small" else PRESETS["t2v-A14B"]
    if options.layers:
        config = config.with_changes(num_layers=options.layers)
    frames = options.frames or (9 if preset == "small" else 81)
    latent = latent_shape(frames, options.height, options.width)
    rows = []
    for name in options.dtype or (["bf16", "fp32"] if preset == "small" else ["bf16"]):
        rows += measure(config, latent, name, platform, options)
    result = {
        "benchmark": "dit_step",
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(platform),
        "config": config.to_dict(),
        "clip": {"frames": frames, "height": options.height, "width": options.width},
        "tokens": config.num_tokens(latent),
        "repeats": options.repeats,
        "clock": Clock(platform).name,
        "note": options.note,
        "rows": [asdict(row) for row in rows],
    }
    path = Path(options.out or RESULTS / f"dit_step_{platform.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="npu, cuda or cpu; default: what is there")
    parser.add_argument("--preset", choices=["small", "A14B"], help="default: small on a CPU, A14B elsewhere")
    parser.add_argument("--layers", type=int, help="transformer blocks; default: the preset's")
    parser.add_argument("--frames", type=int, help="clip length, 4k+1; default 9 (small) or 81")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeatable")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks as well, on both sides")
    parser.add_argument("--no-backward", action="store_true", help="forward only")
    parser.add_argument("--recompute", action="store_true", help="forward+backward with activation recomputation")
    parser.add_argument("--note", default="", help="kept in the result file")
    parser.add_argument("--out", help="result file")
    return parser.parse_args()


def measure(
    config: WanConfig, latent: tuple[int, int, int], dtype: str, platform: Platform, options: argparse.Namespace
) -> list[Row]:
    """Return the rows of one dtype."""
    ours, reference = model_pair(config, DTYPES[dtype], platform)
    inputs = sample(config, latent, DTYPES[dtype], platform)
    gemm = gemm_flops(config, config.num_tokens(latent), DTYPES[dtype], platform)
    rows = []
    for compiled in (False, True) if options.compile else (False,):
        if compiled:
            for block in (*ours.blocks, *reference.blocks):
                block.forward = torch.compile(block.forward)
        cases = forward_cases(ours, reference, inputs)
        if not options.no_backward:
            cases.append(backward_case(ours, reference, inputs, recompute=options.recompute and not compiled))
        for case, (run_ours, run_reference, is_training) in cases:
            difference = relative_difference(run_ours(), run_reference())
            seconds = alternate(run_ours, run_reference, options.repeats, Clock(platform))
            flops = training_flops(config, latent) if is_training else forward_flops(config, latent).total
            rows.append(Row(
                case=case, dtype=dtype, compiled=compiled, ours_seconds=seconds[0], diffusers_seconds=seconds[1],
                ratio=seconds[1] / seconds[0], ours_tflops=flops / seconds[0] / 1e12, gemm_tflops=gemm / 1e12,
                share_of_gemm=flops / seconds[0] / gemm, relative_difference=difference,
            ))
            print_row(rows[-1])
    return rows


def model_pair(config: WanConfig, dtype: torch.dtype, platform: Platform) -> tuple[WanDiT, nn.Module]:
    """Return ours and diffusers' model on one set of random weights (shared storage, so memory is needed once)."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        reference = WanTransformer3DModel.from_config(config.to_diffusers()).to(dtype)
        ours = WanDiT(config)
    rope = WanTransformer3DModel.from_config({**config.to_diffusers(), "num_layers": 0}).rope
    reference = reference.to_empty(device=platform.device())
    reference.rope = rope.to(platform.device())  # its tables are not parameters and were lost on meta
    generator = torch.Generator(platform.device()).manual_seed(0)
    for parameter in reference.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    weights = dict(reference.named_parameters())
    ours.load_state_dict({p.mm: weights[p.hf] for p in parameter_table(config)}, assign=True)
    return ours, reference


def sample(config: WanConfig, latent: tuple[int, int, int], dtype: torch.dtype, platform: Platform) -> Inputs:
    """Return random inputs of one sample."""
    generator = torch.Generator().manual_seed(1)
    device = platform.device()
    return Inputs(
        latents=torch.randn(1, config.in_channels, *latent, generator=generator).to(device, dtype),
        timestep=torch.tensor([700.0], device=device),
        text=torch.randn(1, config.text_len, config.text_dim, generator=generator).to(device, dtype),
    )


Case = tuple[str, tuple[Callable[[], Tensor], Callable[[], Tensor], bool]]


def forward_cases(ours: WanDiT, reference: nn.Module, inputs: Inputs) -> list[Case]:
    """Inference steps: as diffusers does them, and with the text's keys and values kept from step to step."""
    with torch.no_grad():
        context: TextContext = ours.encode_text(inputs.text)

    @torch.no_grad()
    def theirs() -> Tensor:
        return reference(inputs.latents, inputs.timestep, inputs.text, return_dict=False)[0]

    @torch.no_grad()
    def plain() -> Tensor:
        return ours(inputs.latents, inputs.timestep, inputs.text)

    @torch.no_grad()
    def cached() -> Tensor:
        return ours(inputs.latents, inputs.timestep, text_context=context)

    return [("forward", (plain, theirs, False)), ("forward, text cached", (cached, theirs, False))]


def backward_case(ours: WanDiT, reference: nn.Module, inputs: Inputs, *, recompute: bool) -> Case:
    """A training step without the optimizer."""
    if recompute:
        apply_recompute(ours, RecomputePlan())
        reference.enable_gradient_checkpointing()
        reference.train()

    def step(output: Tensor, model: nn.Module) -> Tensor:
        output.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        return output.detach()

    def run_ours() -> Tensor:
        return step(ours(inputs.latents, inputs.timestep, inputs.text), ours)

    def run_reference() -> Tensor:
        output = reference(inputs.latents, inputs.timestep, inputs.text, return_dict=False)[0]
        return step(output, reference)

    name = "forward+backward" + (", recompute" if recompute else "")
    return name, (run_ours, run_reference, True)


class Clock:
    """CPU time of all threads on a CPU, wall time elsewhere."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.name = "cpu time" if platform.name == "cpu" else "wall time"

    def seconds(self, function: Callable[[], Tensor]) -> float:
        """Return the time of one call, queued device work included."""
        now = time.process_time if self.platform.name == "cpu" else time.perf_counter
        self.platform.synchronize()
        start = now()
        function()
        self.platform.synchronize()
        return now() - start


def alternate(
    first: Callable[[], Tensor], second: Callable[[], Tensor], repeats: int, clock: Clock
) -> tuple[float, float]:
    """Return median seconds of two functions, run in turn (they have been warmed up)."""
    times = [(clock.seconds(first), clock.seconds(second)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def gemm_flops(config: WanConfig, tokens: int, dtype: torch.dtype, platform: Platform) -> float:
    """Return the best FLOP/s of the model's largest matrix product: the limit of everything else."""
    a = torch.randn(tokens, config.dim, device=platform.device()).to(dtype)
    b = torch.randn(config.ffn_dim, config.dim, device=platform.device()).to(dtype)
    clock = Clock(platform)
    best = min(clock.seconds(lambda: nn.functional.linear(a, b)) for _ in range(8))
    return 2.0 * tokens * config.dim * config.ffn_dim / best


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """Return the relative L2 distance of the outputs (rounding apart they are the same function)."""
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


def machine(platform: Platform) -> dict[str, object]:
    """Return what a reader needs to judge the numbers."""
    import diffusers

    return {
        "device": platform.device_name(),
        "platform": platform.name,
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": host.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def print_row(r: Row) -> None:
    """Print a case as soon as it is measured."""
    print(f"{r.case:32} {r.dtype:5} {'compiled' if r.compiled else 'eager':8} ours {r.ours_seconds:8.3f} s,"
          f" diffusers {r.diffusers_seconds:8.3f} s, ratio {r.ratio:5.2f}, {r.ours_tflops:8.3f} TFLOP/s,"
          f" {r.share_of_gemm:6.1%} of GEMM", flush=True)


if __name__ == "__main__":
    sys.exit(main())
