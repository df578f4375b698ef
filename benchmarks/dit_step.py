"""DiT forward and forward+backward against diffusers: same weights, same machine, same run, and the machine's limits.

    python benchmarks/dit_step.py                      # CPU: width of Wan 1.3B, 2 blocks, 4,680 tokens
    python benchmarks/dit_step.py --preset A14B        # default on a GPU: 40 blocks, 480x832x81, bf16
    python benchmarks/dit_step.py --height 720 --width 1280 --no-backward --compile --attention cudnn
    python benchmarks/dit_step.py --frames 93 --recompute --offload --lora 32    # a LoRA step at 37,440 tokens

Each case runs ours and diffusers' in turn, so that other load on the machine hits both. On a CPU the clock is the
process's CPU time summed over its threads, which other processes disturb least; elsewhere it is wall time.

``tflops`` and ``mfu`` count the work that training is defined by (3 forwards; 2 under LoRA, whose base has no weight
gradients); ``hfu`` also counts what recomputation runs again. Both are shares of the data sheet's peak and absent where
there is none (CPU). ``share_of_gemm`` is the same work over one large matrix product measured in the same run, and
``executed_share_of_gemm`` the executed work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Clock, alternate, copy_rate, gemm_flops, machine, peak_gib, relative_difference
from mindspeed_wan.lora.apply import add_adapter, init_adapter
from mindspeed_wan.lora.spec import LoraSpec
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.flops import forward_flops, latent_shape, training_flops
from mindspeed_wan.models.wan.model import TextContext, WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.platforms import get_platform, ops
from mindspeed_wan.platforms.attention import check_backend, check_device
from mindspeed_wan.platforms.base import Platform

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = WanConfig(num_layers=2, dim=1536, ffn_dim=8960, num_heads=12)
PEER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
"""Diffusers' names of our default LoRA targets."""


@dataclass(frozen=True)
class Row:
    """One case; seconds are medians of the clock, ``ratio`` above 1 means ours is faster."""

    case: str
    dtype: str
    compiled: bool
    ours_seconds: float
    diffusers_seconds: float
    ratio: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    hfu: float | None
    share_of_gemm: float
    executed_share_of_gemm: float
    ours_peak_gib: float | None
    diffusers_peak_gib: float | None
    relative_difference: float


@dataclass(frozen=True)
class Case:
    """What ours and diffusers' run, and the FLOP of one call: useful, and executed by ours."""

    name: str
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    useful: float
    executed: float


@dataclass
class Inputs:
    """One sample."""

    latents: Tensor
    timestep: Tensor
    text: Tensor


