"""Offloaded inputs of recomputed blocks: the same bits, two of them on the device at most, host memory reused."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel import recompute
from mindspeed_wan.parallel.offload import HostBuffers, InputOffload, ParkedInput
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from mindspeed_wan.platforms.copies import CopyStream
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch

CONFIG = TINY.with_changes(num_layers=6)
BLOCKS = CONFIG.num_layers


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return mm_state_dict(diffusers_model(CONFIG), CONFIG)


@pytest.fixture
def offloads(monkeypatch: pytest.MonkeyPatch) -> list[InputOffload]:
    """Every InputOffload that ``apply_recompute`` makes."""
    made: list[InputOffload] = []

    def make() -> InputOffload:
        made.append(InputOffload())
        return made[-1]

    monkeypatch.setattr(recompute, "InputOffload", make)
    return made


def _model(weights: dict[str, Tensor], plan: RecomputePlan | None) -> WanDiT:
    model = WanDiT(CONFIG)
    model.load_state_dict(weights)
    if plan is not None:
        apply_recompute(model, plan)
    return model


def _gradients(model: WanDiT, grid: tuple[int, int, int] = (1, 4, 6)) -> list[Tensor | None]:
    batch = random_batch(CONFIG, grid)
    model(batch.latents, batch.timestep, batch.text).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "parked"),
    [({}, 6), ({"every_k": 2}, 3), ({"first": 4}, 4), ({"keep_attention": True}, 6),
     ({"patterns": ("predictor.blocks.{1-3}",)}, 3)],
    ids=["all", "every second", "first four", "attention kept", "by name"],
)
def test_gradients_are_the_same_bits(
    options: dict[str, Any], parked: int, weights: dict[str, Tensor], offloads: list[InputOffload]
) -> None:
    expected = _gradients(_model(weights, RecomputePlan(**options)))
    found = _gradients(_model(weights, RecomputePlan(**options, offload=True)))
    assert offloads[-1].parked == parked
    assert all(a is not None and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_frozen_weights_before_the_first_block(weights: dict[str, Tensor], offloads: list[InputOffload]) -> None:
    """LoRA: nothing before the first trained layer needs a gradient, and its input is parked all the same."""
    grads = []
    for plan in (None, RecomputePlan(offload=True)):
        model = _model(weights, plan).requires_grad_(False)
        model.blocks[0].self_attn.proj_q.requires_grad_(True)
        _gradients(model)
        grads.append(model.blocks[0].self_attn.proj_q.weight.grad)
    assert offloads[0].parked == BLOCKS
    assert torch.equal(*grads)


def test_the_device_holds_two_inputs_at_most(weights: dict[str, Tensor], offloads: list[InputOffload]) -> None:
    """Counted by the storages that are alive while blocks run, forward and again in the backward pass."""
    model = _model(weights, RecomputePlan(offload=True))
    inputs: list[weakref.ref[Any]] = []
    alive, counted = [], []

    def came_in(block: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(weakref.ref(args[0].untyped_storage()))

    def works(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        # The first block's input has a name in the model's forward until that returns.
        alive.append(sum(reference() is not None for reference in inputs[1:]))
        counted.append(offloads[0].on_device())

    for block in model.blocks:
        block.register_forward_pre_hook(came_in)
        block.ffn.register_forward_pre_hook(works)
    _gradients(model)
    assert len(alive) == 2 * BLOCKS
    assert max(alive[:BLOCKS]) <= 2  # the one in use; its predecessor has left
    assert max(alive[BLOCKS:]) == 1  # only the last one never left: the others are copies now
    assert max(counted) <= 2
    assert all(reference() is None for reference in inputs)


def test_host_memory_is_used_again(weights: dict[str, Tensor], offloads: list[InputOffload]) -> None:
    model = _model(weights, RecomputePlan(offload=True))
    made: list[int] = []
    stream = CopyStream(torch.device("cpu"))
    host_bytes = stream.host_bytes
    stream.host_bytes = lambda size: made.append(size) or host_bytes(size)  # type: ignore[method-assign]
    offloads[0]._stream = stream
    for grid in ((1, 4, 6), (1, 4, 6), (1, 2, 6)):  # a smaller clip fits into the larger one's memory
        _gradients(model, grid)
    assert len(made) == BLOCKS
    _gradients(model, (1, 6, 6))  # a larger one does not
    assert len(made) == 2 * BLOCKS
    assert len(offloads[0]._host._free) == BLOCKS  # and its memory takes the place of the other


def test_open_forward_passes_in_any_order(weights: dict[str, Tensor]) -> None:
    """As a pipeline opens them: several micro-batches forward before the first goes backward, twice through a graph."""
    expected, model = _model(weights, RecomputePlan()), _model(weights, RecomputePlan(offload=True))
    grads = []
    for one in (expected, model):
        batches = [random_batch(CONFIG, (1, 4, 6), seed=seed) for seed in (1, 2, 3)]
        losses = [one(b.latents, b.timestep, b.text).square().mean() for b in batches]
        for index in (0, 2, 1):
            losses[index].backward(retain_graph=index == 2)
        losses[2].backward()
        grads.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_copies_without_gradients(weights: dict[str, Tensor], offloads: list[InputOffload]) -> None:
    model = _model(weights, RecomputePlan(offload=True))
    batch = random_batch(CONFIG, (1, 4, 6))
    with torch.no_grad():
        model(batch.latents, batch.timestep, batch.text)
    assert offloads[0].parked == 0


def test_buffers_grow_only_where_they_must() -> None:
    stream, buffers = CopyStream(torch.device("cpu")), HostBuffers()
    for size in (8, 16):
        buffers.give(stream.host_bytes(size))
    assert buffers.take(5, stream).nbytes == 8
    assert buffers.take(5, stream).nbytes == 16
    buffers.give(stream.host_bytes(8))
    assert buffers.take(32, stream).nbytes == 32
    assert buffers._free == []


class _Watched(CopyStream):
    """Copies at once, and notes which copies were waited for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.started: list[Tensor] = []
        self.waited: list[int] = []

    def run(self, target: Tensor, source: Tensor) -> int:
        super().run(target, source)
        self.started.append(target)
        return len(self.started) - 1

    def wait(self, event: int) -> None:
        self.waited.append(event)


def test_memory_is_given_up_after_the_copies_that_use_it() -> None:
    """Also that of an input fetched on a wrong guess, whose copy nobody has waited for."""
    stream, x = _Watched(), torch.arange(4.0)
    entry = ParkedInput(x, stream.host_like(x), stream, None)
    entry.leave_device()
    assert stream.waited == [0]
    entry.start_return()
    assert len(stream.started) == 2
    entry.leave_device()
    assert stream.waited == [0, 1] and not entry.is_on_device
    assert torch.equal(entry.take(), x)
