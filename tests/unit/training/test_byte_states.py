"""8-bit moments: what they lose, what they weigh, that they resume exactly, and that training with them converges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mindspeed_wan.training.byte_states import BLOCK, TABLES, ByteStates, decode, encode
from mindspeed_wan.training.optimizer import AdamW, ResidentStates, States

KINDS = tuple(TABLES)


def _values(kind: str, shape: tuple[int, ...] = (40, 3, 200)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** (torch.randn(shape, generator=generator) / 2)
    values = torch.randn(shape, generator=generator) * scale
    return values if kind == "exp_avg" else values.square()


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 256), (40, 3, 200), (1, 6, 96), (7, 1)])
def test_error_is_relative_and_a_second_coding_changes_nothing(kind: str, shape: tuple[int, ...]) -> None:
    table, values = TABLES[kind], _values(kind, shape)
    stored = encode(values, table, None)
    decoded = decode(stored, table)
    assert stored.codes.dtype == torch.uint8 and stored.codes.shape == decoded.shape == values.shape
    scales = stored.scales.repeat_interleave(BLOCK, 1)[:, : values[0].numel()].reshape(values.shape)
    in_range = values.abs() > scales * float(table[table > 0][0])
    assert ((decoded - values).abs()[in_range] <= 0.05 * values.abs()[in_range]).all()
    again = encode(decoded, table, None)
    assert torch.equal(again.codes, stored.codes) and torch.equal(again.scales, stored.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_random_rounding_has_the_right_mean(kind: str) -> None:
    table, values = TABLES[kind], _values(kind, (8, 256))
    generator = torch.Generator().manual_seed(1)
    mean = torch.stack([decode(encode(values, table, generator), table) for _ in range(400)]).mean(0)
    assert ((mean - values) / values).median().abs() < 1e-3
    assert (mean - values).sum().abs() / values.abs().sum() < 1e-3


def test_a_second_moment_does_not_become_zero() -> None:
    """The step divides by its root: zero instead of 1e-12 would be a step of a million."""
    values = torch.full((2, 256), 1e-12)
    values[:, 0] = 1.0
    values[:, 1] = 0.0
    generator = torch.Generator().manual_seed(0)
    decoded = decode(encode(values, TABLES["exp_avg_sq"], generator), TABLES["exp_avg_sq"])
    assert (decoded[:, 2:] > 0).all() and (decoded[:, 1] == 0).all()


def test_a_slow_average_moves() -> None:
    """One part in a thousand per step, a hundredth of the table's spacing: rounded to the nearest it would stand."""
    table, generator = TABLES["exp_avg_sq"], torch.Generator().manual_seed(0)
    stored = {True: encode(torch.ones(16, 256), table, None), False: encode(torch.ones(16, 256), table, None)}
    for _ in range(1000):
        for random, part in stored.items():
            value = decode(part, table) * 0.999
            value[:, 0] = 1.0  # keeps the block's scale
            stored[random] = encode(value, table, generator if random else None)
    moved, stood = (decode(part, table)[:, 1:].mean().item() for part in stored.values())
    assert moved == pytest.approx(0.999**1000, rel=0.03)
    assert stood > 0.9


def _student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 16))


def _final_loss(states: Callable[[Mapping[str, Tensor]], States], steps: int) -> tuple[float, float]:
    """Fit a fixed random network; returns the mean squared error before and after."""
    net, teacher = _student(0), _student(1).requires_grad_(False)
    optimizer = AdamW(net.named_parameters(), states=states)
    generator = torch.Generator().manual_seed(2)
    first = last = 0.0
    for step in range(steps):
        x = torch.randn(128, 64, generator=generator)
        loss = (net(x) - teacher(x)).square().mean()
        loss.backward()
        optimizer.step(2e-3 * (1 - step / steps), 0.01)
        optimizer.zero_grad()
        first = first or loss.item()
        last = 0.9 * last + 0.1 * loss.item() if last else loss.item()
    return first, last


@pytest.mark.core
def test_training_converges_like_fp32() -> None:
    """The final loss is within 10 % of fp32 AdamW's, after both have come down by a factor of five or more."""
    (first, exact), (_, bytes_) = (_final_loss(s, 150) for s in (ResidentStates, partial(ByteStates, smallest=256)))
    print(f"first {first:.5f}, fp32 {exact:.6f}, 8 bits {bytes_:.6f}")
    assert exact < first / 5
    assert bytes_ < 1.1 * exact


def test_two_bytes_per_parameter() -> None:
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.LayerNorm(512))
    optimizer = AdamW(net.named_parameters(), states=ByteStates)
    assert isinstance(optimizer.states, ByteStates)
    weights, norms = 512 * 512, 2 * 512
    assert optimizer.states.stored_bytes == 2 * weights * (1 + 4 / BLOCK) + 8 * norms


def _run(net: nn.Module, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(1e-2, 0.1)


def test_a_resumed_run_is_the_same_bits() -> None:
    """What a checkpoint holds is fp32; put back, it becomes the same bytes, and rounding goes on with the same dice."""
    nets = [_student(3) for _ in range(2)]
    straight, first = (AdamW(n.named_parameters(), states=partial(ByteStates, batch_bytes=1)) for n in nets)
    _run(nets[0], straight, range(6))
    _run(nets[1], first, range(3))
    resumed = AdamW(nets[1].named_parameters(), states=ByteStates)
    copies = resumed.moments()
    for name, moments in first.moments().items():
        for kind, value in moments.items():
            copies[name][kind].copy_(value)
    resumed.take_moments(copies)
    resumed.steps = first.steps
    _run(nets[1], resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_masters_of_bf16_parameters() -> None:
    net = nn.Linear(256, 256).bfloat16()
    optimizer = AdamW(net.named_parameters(), states=ByteStates)
    before = optimizer.masters()["weight"].clone()
    assert before.dtype == torch.float32 and set(optimizer.masters()) == {"weight", "bias"}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-5, 0.0)
    torch.testing.assert_close(optimizer.masters()["weight"], before - 1e-5)
