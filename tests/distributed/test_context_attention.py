"""Ulysses, ring and their product: exact attention over ranks, and no byte more than needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mindspeed_wan.parallel.attention import make_attention
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.parallel.tokens import TokenSharding
from mindspeed_wan.platforms import get_platform, ops
from tests.distributed.layouts import Fsdp2, Layout, distributed_step, single_rank_step
from tests.distributed.test_layouts import assert_same_step
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks

BATCH, HEADS, CHANNELS = 2, 4, 8
LAYOUTS = {
    "ulysses-2": (2, {"context": 2}),
    "ulysses-4": (4, {"context": 4}),
    "ring-2": (2, {"context": 2, "ulysses": 1}),
    "ring-3": (3, {"context": 3, "ulysses": 1}),
    "ring-4": (4, {"context": 4, "ulysses": 1}),
    "hybrid-2x2": (4, {"context": 4, "ulysses": 2}),
    "tp2-ring-2": (4, {"tensor": 2, "context": 2, "ulysses": 1}),
}
Sent = dict[str, int]


def _inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(length, BATCH, HEADS, CHANNELS, generator=generator) for _ in range(4)]


def _dense(length: int) -> list[torch.Tensor]:
    q, k, v, grad = _inputs(length)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) * CHANNELS**-0.5
    out = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), v)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def _count_bytes(sent: Sent) -> None:
    """Count what this process sends to others."""
    exchange, point_to_point = dist.all_to_all_single, dist.batch_isend_irecv

    def counted_exchange(output: torch.Tensor, tensor: torch.Tensor, group: Any) -> None:
        sent["exchange"] += tensor.nbytes * (group.size() - 1) // group.size()
        exchange(output, tensor, group=group)

    def counted_passes(operations: list[dist.P2POp]) -> Any:
        sent["ring"] += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return point_to_point(operations)

    dist.all_to_all_single, dist.batch_isend_irecv = counted_exchange, counted_passes


def _attention(
    rank: int, world_size: int, dims: dict[str, int], lengths: tuple[int, ...]
) -> list[tuple[list[torch.Tensor], Sent, Sent]]:
    groups = build_groups(ParallelDims(world_size=world_size, **dims), get_platform("cpu"))
    sent: Sent = {"exchange": 0, "ring": 0}
    _count_bytes(sent)
    results = [_one_attention(groups, length, sent) for length in lengths]
    destroy()
    return results


def _one_attention(groups: ParallelGroups, length: int, sent: Sent) -> tuple[list[torch.Tensor], Sent, Sent]:
    """Return (out, dq, dk, dv) of the whole sequence, and the bytes sent forward and backward."""
    attend, tokens = make_attention(groups), TokenSharding(groups.cp)
    sent.update(exchange=0, ring=0)
    q, k, v, grad = (tokens.split(t) for t in _inputs(length))
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v, length=length)
    forward = dict(sent)
    out.backward(grad)
    backward = {key: sent[key] - forward[key] for key in sent}
    whole = [tokens.gather(t, length).detach() for t in (out, q.grad, k.grad, v.grad)]
    return whole, forward, backward


@pytest.mark.core
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_over_ranks_is_attention(name: str) -> None:
    """Lengths that do not divide, chunks that are all padding, a single token."""
    world_size, dims = LAYOUTS[name]
    lengths = (24, 25, 13, 5, 1)
    for of_rank in run_ranks(_attention, world_size, dims, lengths):
        for length, (results, _, _) in zip(lengths, of_rank):
            for result, reference in zip(results, _dense(length)):
                torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("context", "ulysses"), [(2, 2), (4, 4), (2, 1), (4, 1), (4, 2)])
def test_bytes_sent_are_the_least(context: int, ulysses: int) -> None:
    """Per rank, x = bytes of its q. Ulysses keeps 1/U of q, k, v, o; the ring sends what nobody else has sent it."""
    length = 24
    x = length // context * BATCH * HEADS * CHANNELS * 4
    ring = context // ulysses
    dims = {"context": context, "ulysses": ulysses}
    for ((_, forward, backward),) in run_ranks(_attention, context, dims, (length,)):
        assert forward == {"exchange": 4 * x * (ulysses - 1) // ulysses, "ring": 2 * x * (ring - 1)}
        assert backward == {"exchange": 4 * x * (ulysses - 1) // ulysses, "ring": 4 * x * (ring - 1)}


def _overlapped(rank: int, world_size: int, heads: int, chunks: tuple[int, ...]) -> list[Any]:
    """Return per number of chunks: this rank's results, what every exchange sent, and what happened in which order."""
    groups = build_groups(ParallelDims(world_size=world_size, context=world_size), get_platform("cpu"))
    events: list[str] = []
    sizes: list[int] = []
    exchange, attention = dist.all_to_all_single, ops.attention

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def watched_exchange(output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> Any:
        events.append("start" if options.get("async_op") else "exchange")
        sizes.append(tensor.nbytes)
        work = exchange(output, tensor, **options)
        return work and Watched(work)

    def watched_attention(*args: Any, **options: Any) -> torch.Tensor:
        events.append("attend")
        return attention(*args, **options)

    dist.all_to_all_single, ops.attention = watched_exchange, watched_attention
    generator = torch.Generator().manual_seed(rank)
    q, k, v, grad = (torch.randn(5, BATCH, heads, CHANNELS, generator=generator) for _ in range(4))
    results = []
    for count in chunks:
        attend = make_attention(groups, count)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*inputs, length=5 * world_size - 1)
        out.backward(grad)
        results.append(([out.detach(), *(t.grad for t in inputs)], list(sizes), list(events)))
        sizes.clear()
        events.clear()
    destroy()
    return results


