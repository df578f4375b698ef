"""Samples and micro-batches: the same for every worker count and number of ranks; bad clips replaced and counted."""

from __future__ import annotations

import gc
import json
import os
from itertools import islice

import pytest
import torch

from mindspeed_wan.data import manifest
from mindspeed_wan.data.bad_samples import BadSample, BadSampleLog
from mindspeed_wan.data.build import OpenedData
from mindspeed_wan.data.dataset import ClipDataset, KeyedDataset, prepare
from mindspeed_wan.data.loader import Schedule, build_loader
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.records import ClipRecord, RowSource
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import DataError, ResourceError
from tests.helpers.odd_media import numbered_frames, odd_files, write_stream
from tests.helpers.tiny import tiny_clips

SETTINGS = ClipSettings(num_frames=9, max_height=64, max_width=96)


def _dataset(folder, settings=SETTINGS, seed=0):
    prepared = prepare(manifest.load(folder / "data.txt"), settings, seed=seed)
    return ClipDataset(prepared, settings, seed=seed)


def _sampler(dataset, seed=0):
    return GlobalBatchSampler(len(dataset), seed, shapes=dataset.shapes)


def _steps(dataset, *, workers=0, ranks=1, micro=1, steps=4, consumed=0, batch=4, log=None):
    """Return (key, caption, pixels) of the samples of ``steps`` global batches, in order over the ranks."""
    loaders = [
        build_loader(dataset, _sampler(dataset), Schedule(global_batch_size=batch, micro_batch_size=micro, rank=rank,
                     ranks=ranks, consumed=consumed), num_workers=workers, bad_samples=log)
        for rank in range(ranks)
    ]
    found = []
    for _ in range(steps):
        for loader in loaders:
            for micro_batch in islice(loader, batch // ranks // micro):
                found += zip(micro_batch.keys, micro_batch.captions, micro_batch.video)
    return found


def _same(left, right):
    return len(left) == len(right) and all(
        a[0] == b[0] and a[1] == b[1] and torch.equal(a[2], b[2]) for a, b in zip(left, right)
    )


@pytest.mark.parametrize(("workers", "ranks", "micro"), [(1, 1, 1), (3, 1, 2), (0, 2, 1), (0, 4, 1), (2, 2, 2)])
def test_no_layout_changes_the_samples(workers, ranks, micro):
    dataset = _dataset(tiny_clips())
    assert _same(_steps(dataset, workers=workers, ranks=ranks, micro=micro), _steps(dataset))


def test_resuming_continues_the_order():
    dataset = _dataset(tiny_clips())
    straight = _steps(dataset, steps=6)
    resumed = _steps(dataset, steps=2) + _steps(dataset, steps=3, consumed=8, ranks=2) + _steps(
        dataset, steps=1, consumed=20, ranks=4, workers=1)
    assert _same(straight, resumed)


def test_windows_and_captions_follow_seed_and_epoch():
    dataset, other = _dataset(tiny_clips()), _dataset(tiny_clips(), seed=1)
    samples = [dataset[(epoch, 2)] for epoch in range(6)]
    assert len({sample.video.sum().item() for sample in samples}) > 1  # the window moves from epoch to epoch
    assert torch.equal(dataset[(3, 2)].video, samples[3].video)
    assert any(not torch.equal(other[(epoch, 2)].video, samples[epoch].video) for epoch in range(6))


def test_caption_dropout_and_choice():
    settings = ClipSettings(num_frames=9, max_height=64, max_width=96, caption_dropout=0.3)
    dataset = _dataset(tiny_clips(), settings)
    captions = [dataset.caption(0, dataset.caption_choice(epoch, 0)) for epoch in range(400)]
    share = captions.count("") / len(captions)
    assert 0.2 < share < 0.4 and set(captions) == {"", dataset.records[0].captions[0]}


def test_spawned_workers_give_the_same():
    dataset = _dataset(tiny_clips())
    schedule = Schedule(global_batch_size=2)
    loader = build_loader(dataset, _sampler(dataset), schedule, num_workers=1, start_method="spawn")
    spawned = [(batch.keys[0], batch.captions[0], batch.video[0]) for batch in islice(loader, 4)]
    assert _same(spawned, _steps(dataset, batch=2, steps=2))


# ---- bad clips -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Eight clips of which number 3 does not decode."""
    folder = tiny_clips(tmp_path)
    text = (folder / "data.txt").read_text().replace(str(tiny_clips()), str(folder))
    (folder / "data.txt").write_text(text)
    bad = folder / "videos" / "clip_0003.mp4"
    bad.write_bytes(bad.read_bytes()[:900])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_is_replaced_and_the_others_keep_their_places(damaged, tmp_path, workers):
    dataset = _dataset(damaged)
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", len(dataset), 0.2)
    found, good = _steps(dataset, workers=workers, log=log), _steps(_dataset(tiny_clips()))
    assert [key for key, *_ in found] == [key for key, *_ in good]
    for left, right in zip(found, good):
        if left[0][0] != 3:
            assert left[1] == right[1] and torch.equal(left[2], right[2])
        else:
            assert not torch.equal(left[2], right[2])
    assert _same(found, _steps(dataset, ranks=2, log=BadSampleLog(None, 8, 0.2)))
    line, = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["index"] == 3 and record["where"].endswith("data.jsonl:4") and "cannot" in record["reason"]


def test_above_the_limit_the_run_stops(damaged):
    with pytest.raises(DataError, match=r"clip_0003\.mp4.*1 of 8 clips.*max_bad_fraction 0\.1") as caught:
        _steps(_dataset(damaged), log=BadSampleLog(None, 8, 0.1))
    assert caught.value.exit_code == 7 and "data.jsonl:4" in str(caught.value)
    with pytest.raises(DataError):
        _steps(_dataset(damaged))


def test_all_bad_stops_instead_of_searching_for_ever(damaged):
    dataset = _dataset(damaged)
    for clip in (damaged / "videos").iterdir():
        clip.write_bytes(b"junk")
    with pytest.raises(DataError, match="replacements cannot be read either"):
        _steps(dataset, log=BadSampleLog(None, 8, 1.0))


def test_one_clip_that_is_bad(tmp_path):
    folder = tiny_clips(tmp_path, num_clips=1)
    (folder / "data.txt").write_text(f"{folder},data.jsonl\n")
    dataset = _dataset(folder)
    next((folder / "videos").iterdir()).write_bytes(b"junk")
    with pytest.raises(DataError, match="0 replacements"):
        _steps(dataset, log=BadSampleLog(None, 1, 1.0), batch=1)


def test_ranks_share_the_count_through_the_file(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first, second = BadSampleLog(path, 10, 0.25), BadSampleLog(path, 10, 0.25)
    first.add([BadSample(1, "a", "f:1", "torn")])
    second.add([BadSample(1, "a", "f:1", "torn")])
    second.add([BadSample(2, "b", "f:2", "torn")])
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"index": 9, "pa')  # another rank is just writing
    with pytest.raises(DataError, match="3 of 10"):
        first.add([BadSample(3, "c", "f:3", "torn")])


def test_what_an_earlier_start_found_does_not_count(tmp_path):
    """Its clips may be mended by now; those that are not are found again."""
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, 10, 0.25).add([BadSample(1, "a", "f:1", "torn"), BadSample(2, "b", "f:2", "torn")])
    first, second = BadSampleLog(path, 10, 0.25), BadSampleLog(path, 10, 0.25)
    first.add([BadSample(3, "c", "f:3", "torn")])
    second.add([BadSample(2, "b", "f:2", "torn")])
    assert list(second.found) == [3, 2] and len(path.read_text().splitlines()) == 4
    with pytest.raises(DataError, match="3 of 10"):
        first.add([BadSample(4, "d", "f:4", "torn")])


def test_what_every_rank_finds_at_start_up_is_written_once(tmp_path):
    record = ClipRecord(tmp_path / "torn.mp4", ("x",), RowSource("d.jsonl", 3))
    dataset = KeyedDataset([("x",)] * 4, [(1, 16, 16)] * 4, 0, 0.0)
    data = OpenedData(dataset, GlobalBatchSampler(len(dataset)), unreadable=[(record, "torn")])
    logs = [data.bad_sample_log(tmp_path / "bad.jsonl", 0.5, is_first=rank == 0) for rank in (1, 0, 2)]
    assert all(list(log.found) == [4] for log in logs)
    logs[0].add([BadSample(1, "b.mp4", "d.jsonl:2", "torn")])
    assert [json.loads(line)["index"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [4, 1]


def test_a_wrong_annotation_is_a_bad_clip(tmp_path):
    write_stream(tmp_path / "a.mp4", numbered_frames(9))
    write_stream(tmp_path / "b.mp4", numbered_frames(9))
    rows = [
        {"path": "a.mp4", "cap": "x", "num_frames": 60, "fps": 24, "resolution": [64, 96]},
        {"path": "b.mp4", "cap": "x", "num_frames": 9, "fps": 24, "resolution": [640, 960]},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    settings = ClipSettings(num_frames=9, force_resolution=False, min_pixels=1, frame_choice="center")
    dataset = ClipDataset(prepare(manifest.load(tmp_path / "d.json"), settings), settings)
    long, wide = dataset[(0, 0)], dataset[(0, 1)]
    assert "has 9 frames" in long.bad[0].reason
    assert "640x960 is not the file's 64x96" in wide.bad[0].reason


# ---- preparation -----------------------------------------------------------------------------------------------------


def test_missing_metadata_is_probed_and_odd_files_train(tmp_path):
    files = odd_files(tmp_path)
    rows = [{"path": str(path), "cap": name} for name, (path, *_) in files.items()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ClipSettings(num_frames=21, force_resolution=False, min_pixels=1)
    prepared = prepare(manifest.load(tmp_path / "d.jsonl"), settings)
    assert not prepared.excluded and not prepared.unreadable and len(prepared.records) == len(files)
    dataset = ClipDataset(prepared, settings)
    for index, (name, (_, count, height, width)) in enumerate(files.items()):
        sample = dataset[(0, index)]
        assert not sample.bad and sample.caption == name
        assert sample.video.shape == (3, count, height // 16 * 16, width // 16 * 16), name


def test_images_are_clips_of_one_frame(tmp_path):
    from PIL import Image

    Image.fromarray(numbered_frames(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"path": "a.png", "cap": "still"}))
    dataset = ClipDataset(prepare(manifest.load(tmp_path / "d.jsonl"), SETTINGS), SETTINGS)
    assert dataset.shapes == [(1, 64, 96)] and dataset[(0, 0)].video.shape == (3, 1, 64, 96)


def test_left_out_clips_are_listed_with_their_reason(tmp_path):
    write_stream(tmp_path / "a.mp4", numbered_frames(9))
    write_stream(tmp_path / "wide.mp4", numbered_frames(9, 16, 640))
    (tmp_path / "torn.mp4").write_bytes(b"junk")
    rows = [{"path": name, "cap": "x"} for name in ("a.mp4", "wide.mp4", "torn.mp4")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(manifest.load(tmp_path / "d.jsonl"), SETTINGS)
    assert [record.path.name for record in prepared.records] == ["a.mp4"]
    (left, reason), = prepared.excluded
    assert left.path.name == "wide.mp4" and "side ratio" in reason
    assert prepared.unreadable[0][0].path.name == "torn.mp4"


def test_nothing_left_says_why(tmp_path):
    write_stream(tmp_path / "a.mp4", numbered_frames(5))
    (tmp_path / "d.jsonl").write_text(json.dumps({"path": "a.mp4", "cap": "x"}))
    with pytest.raises(DataError, match=r"none of the 1 clips(.|\n)*d\.jsonl:1: .*min_num_frames is 9"):
        prepare(manifest.load(tmp_path / "d.jsonl"), ClipSettings(num_frames=9, min_num_frames=9))


def test_drop_short_ratio(tmp_path):
    records = manifest.load(tiny_clips() / "data.txt")
    long_settings = ClipSettings(num_frames=49, max_height=64, max_width=96)
    assert len(prepare(records, long_settings).records) == 8
    with pytest.raises(DataError, match="drop_short_ratio"):
        prepare(records, long_settings, drop_short_ratio=1.0)


class Collecting(ClipDataset):
    """A data set whose workers collect garbage all the time."""

    def __getitem__(self, key):
        gc.collect()
        return super().__getitem__(key)


@pytest.mark.timeout(60)
def test_workers_do_not_free_what_they_inherit():
    """Frames converted by FFmpeg's own threads, in a cycle: freed in a forked worker they would wait for ever."""
    import av

    gc.disable()
    try:
        with av.open(str(next((tiny_clips() / "videos").iterdir()))) as container:
            frames = list(container.decode(video=0))
        cycle = [frame.reformat(format="gbrp") for frame in frames] + frames
        cycle.append(cycle)
        del cycle, frames
        prepared = prepare(manifest.load(tiny_clips() / "data.txt"), SETTINGS)
        dataset = Collecting(prepared, SETTINGS)
        loader = build_loader(dataset, _sampler(dataset), Schedule(global_batch_size=2), num_workers=2)
        assert len(list(islice(loader, 6))) == 6
    finally:
        gc.enable()


def _die(dataset, key):
    os._exit(9)


def test_a_dead_worker_is_named(monkeypatch):
    dataset = _dataset(tiny_clips())
    monkeypatch.setattr(ClipDataset, "__getitem__", _die)
    loader = build_loader(dataset, _sampler(dataset), Schedule(global_batch_size=1), num_workers=1)
    with pytest.raises(ResourceError, match="data worker died"):
        next(loader)