def main() -> int:
    """Measure and write ``benchmarks/results/dit_step_<device>.json``; options that change the step are in its name."""
    options = _parse()
    platform = get_platform(options.device).activate()
    if options.attention != "auto":
        check_backend(options.attention, needs_grad=not options.no_backward)
        check_device(options.attention, platform.device_type, DTYPES[(options.dtype or ["bf16"])[0]])
    ops.use_attention(options.attention)
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
        "kernels": ops.kernels_in_use(),
        "attention": ops.attention_in_use(),
        "limits": limits(config, latent, platform, [row.dtype for row in rows]),
        "note": options.note,
        "rows": [asdict(row) for row in rows],
    }
    variant = "".join(f"_{name}" for name in ("recompute", "offload", "lora") if getattr(options, name))
    variant += "" if options.attention == "auto" else f"_{options.attention}"
    path = Path(options.out or RESULTS / f"dit_step_{platform.name}{variant}.json")
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
    parser.add_argument("--attention", default="auto", help="our attention kernel by name; diffusers keeps its own")
    parser.add_argument("--no-backward", action="store_true", help="forward only")
    parser.add_argument("--recompute", action="store_true", help="forward+backward with recomputation, on both sides")
    parser.add_argument("--offload", action="store_true", help="ours keeps the recomputed blocks' inputs on the host")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters only (diffusers: PEFT's)")
    parser.add_argument("--note", default="", help="kept in the result file")
    parser.add_argument("--out", help="result file")
    options = parser.parse_args()
    options.recompute = options.recompute or options.offload
    return options


def measure(
    config: WanConfig, latent: tuple[int, int, int], dtype: str, platform: Platform, options: argparse.Namespace
) -> list[Row]:
    """Return the rows of one dtype."""
    ours, reference = model_pair(config, DTYPES[dtype], platform)
    inputs = sample(config, latent, DTYPES[dtype], platform)
    gemm = gemm_flops(config, config.num_tokens(latent), DTYPES[dtype], platform)
    peak = platform.peak_flops(DTYPES[dtype])
    if options.lora:
        _add_adapters(ours, reference, options.lora)
    if options.recompute:
        apply_recompute(ours, RecomputePlan(offload=options.offload))
        reference.enable_gradient_checkpointing()
        reference.train()
    rows = []
    for compiled in (False, True) if options.compile else (False,):
        if compiled:
            for block in (*ours.blocks, *reference.blocks):
                block.forward = torch.compile(block.forward)
        cases = forward_cases(ours, reference, inputs, forward_flops(config, latent).total)
        if not options.no_backward:
            cases.append(backward_case(ours, reference, inputs, config, latent, options))
        for case in cases:
            try:
                difference = relative_difference(case.ours(), case.peer())
                mine, theirs = alternate(case.ours, case.peer, options.repeats, Clock(platform))
            except torch.OutOfMemoryError:  # all activations of A14B, for one: --recompute is a run of its own
                print(f"{case.name:32} {dtype:5} left out: does not fit into the device's memory", flush=True)
                _drop_gradients(ours, reference, platform)
                continue
            rows.append(Row(
                case=case.name, dtype=dtype, compiled=compiled, ours_seconds=mine, diffusers_seconds=theirs,
                ratio=theirs / mine, tokens_per_second=config.num_tokens(latent) / mine,
                tflops=case.useful / mine / 1e12, mfu=peak and case.useful / mine / peak,
                hfu=peak and case.executed / mine / peak, share_of_gemm=case.useful / mine / gemm,
                executed_share_of_gemm=case.executed / mine / gemm, ours_peak_gib=peak_gib(case.ours, platform),
                diffusers_peak_gib=peak_gib(case.peer, platform), relative_difference=difference,
            ))
            print_row(rows[-1])
    return rows


def _drop_gradients(ours: nn.Module, reference: nn.Module, platform: Platform) -> None:
    for parameter in (*ours.parameters(), *reference.parameters()):
        parameter.grad = None
    platform.empty_cache()


def limits(
    config: WanConfig, latent: tuple[int, int, int], platform: Platform, dtypes: list[str]
) -> dict[str, object]:
    """Return what this machine can do at best, measured now: matrix products by dtype and copies in memory."""
    tokens = config.num_tokens(latent)
    found: dict[str, object] = {
        f"gemm_tflops_{name}": gemm_flops(config, tokens, DTYPES[name], platform) / 1e12
        for name in dict.fromkeys(dtypes)
    }
    return {**found, "copy_gb_per_second": copy_rate(platform) / 1e9}


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


def _add_adapters(ours: WanDiT, reference: nn.Module, rank: int) -> None:
    """Put fresh adapters on both (B is zero: the outputs stay the same) and freeze the rest."""
    from peft import LoraConfig

    add_adapter(ours, LoraSpec(rank=rank, alpha=float(rank)), dtype=torch.float32)
    init_adapter(ours, 0)
    reference.requires_grad_(False)
    reference.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=PEER_TARGETS))


def sample(config: WanConfig, latent: tuple[int, int, int], dtype: torch.dtype, platform: Platform) -> Inputs:
    """Return random inputs of one sample."""
    generator = torch.Generator().manual_seed(1)
    device = platform.device()
    return Inputs(
        latents=torch.randn(1, config.in_channels, *latent, generator=generator).to(device, dtype),
        timestep=torch.tensor([700.0], device=device),
        text=torch.randn(1, config.text_len, config.text_dim, generator=generator).to(device, dtype),
    )


def forward_cases(ours: WanDiT, reference: nn.Module, inputs: Inputs, flops: float) -> list[Case]:
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

    return [Case("forward", plain, theirs, flops, flops),
            Case("forward, text cached", cached, theirs, flops, flops)]


def backward_case(
    ours: WanDiT, reference: nn.Module, inputs: Inputs, config: WanConfig, latent: tuple[int, int, int],
    options: argparse.Namespace,
) -> Case:  # fmt: skip
    """A training step without the optimizer."""

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

    name = "forward+backward"
    for wanted, text in ((options.lora, f", LoRA {options.lora}"), (options.recompute, ", recompute"),
                         (options.offload, " with inputs on the host")):
        name += text if wanted else ""
    passes = training_flops(config, latent)
    useful = passes * (2 / 3 if options.lora else 1.0)
    again = training_flops(config, latent, recompute=options.recompute) - passes
    return Case(name, run_ours, run_reference, useful, useful + again)


def print_row(r: Row) -> None:
    """Print a case as soon as it is measured."""
    mfu = "" if r.mfu is None else f", MFU {r.mfu:.1%}, HFU {r.hfu:.1%}"
    print(f"{r.case:32} {r.dtype:5} {'compiled' if r.compiled else 'eager':8} ours {r.ours_seconds:8.3f} s,"
          f" diffusers {r.diffusers_seconds:8.3f} s, ratio {r.ratio:5.2f}, {r.tokens_per_second:9.1f} tokens/s,"
          f" {r.tflops:8.3f} TFLOP/s, {r.share_of_gemm:6.1%} of GEMM{mfu}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
