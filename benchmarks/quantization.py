"""Weights in 8 bits: bytes held, error and time of one forward pass by mode, torchao's own modes in the same run.

    python benchmarks/quantization.py                       # 4 blocks of width 768, 1,560 tokens

Error is |v - v32| / |v32| of the velocity against the fp32 model; ``added`` compares with the same model in bf16
arithmetic, so it is what the 8 bits cost. Rounds of all modes take turns and the fastest counts; on a CPU seconds are
this process's processor time on one thread, so that other programs do not count. torchao (``peer``) quantises the same
``nn.Linear`` layers; it is not needed to run the modes, and is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.quantization import check_device, quantize_layers, weight_views
from mindspeed_wan.models.quantization_spec import MODES, QuantizationSpec, expert_bytes
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan, init_weights
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.platforms.base import Platform

CONFIG = WanConfig(num_layers=4, dim=768, ffn_dim=2048, num_heads=6, text_dim=512, freq_dim=256)
LATENT = (16, 3, 40, 52)
ROUNDS = 3
PEERS = {"fp8_weight_only": "Float8WeightOnlyConfig", "int8_weight_only": "Int8WeightOnlyConfig",
         "fp8_dynamic": "Float8DynamicActivationFloat8WeightConfig"}


def reference_model(platform: Platform) -> WanDiT:
    """Return the fp32 model; its head is not zero, so that its velocity is not."""
    model = build_wan(CONFIG, platform=platform, residual_dtype=torch.float32)
    init_weights(model, seed=0)
    with torch.no_grad():
        model.head.head.weight.copy_(torch.randn(model.head.head.weight.shape, generator=torch.Generator()) * 0.02)
    return model.requires_grad_(False).eval()


def variant(reference: WanDiT, platform: Platform, mode: str | None) -> WanDiT:
    """Return the bf16 model with the reference's weights, in 8 bits if ``mode`` says so."""
    spec = QuantizationSpec(mode) if mode else None
    model = build_wan(CONFIG, platform=platform, param_dtype=torch.bfloat16, residual_dtype=torch.float32,
                      modify=None if spec is None else lambda built: _quantize(built, spec))
    for name, view in weight_views(model).items():
        weight = reference.get_parameter(name).detach()
        if isinstance(view, Tensor):
            view.copy_(weight)
        else:
            view.fill(weight)
    return model.requires_grad_(False).eval()


def _quantize(model: WanDiT, spec: QuantizationSpec) -> None:
    quantize_layers(model, spec)


def peer(plain: WanDiT, mode: str) -> WanDiT:
    """Return the bf16 model quantised by torchao."""
    import torchao.quantization as torchao

    model = copy.deepcopy(plain)
    torchao.quantize_(model.blocks, getattr(torchao, PEERS[mode])(), lambda m, _: isinstance(m, nn.Linear))
    return model


def forward(model: WanDiT, device: torch.device) -> Callable[[], Tensor]:
    """Return a call that computes one velocity of a fixed input."""
    generator, dtype = torch.Generator().manual_seed(1), model.patch_embedding.weight.dtype
    latents = torch.randn(1, *LATENT, generator=generator).to(device, dtype)
    text = torch.randn(1, 64, CONFIG.text_dim, generator=generator).to(device, dtype)
    timestep = torch.tensor([700.0], device=device)
    context = model.encode_text(text)
    return lambda: model(latents, timestep, text_context=context)


def seconds(call: Callable[[], Tensor], platform: Platform) -> float:
    """Return the time of one call."""
    clock = time.process_time if platform.device_type == "cpu" else time.perf_counter
    platform.synchronize()
    started = clock()
    call()
    platform.synchronize()
    return clock() - started


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.no_grad()
def measure(platform: Platform) -> list[dict[str, Any]]:
    """Return one row per mode, torchao's beside ours."""
    reference = reference_model(platform)
    models: dict[str, WanDiT] = {"bf16": variant(reference, platform, None)}
    for mode in MODES:
        try:
            check_device(mode, platform.device())
        except ConfigError as refusal:
            print(f"left out: {refusal.message}")
            continue
        models[mode] = variant(reference, platform, mode)
        if find_spec("torchao") is not None:
            models[f"{mode}, torchao"] = peer(models["bf16"], mode)
    calls = {name: forward(model, platform.device()) for name, model in models.items()}
    exact = forward(reference, platform.device())()
    velocities = {name: call() for name, call in calls.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call, platform))
    best = {name: min(values) for name, values in times.items()}
    return [
        {"mode": name, "weights_mb": round(held_bytes(models[name]) / 1e6, 2),
         "error": relative(velocities[name], exact), "added": relative(velocities[name], velocities["bf16"]),
         "seconds": round(best[name], 3), "times_bf16": round(best[name] / best["bf16"], 2)} for name in models
    ]


def held_bytes(model: WanDiT) -> int:
    """Return the bytes of the weights; torchao's subclasses say what they hold through their parts."""
    total = 0
    for parameter in model.parameters():
        parts = getattr(parameter, "tensor_data_names", None)
        names = [*parts, *getattr(parameter, "optional_tensor_data_names", [])] if parts else []
        tensors = [part for name in names if isinstance(part := getattr(parameter, name, None), Tensor)]
        total += sum(part.numel() * part.element_size() for part in tensors or [parameter])
    return total


def expert_sizes() -> list[dict[str, Any]]:
    """Return what one A14B expert takes, from its table of parameters."""
    config = PRESETS["t2v-A14B"]
    rows = [{"held in": name, "gb": round(expert_bytes(config, element=element) / 1e9, 2)}
            for name, element in (("fp32", 4), ("bf16", 2))]
    for mode in MODES:
        spec = QuantizationSpec(mode)
        rows.append({"held in": mode, "gb": round(expert_bytes(config, element=2, quantization=spec) / 1e9, 2)})
    return rows


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantization.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    platform = get_platform()
    platform.activate()
    tokens = CONFIG.num_tokens(LATENT[1:])
    rows = measure(platform)
    for row in rows:
        print(row)
    result = {
        "command": shlex.join(["python", *sys.argv]), "machine": platform.device_name(), "torch": torch.__version__,
        "model": f"{CONFIG.num_layers} blocks of width {CONFIG.dim}, {tokens} tokens",
        "threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1),
        "one A14B expert": expert_sizes(), "forward pass": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
