"""AdamW against torch.optim.AdamW, its weight-decay rule, and fp32 masters under bf16 parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.optimizer import AdamW


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    net.register_parameter("modulation", nn.Parameter(torch.randn(1, 6, 5)))
    return net.to(dtype)


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("fused", [False, True])
def test_equals_torch_with_megatrons_groups(fused: bool) -> None:
    ours, theirs = model(), model()
    optimizer = AdamW(ours.named_parameters(), betas=(0.9, 0.95), eps=1e-6, fused=fused)
    groups = [{"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, fused=fused)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(1e-2, 0.1)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_masters_keep_updates_that_bf16_would_lose() -> None:
    net = model(torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    optimizer = AdamW(net.named_parameters())
    for _ in range(100):  # each step moves the weight by 1e-5, far below half a bf16 unit in the last place at 1.0
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-5, 0.0)
    master = optimizer.masters()["0.weight"]
    assert master is not net[0].weight and master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full_like(master, 1.0 - 1e-3), rtol=1e-5, atol=0)
    assert net[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(net[0].weight, master.bfloat16(), rtol=0, atol=0)


def test_fp32_parameters_are_their_own_masters() -> None:
    net = model()
    optimizer = AdamW(net.named_parameters())
    assert optimizer.states.masters() == {}
    assert optimizer.masters()["0.weight"].data_ptr() == net[0].weight.data_ptr()


def test_frozen_parameters_have_no_state_and_stay() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = AdamW(net.named_parameters())
    give_gradients(net, 0)
    optimizer.step(1.0, 0.1)
    assert "0.weight" not in optimizer.moments()
    assert torch.equal(net[0].weight, before)


def test_ema_follows_the_masters() -> None:
    net = model(torch.bfloat16)
    optimizer = AdamW(net.named_parameters())
    ema = Ema(optimizer.masters(), decay=0.9)
    expected = {n: w.clone() for n, w in optimizer.masters().items()}
    for step in range(30):
        give_gradients(net, step)
        optimizer.step(1e-2, 0.0)
        ema.update(optimizer.masters())
        decay = min(0.9, (2 + step) / (11 + step))
        expected = {n: decay * e + (1 - decay) * optimizer.masters()[n] for n, e in expected.items()}
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-6)
