"""Optimizer state on the host: the same bits as resident state, for any share of it and any batch size."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_wan.platforms.copies import CopyStream
from mindspeed_wan.training.host_states import HostStates
from mindspeed_wan.training.optimizer import AdamW, in_batches
from tests.unit.training.test_optimizer import give_gradients, model


class Counting(CopyStream):
    """Counts copies, and what is away from home at the same time."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.copies = 0

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.copies += 1
        return super().start(target, source)


def _train(optimizer: AdamW, net: torch.nn.Module, steps: int = 4) -> None:
    for step in range(steps):
        give_gradients(net, step)
        if step == 2:
            net[0].bias.grad = None  # a parameter without a gradient stays as it is
        optimizer.step(1e-2, 0.1)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("fraction", "batch_bytes"), [(1.0, 1 << 20), (1.0, 1), (0.5, 300), (0.0, 1)])
def test_the_same_bits_as_resident(dtype: torch.dtype, fused: bool, fraction: float, batch_bytes: int) -> None:
    nets = model(dtype), model(dtype)
    keeper = partial(HostStates, fraction=fraction, batch_bytes=batch_bytes)
    resident = AdamW(nets[0].named_parameters(), fused=fused)
    offloaded = AdamW(nets[1].named_parameters(), fused=fused, states=keeper)
    for optimizer, net in zip((resident, offloaded), nets):
        _train(optimizer, net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, moments in resident.moments().items():
        for kind, value in moments.items():
            assert torch.equal(offloaded.moments()[name][kind], value), (name, kind)
    for name, master in resident.masters().items():
        assert torch.equal(offloaded.masters()[name], master)


def test_fraction_is_what_moves() -> None:
    net = model()
    total = sum(p.numel() for p in net.parameters())
    for fraction in (0.0, 0.3, 1.0):
        stream = Counting()
        optimizer = AdamW(net.named_parameters(), states=partial(HostStates, fraction=fraction, stream=stream))
        assert isinstance(optimizer.states, HostStates)
        share = optimizer.states.host_bytes / (8 * total)
        largest = max(p.numel() for p in net.parameters()) / total
        assert fraction <= share <= min(1.0, fraction + largest)
        _train(optimizer, net, steps=1)
        assert stream.copies == 4 * len(optimizer.states._on_host)  # two moments, there and back


def test_at_most_three_batches_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One goes, one is worked on, one comes."""
    import weakref

    made: list[weakref.ref[Tensor]] = []
    empty_like = torch.empty_like

    def remembered(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty_like(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(6)))
    keeper = HostStates({n: p.detach() for n, p in net.named_parameters()}, batch_bytes=1)
    monkeypatch.setattr(torch, "empty_like", remembered)
    alive = [sum(reference() is not None for reference in made) for _ in keeper.batches(list(keeper.moments()), 1)]
    assert len(alive) == 6
    assert max(alive) <= 2 * 3


def test_batches_keep_tensors_whole_and_in_order() -> None:
    assert in_batches({"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert in_batches({}, 6) == []