@pytest.mark.core
@pytest.mark.parametrize(("world_size", "heads", "chunks"), [(2, 4, 2), (2, 6, 2), (2, 6, 3), (4, 8, 2), (4, 8, 9)])
def test_groups_of_heads_overlap_and_change_nothing(world_size: int, heads: int, chunks: int) -> None:
    """Uneven groups and more groups than heads included; all bytes sent, none twice, and each ahead of its use."""
    for plain, overlapped in run_ranks(_overlapped, world_size, heads, (1, chunks)):
        groups = min(chunks, heads // world_size)
        for one, other in zip(plain[0], overlapped[0], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
        assert sum(overlapped[1]) == sum(plain[1])
        ahead = ["start", "wait", "attend", "start"]  # the next group's exchange, this group's, its way back
        way_there = ["start", *ahead * (groups - 1), *ahead[1:], *["wait"] * groups]
        assert overlapped[2][: len(way_there)] == way_there
        # Autograd mirrors it: between a start and the wait for it there is always another group's attention.
        turn = ["wait", "start", "wait"]
        way_back = [*["start"] * groups, *turn[:2], *turn * (groups - 2), *turn, "wait"]
        assert overlapped[2][len(way_there) :] == way_back


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, Layout({"context": 2, "ulysses": 1})),
        (4, Layout({"context": 4, "ulysses": 2}, Fsdp2())),
        (4, Layout({"tensor": 2, "sequence_parallel": True, "context": 2, "ulysses": 1}, Fsdp2())),
    ],
    ids=["ring-2", "hybrid-2x2-fsdp4", "tp2-sp-ring-2-fsdp2"],
)
def test_the_model_on_a_ring_equals_one_rank(world_size: int, layout: Layout) -> None:
    weights = mm_state_dict(diffusers_model(TINY), TINY)
    batch = random_batch(TINY)
    expected = single_rank_step(TINY, weights, batch)
    for step in run_ranks(distributed_step, world_size, layout, TINY, (weights, batch, 0.0)):
        assert_same_step(step, expected, batch)
