"""Finishing gradients on one rank: norm, clip, and values that are not numbers. (Many ranks: tests/distributed.)"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mindspeed_wan.parallel import grads
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups


def _model(*values: float | None) -> nn.Module:
    model = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in values)
    for parameter, value in zip(model, values):
        parameter.grad = None if value is None else torch.full((4,), value)
    return model


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
def test_norm_and_clip_equal_torch(max_norm: float) -> None:
    ours, reference = _model(3.0, -4.0, None), _model(3.0, -4.0, None)
    norm = finish_grads(ours, ParallelGroups(), max_norm)
    assert norm == pytest.approx(10.0)
    if max_norm:
        nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    for a, b in zip(ours, reference):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_is_reported_not_hidden(value: float) -> None:
    norm = finish_grads(_model(1.0, value), ParallelGroups(), 1.0)
    assert not math.isfinite(norm)


def test_nothing_trained_has_norm_zero() -> None:
    assert finish_grads(_model(None), ParallelGroups(), 1.0) == 0.0


def test_buckets_keep_order_and_bound_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grads, "BUCKET_ELEMENTS", 10)
    tensors = [torch.zeros(n) for n in (4, 4, 4, 30, 1)] + [torch.zeros(2, dtype=torch.bfloat16)]
    assert [[t.numel() for t in bucket] for bucket in grads._buckets(tensors)] == [[4, 4], [4], [30], [1], [2]]
