"""The order of samples: exactly once per epoch, the same for every layout, resumable from one number."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.data.loader import Schedule, micro_batch_keys
from mindspeed_wan.data.sampler import GlobalBatchSampler, rank_slice
from mindspeed_wan.errors import DataError

seeds = st.integers(0, 2**31)


def _take(sampler, batch, steps, start=0):
    return [sampler.indices(start + step * batch, batch) for step in range(steps)]


@given(st.integers(1, 60), st.integers(1, 20), seeds, st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_sample_exactly_once_per_epoch(num_samples, batch, seed, shuffle):
    sampler = GlobalBatchSampler(num_samples, seed, shuffle)
    steps = -(-3 * num_samples // batch)
    keys = [key for keys in _take(sampler, batch, steps) for key in keys]
    for epoch in range(3):
        assert sorted(index for e, index in keys if e == epoch) == list(range(num_samples))
    assert [e for e, _ in keys] == sorted(e for e, _ in keys)


@given(st.integers(1, 50), seeds, st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_the_batch_size_may_change_with_one_shape(num_samples, seed, batches):
    sampler = GlobalBatchSampler(num_samples, seed)
    consumed, keys = 0, []
    for batch in batches:
        keys += sampler.indices(consumed, batch)
        consumed += batch
    assert keys == sampler.indices(0, consumed)


@given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.integers(1, 8), seeds)
@settings(max_examples=60, deadline=None)
def test_buckets_show_every_sample_exactly_once_per_epoch(sizes, batch, seed):
    shapes = [shape for shape, count in enumerate(sizes) for _ in range(count)]
    sampler = GlobalBatchSampler(len(shapes), seed, shapes=shapes)
    steps = sum(-(-3 * size // batch) for size in sizes)
    batches = _take(sampler, batch, steps)
    for keys in batches:
        assert len(keys) == batch and len({shapes[index] for _, index in keys}) == 1
    seen = Counter(key for keys in batches for key in keys)
    assert set(seen.values()) == {1}
    for epoch in range(3):
        assert sorted(index for e, index in seen if e == epoch) == list(range(len(shapes)))


@given(st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(1, 8), seeds)
@settings(max_examples=40, deadline=None)
def test_drop_last_never_mixes_epochs_and_lists_what_it_leaves_out(sizes, batch, seed):
    shapes = [shape for shape, count in enumerate(sizes) for _ in range(count)]
    sampler = GlobalBatchSampler(len(shapes), seed, shapes=shapes, drop_last=True)
    dropped = sampler.dropped_per_epoch(batch)
    per_epoch = {shape: size // batch * batch for shape, size in enumerate(sizes) if size >= batch}
    assert dropped == {shape: sizes[shape] - kept for shape, kept in per_epoch.items() if sizes[shape] != kept}
    seen: Counter = Counter()
    for keys in _take(sampler, batch, 40):
        shape = shapes[keys[0][1]]
        if shape in per_epoch:
            assert len({epoch for epoch, _ in keys}) == 1
        seen.update(keys)
    assert set(seen.values()) == {1}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(0, 30), seeds)
@settings(max_examples=40, deadline=None)
def test_any_layout_and_any_resumption_see_the_same_batches(sizes, start, seed):
    """DP 2 -> 1 -> 4, micro-batches of 1, 4 and 2: the concatenation over ranks is the global batch."""
    shapes = [shape for shape, count in enumerate(sizes) for _ in range(count)]
    sampler = GlobalBatchSampler(len(shapes), seed, shapes=shapes)
    batch, consumed = 4, 4 * start
    for ranks, micro in ((2, 1), (1, 4), (4, 1), (2, 2)):
        expected = sampler.indices(consumed, batch)
        seen = []
        for rank in range(ranks):
            schedule = Schedule(global_batch_size=batch, micro_batch_size=micro, rank=rank, ranks=ranks,
                                consumed=consumed)
            for keys in islice(micro_batch_keys(sampler, schedule), batch // ranks // micro):
                seen += keys
        assert seen == expected == GlobalBatchSampler(len(shapes), seed, shapes=shapes).indices(consumed, batch)
        consumed += batch


def test_the_seed_and_the_epoch_change_the_order():
    orders = [tuple(GlobalBatchSampler(50, seed).indices(start, 50)) for seed in (0, 1) for start in (0, 50)]
    assert len({tuple(index for _, index in order) for order in orders}) == 4


def test_without_shuffle_the_order_is_that_of_the_annotation():
    assert [i for _, i in GlobalBatchSampler(5, 3, shuffle=False).indices(3, 7)] == [3, 4, 0, 1, 2, 3, 4]


def test_the_order_is_pinned():
    """A change of the generator would silently change every resumed run: these values may only change on purpose."""
    assert [i for _, i in GlobalBatchSampler(10, 1234).indices(0, 10)] == PINNED


PINNED = [9, 4, 6, 7, 3, 1, 2, 8, 0, 5]


def test_a_changed_batch_size_with_several_shapes_is_refused():
    sampler = GlobalBatchSampler(10, 0, shapes=[0] * 5 + [1] * 5)
    with pytest.raises(DataError, match="batch size"):
        sampler.indices(6, 4)


def test_a_million_samples_are_quick():
    import time

    start = time.monotonic()
    sampler = GlobalBatchSampler(1_000_000, 0, shapes=[i % 7 for i in range(1_000_000)])
    sampler.indices(64 * 10_000, 64)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("make", [lambda: GlobalBatchSampler(0), lambda: GlobalBatchSampler(2, shapes=[1]),
                                  lambda: rank_slice([(0, 0)] * 3, 0, 2),
                                  lambda: Schedule(global_batch_size=6, micro_batch_size=2, ranks=2)])
def test_impossible_sizes_are_refused(make):
    with pytest.raises(DataError):
        make()
