"""Recomputation: which blocks run twice, what memory it saves, and that gradients are the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.parallel.recompute import RecomputePlan, apply_recompute
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch

CONFIG = TINY.with_changes(num_layers=5)


def _model() -> WanDiT:
    model = WanDiT(CONFIG)
    model.load_state_dict(mm_state_dict(diffusers_model(CONFIG), CONFIG))
    return model


def _forward_counts(model: WanDiT) -> list[int]:
    counts = [0] * CONFIG.num_layers
    for i, block in enumerate(model.blocks):
        def count(*_: object, index: int = i) -> None:
            counts[index] += 1

        block.ffn.register_forward_hook(count)
    return counts


@pytest.mark.parametrize(
    ("plan", "twice"),
    [
        (RecomputePlan(), [0, 1, 2, 3, 4]),
        (RecomputePlan(every_k=2), [0, 2, 4]),
        (RecomputePlan(every_k=3), [0, 3]),
        (RecomputePlan(every_k=7), [0]),
        (RecomputePlan(first=2), [0, 1]),
        (RecomputePlan(patterns=("predictor.blocks.{1-2}",)), [1, 2]),
    ],
)
def test_chosen_blocks_run_twice_and_gradients_are_the_same(plan: RecomputePlan, twice: list[int]) -> None:
    batch = random_batch(CONFIG, (1, 4, 6))
    grads = []
    for recomputed in (False, True):
        model = _model()
        if recomputed:
            names = list(model.state_dict())
            apply_recompute(model, plan)
            apply_recompute(model, plan)  # idempotent
            assert list(model.state_dict()) == names
        counts = _forward_counts(model)
        model(batch.latents, batch.timestep, batch.text).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert counts == [2 if i in twice else 1 for i in range(CONFIG.num_layers)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


class _CountAttention(TorchDispatchMode):
    """Counts attention operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "attention" in str(operator) and "backward" not in str(operator)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("plan", "runs"), [(None, 2), (RecomputePlan(), 4), (RecomputePlan(keep_attention=True), 2)])
def test_attention_can_be_kept(plan: RecomputePlan | None, runs: int) -> None:
    """Two attentions per block; recomputed twice as often, unless they are kept. Same gradients."""
    batch = random_batch(CONFIG, (1, 4, 6))
    expected, model = _model(), _model()
    if plan:
        apply_recompute(model, plan)
    counts = _forward_counts(model)
    with _CountAttention() as attention:
        model(batch.latents, batch.timestep, batch.text).square().mean().backward()
    expected(batch.latents, batch.timestep, batch.text).square().mean().backward()
    assert attention.calls == runs * CONFIG.num_layers
    assert counts == [2 if plan else 1] * CONFIG.num_layers
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), expected.parameters()))


def test_frozen_inputs_do_not_switch_it_off() -> None:
    """Under LoRA nothing before the first block needs a gradient; a re-entrant checkpoint would lose all of them."""
    model = _model().requires_grad_(False)
    model.blocks[0].self_attn.proj_q.requires_grad_(True)
    apply_recompute(model, RecomputePlan())
    batch = random_batch(CONFIG, (1, 4, 6))
    model(batch.latents, batch.timestep, batch.text).square().mean().backward()
    assert model.blocks[0].self_attn.proj_q.weight.grad.abs().sum() > 0


def test_it_saves_memory() -> None:
    saved = []
    for plan in (None, RecomputePlan()):
        model = _model()
        if plan:
            apply_recompute(model, plan)
        batch = random_batch(CONFIG, (2, 8, 8))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            model(batch.latents, batch.timestep, batch.text)
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2


def test_no_recomputation_without_gradients() -> None:
    model = _model()
    apply_recompute(model, RecomputePlan())
    batch = random_batch(CONFIG, (1, 4, 6))
    with torch.no_grad():
        assert not model(batch.latents, batch.timestep, batch.text).requires_grad


def test_every_zeroth_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="every 0 blocks"):
        RecomputePlan(every_k=0)
