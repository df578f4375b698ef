"""Several sizes and lengths in one run: the right bucket, fair batches, every sample exactly once per epoch."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.data import manifest, plan
from mindspeed_wan.data.buckets import batch_multiples, frame_bucket, size_bucket, standard_sizes, tokens
from mindspeed_wan.data.dataset import ClipDataset, prepare
from mindspeed_wan.data.loader import Schedule, build_loader, micro_batch_keys
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.records import ClipRecord, RowSource
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import DataError
from tests.helpers.odd_media import number_of, numbered_frames, write_stream

SIZES = ((480, 832), (832, 480), (640, 640), (720, 1280))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 832, (480, 832)), (1080, 1920, (720, 1280)), (600, 1066, (480, 832)), (100, 178, (480, 832)),
     (1920, 1080, (832, 480)), (1000, 1000, (640, 640)), (64, 60, (640, 640))],
)
def test_nearest_ratio_without_enlarging(height, width, expected):
    assert size_bucket(height, width, SIZES) == expected
    config = ClipSettings(num_frames=9, size_buckets=SIZES)
    assert plan.size_plan(config, height, width).out == expected


def test_longest_length_that_fits():
    assert [frame_bucket(n, (17, 33, 81)) for n in (17, 32, 33, 80, 500)] == [17, 17, 33, 33, 81]
    with pytest.raises(DataError, match="shortest of frame_buckets is 17"):
        frame_bucket(16, (17, 33))
    config = ClipSettings(num_frames=9, frame_buckets=(5, 13))
    assert [plan.frame_window(config, n, 24, None).take for n in (5, 12, 13, 99)] == [5, 5, 13, 13]


@pytest.mark.parametrize("changes", [{"frame_buckets": (4,)}, {"size_buckets": ((480, 830),)},
                                     {"size_buckets": ((0, 832),)}])
def test_illegal_buckets_name_a_legal_value(changes):
    with pytest.raises(DataError, match="use "):
        ClipSettings(num_frames=9, **changes)


@pytest.mark.parametrize("pixels", [480 * 832, 720 * 1280, 256 * 256])
def test_standard_sizes(pixels):
    sizes = standard_sizes(pixels)
    assert len(set(sizes)) == 5 and all(side % 16 == 0 for size in sizes for side in size)
    assert all(0.8 * pixels < height * width <= pixels for height, width in sizes)


def test_tokens_and_multiples():
    assert tokens((81, 480, 832)) == 32_760 and tokens((81, 720, 1280)) == 75_600 and tokens((1, 480, 832)) == 1_560
    shapes = [(81, 480, 832), (1, 480, 832), (33, 480, 832)]
    assert batch_multiples(shapes) == {shapes[0]: 1, shapes[1]: 21, shapes[2]: 2}


shapes_lists = st.lists(st.tuples(st.sampled_from([(81, 480, 832), (1, 480, 832), (33, 480, 832), (81, 240, 416)]),
                                  st.integers(1, 40)), min_size=1, max_size=4, unique_by=lambda item: item[0])


@given(shapes_lists, st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_balanced_batches_are_fair_and_show_each_sample_once_per_epoch(groups, batch, seed):
    shapes = [shape for shape, count in groups for _ in range(count)]
    multiples = batch_multiples(shapes)
    sampler = GlobalBatchSampler(len(shapes), seed, shapes=shapes, multiples=multiples)
    steps = sum(-(-2 * count // (batch * multiples[shape])) for shape, count in groups)
    most = max(map(tokens, multiples))
    seen: Counter = Counter()
    for step in range(steps):
        keys = sampler.indices(step * batch, batch)
        shape, = {shapes[index] for _, index in keys}
        assert len(keys) == batch * multiples[shape]
        assert most / 2 < tokens(shape) * multiples[shape] <= most
        seen.update(keys)
    assert set(seen.values()) == {1}
    assert all((epoch, index) in seen for epoch in range(2) for index in range(len(shapes)))


@given(st.integers(0, 20), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_balanced_batches_do_not_depend_on_the_layout(start, seed):
    shapes = [(81, 480, 832)] * 5 + [(1, 480, 832)] * 70
    sampler = GlobalBatchSampler(len(shapes), seed, shapes=shapes, multiples=batch_multiples(shapes))
    for ranks, micro in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 2)):
        seen, passes = [], 4 // ranks // micro
        for rank in range(ranks):
            schedule = Schedule(global_batch_size=4, micro_batch_size=micro, rank=rank, ranks=ranks, consumed=4 * start)
            for keys in islice(micro_batch_keys(sampler, schedule), passes):
                seen += keys
        assert seen == sampler.indices(4 * start, 4)


def test_mixed_images_and_videos_load(tmp_path):
    from PIL import Image

    rows = []
    for number in range(4):
        Image.fromarray(numbered_frames(number + 1)[number]).save(tmp_path / f"{number}.png")
        write_stream(tmp_path / f"{number}.mp4", numbered_frames(9))
        rows += [{"path": f"{number}.png", "cap": "still"}, {"path": f"{number}.mp4", "cap": "moving"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ClipSettings(num_frames=9, max_height=64, max_width=96)
    dataset = ClipDataset(prepare(manifest.load(tmp_path / "d.jsonl"), config), config)
    sampler = GlobalBatchSampler(8, 0, shapes=dataset.shapes, multiples=batch_multiples(dataset.shapes))
    seen = Counter()
    for batch in islice(build_loader(dataset, sampler, Schedule(global_batch_size=1)), 8):
        assert batch.video.shape[2:] == ((1, 64, 96) if batch.captions[0] == "still" else (9, 64, 96))
        assert len(batch) == (3 if batch.captions[0] == "still" else 1)
        seen.update(batch.captions)
    assert set(seen) == {"still", "moving"}


def test_chunks_cover_a_long_clip_without_overlap(tmp_path):
    path = write_stream(tmp_path / "a.mp4", numbered_frames(31))
    config = ClipSettings(num_frames=9, max_height=64, max_width=96, frame_choice="chunk")
    record = ClipRecord(path, ("x",), RowSource("f", 1))
    dataset = ClipDataset(prepare([record], config), config)
    assert len(dataset) == 3
    numbers = [number_of(frame) for index in range(3)
               for frame in dataset.read(0, index).permute(1, 2, 3, 0).numpy()]
    assert numbers == list(range(27))


@given(st.integers(1, 300), st.floats(10, 60), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_chunks_at_any_rate_hold_whole_windows(frames, fps, quarter):
    config = ClipSettings(num_frames=4 * quarter + 1, auto_interval=True, frame_choice="chunk")
    record = ClipRecord("x.mp4", ("x",), RowSource("f", 1), num_frames=frames, fps=fps, height=480, width=832)
    pieces = plan.chunks(config, record)
    last = -1
    for piece in pieces:
        window = plan.frame_window(config, frames, fps, piece.cut)
        chosen = plan.choose_frames(window, "chunk", 0.0)
        assert len(chosen) == window.take and chosen[0] >= last
        last = chosen[-1]
    whole = plan.frame_window(config, frames, fps, None)
    assert len(pieces) == len(whole.indices) // whole.take


def test_chunk_samples_are_tensors_of_one_shape(tmp_path):
    path = write_stream(tmp_path / "a.mp4", numbered_frames(30))
    config = ClipSettings(num_frames=9, max_height=64, max_width=96, frame_choice="chunk")
    dataset = ClipDataset(prepare([ClipRecord(path, ("x",), RowSource("f", 1))], config), config)
    stacked = torch.stack([dataset[(0, index)].video for index in range(len(dataset))])
    assert stacked.shape == (3, 3, 9, 64, 96)
