"""What A14B's own code saves at full width and 32,760 tokens, counted on tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plan_memory import LivePeak
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.planning.devices import device
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import saved_activations

LAYERS = 3
LATENT = (21, 60, 104)


def fake_model(config: WanConfig, dtype: torch.dtype) -> WanDiT:
    """Build the DiT on meta and give its parameters fake tensors on the CPU (inside a FakeTensorMode)."""
    with torch.device("meta"):
        model = WanDiT(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    return model


def saved_bytes(config: WanConfig, dtype: torch.dtype, *, recomputed: bool) -> int:
    """Return the bytes alive after a forward pass, beyond parameters, inputs and rotary tables."""
    with FakeTensorMode(), LivePeak() as live:
        model = fake_model(config, dtype)
        if recomputed:
            apply_recompute(model, RecomputePlan())
        latents = torch.randn(1, config.in_channels, *LATENT)
        text = torch.randn(1, config.text_len, config.text_dim, dtype=dtype)
        with torch.no_grad():
            model(latents, torch.full((1,), 500.0), text)  # the rotary tables are kept between steps
        before = live.live
        loss = (model(latents, torch.full((1,), 500.0), text) - latents).square().mean()
        saved = live.live - before
        del loss
    return saved


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_bytes_of_a14b(precision: str, recomputed: bool) -> None:
    config = WanConfig(num_layers=LAYERS)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    job = Job(model=config, latent=LATENT, device=device("910B"), precision=precision, fsdp2=False,  # type: ignore[arg-type]
              recomputed=LAYERS * recomputed, encoders=False, kernels="cpu")
    assert saved_activations(job) == pytest.approx(saved_bytes(config, dtype, recomputed=recomputed), rel=0.005)
