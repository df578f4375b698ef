"""The feature cache: equal to encoding online, resumable, shared by processes, never stale."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.data import feature_build, feature_cache, manifest
from mindspeed_wan.data.bad_samples import BadSampleLog
from mindspeed_wan.data.build import OpenedData
from mindspeed_wan.data.dataset import ClipDataset, prepare
from mindspeed_wan.data.feature_build import Builder, WanEncoders
from mindspeed_wan.data.feature_cache import EncoderChoice, make_identity
from mindspeed_wan.data.features import FeatureDataset
from mindspeed_wan.data.loader import Schedule, build_loader
from mindspeed_wan.data.mm_features import MMFeatureDataset
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.errors import CheckpointError, ConfigError, DataError, ResourceError
from mindspeed_wan.models.vae import unit_range
from tests.faults.saves import file_size_limit
from tests.helpers.tiny import tiny_clips, tiny_pipeline_folder

SETTINGS = ClipSettings(num_frames=9, max_height=32, max_width=48, caption_dropout=0.3)


def choice(folder: Path | None = None, **changes) -> EncoderChoice:
    folder = folder or tiny_pipeline_folder()
    return EncoderChoice(**{"vae": str(folder / "vae"), "text_encoder": str(folder / "text_encoder"), **changes})


def clips(folder: Path, settings=SETTINGS) -> ClipDataset:
    return ClipDataset(prepare(manifest.load(folder / "data.txt"), settings), settings)


def private_clips(tmp_path: Path, **options) -> Path:
    folder = tiny_clips(tmp_path, **options)
    (folder / "data.txt").write_text(f"{folder},data.jsonl\n")
    return folder


def build(out: Path, dataset: ClipDataset, *, task="t2v", encoders=None, variants=1, shard_samples=3, **options):
    encoders = encoders or choice()
    identity = make_identity(task, dataset.settings, dataset.seed, variants, encoders)
    return Builder(out, dataset, identity, lambda: WanEncoders(encoders, "cpu"), shard_samples=shard_samples,
                   **options).run()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "t2v"
    report = build(out, clips(tiny_clips()))
    assert (report.shards, report.samples, report.bad, report.is_complete) == (3, 8, 0, True)
    return out


def _batches(dataset, steps=4, **options):
    sampler = GlobalBatchSampler(len(dataset), 0, shapes=dataset.shapes)
    return list(islice(build_loader(dataset, sampler, Schedule(global_batch_size=2, micro_batch_size=2, **options)),
                       steps))


def test_cached_equals_online_bit_for_bit(cache):
    """The first epoch, captions and dropped captions included: 4 batches of 2 from 8 clips."""
    encoders = WanEncoders(choice(), "cpu")
    online, cached = _batches(clips(tiny_clips())), _batches(FeatureDataset(cache, caption_dropout=0.3))
    assert "" in [caption for batch in online for caption in batch.captions]
    for left, right in zip(online, cached):
        assert left.keys == right.keys and left.captions == right.captions and left.paths == right.paths
        for clip, caption, latents, text in zip(left.video, left.captions, right.latents, right.text):
            assert torch.equal(encoders.encode_clip(clip), latents) and latents.dtype == torch.float32
            assert torch.equal(encoders.encode_text(caption), text) and text.dtype == torch.bfloat16


def test_i2v_condition_is_the_first_frame_followed_by_grey(tmp_path):
    folder = tiny_pipeline_folder(task="i2v")
    build(tmp_path / "c", clips(tiny_clips()), task="i2v", encoders=choice(folder))
    dataset, online = FeatureDataset(tmp_path / "c"), clips(tiny_clips())
    sample, video = dataset[(0, 5)], unit_range(online[(0, 5)].video)
    still = torch.cat((video[:, :1], torch.zeros_like(video[:, 1:])), dim=1)
    encoders = WanEncoders(choice(folder), "cpu")
    assert torch.equal(sample.condition, encoders.encode_clip(still))
    assert dataset.collate([sample, sample]).condition.shape == (2, *sample.latents.shape)


def test_variants_hold_one_draw_an_epoch(tmp_path):
    build(tmp_path / "c", clips(tiny_clips()), variants=2)
    dataset, online, encoders = FeatureDataset(tmp_path / "c"), clips(tiny_clips()), WanEncoders(choice(), "cpu")
    for epoch in range(4):
        expected = encoders.encode_clip(online.read(epoch % 2, 1))
        assert torch.equal(dataset[(epoch, 1)].latents, expected)


def test_workers_and_ranks_see_the_same(cache):
    dataset = FeatureDataset(cache)
    sampler = GlobalBatchSampler(len(dataset), 0, shapes=dataset.shapes)

    def latents(workers, ranks):
        loaders = [build_loader(dataset, sampler, Schedule(global_batch_size=4, rank=rank, ranks=ranks),
                                num_workers=workers) for rank in range(ranks)]
        return [batch.latents for _ in range(3) for loader in loaders for batch in islice(loader, 4 // ranks)]

    reference = latents(0, 1)
    for workers, ranks in ((2, 1), (0, 2), (1, 4)):
        assert all(torch.equal(a, b) for a, b in zip(reference, latents(workers, ranks)))


# ---- building --------------------------------------------------------------------------------------------------------


def test_a_second_build_does_nothing_and_an_interrupted_one_goes_on(tmp_path):
    out = tmp_path / "c"
    dataset = clips(tiny_clips())
    stop = iter(range(4))

    def interrupt():
        if next(stop, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(out, dataset, on_sample=interrupt)
    assert len(list((out / "shards").glob("*.safetensors"))) == 1 and not list((out / "shards").glob("*.claim"))
    with pytest.raises(DataError, match="not finished"):
        FeatureDataset(out)
    second = build(out, dataset)
    assert (second.kept, second.samples, second.is_complete) == (3, 5, True)
    third = build(out, dataset)
    assert (third.kept, third.samples, third.is_complete) == (8, 0, True)


def test_a_changed_clip_rebuilds_its_shard_alone(tmp_path):
    folder = private_clips(tmp_path)
    out = tmp_path / "c"
    build(out, clips(folder))
    shutil.copy(folder / "videos" / "clip_0001.mp4", folder / "videos" / "clip_0004.mp4")
    with pytest.raises(DataError, match=r"1 clips changed.*clip_0004\.mp4"):
        FeatureDataset(out).check_clips()
    report = build(out, clips(folder))
    assert (report.samples, report.kept) == (3, 5)
    FeatureDataset(out).check_clips()


def test_a_row_that_is_there_several_times_has_a_window_each(tmp_path):
    """musubi's num_repeats: one clip and caption, but each row draws a window of its own."""
    folder = private_clips(tmp_path, num_clips=2, num_frames=21)
    rows = (folder / "data.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join([rows[0]] * 3 + rows[1:]) + "\n")
    dataset = clips(folder)
    build(tmp_path / "c", dataset, shard_samples=4)
    cached, encoders = FeatureDataset(tmp_path / "c"), WanEncoders(choice(), "cpu")
    assert not list(cached.damaged())
    for index in range(4):
        assert torch.equal(cached[(0, index)].latents, encoders.encode_clip(unit_range(dataset.read(0, index))))
    assert not torch.equal(cached[(0, 0)].latents, cached[(0, 1)].latents)


def test_a_data_set_that_has_grown_keeps_its_shards(tmp_path):
    folder = private_clips(tmp_path)
    rows = (folder / "data.jsonl").read_text().splitlines()
    for count, encoded, kept in ((6, 6, 0), (7, 1, 6), (8, 2, 6)):  # shards of 3
        (folder / "data.jsonl").write_text("\n".join(rows[:count]) + "\n")
        report = build(tmp_path / "c", clips(folder))
        assert (report.samples, report.kept, report.is_complete) == (encoded, kept, True)
        assert len(FeatureDataset(tmp_path / "c")) == count


def test_a_cache_is_unfinished_while_a_shard_is_made_anew(tmp_path):
    """Else its index would name samples that are not there any more."""
    out = tmp_path / "c"
    build(out, clips(tiny_clips()))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(out, clips(tiny_clips()), shard_samples=2, on_sample=interrupt)
    with pytest.raises(DataError, match="not finished"):
        FeatureDataset(out)
    assert build(out, clips(tiny_clips()), shard_samples=2).is_complete
    assert not list(FeatureDataset(out).damaged())


def test_a_touched_or_moved_clip_is_not_stale(tmp_path):
    folder = private_clips(tmp_path)
    out = tmp_path / "c"
    build(out, clips(folder))
    os.utime(folder / "videos" / "clip_0002.mp4")
    (folder / "videos" / "clip_0003.mp4").unlink()
    FeatureDataset(out).check_clips()


def test_bad_clips_are_recorded_and_replaced_as_online(tmp_path):
    folder = private_clips(tmp_path)
    out = tmp_path / "c"
    dataset = clips(folder)
    (folder / "videos" / "clip_0003.mp4").write_bytes(b"junk")
    report = build(out, dataset)
    assert report.bad == 1 and report.is_complete
    cached, online = FeatureDataset(out)[(0, 3)], dataset[(0, 3)]
    assert cached.source == online.source != 3 and cached.bad[0].index == 3 and "cannot open" in cached.bad[0].reason
    assert torch.equal(cached.latents, WanEncoders(choice(), "cpu").encode_clip(online.video))


def _build_in_process(out, folder, rank, world):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    report = build(Path(out), clips(Path(folder)), shard_samples=1)
    Path(out, f"report{rank}").write_text(json.dumps([report.samples, report.kept]))


def test_processes_share_the_work_and_the_result_is_the_same(tmp_path):
    out, world = tmp_path / "c", 3
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_in_process, args=(str(out), str(tiny_clips()), rank, world))
                 for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    done = [json.loads((out / f"report{rank}").read_text()) for rank in range(world)]
    assert sum(samples for samples, _ in done) == 8  # nobody did another's work
    single = tmp_path / "single"
    build(single, clips(tiny_clips()), shard_samples=1)
    left, right = FeatureDataset(out), FeatureDataset(single)
    assert all(torch.equal(left[(0, i)].latents, right[(0, i)].latents) for i in range(8))


@pytest.mark.parametrize(("claim", "age", "taken"), [("{host} 999999999", 0, True), ("{host} {pid}", 99999, False),
                                                     ("{host} {pid} 1", 0, True), ("", 99999, True), ("", 10, False),
                                                     ("elsewhere 1", 10, False), ("elsewhere 1", 99999, True)])
def test_claims_of_the_dead_are_taken_over(tmp_path, claim, age, taken):
    import socket
    import time

    out = tmp_path / "c"
    path = feature_cache.shard_path(out, 0).with_suffix(".claim")
    path.parent.mkdir(parents=True)
    path.write_text(claim.format(host=socket.gethostname(), pid=os.getpid()))
    os.utime(path, (time.time() - age,) * 2)
    report = build(out, clips(tiny_clips()))
    assert report.is_complete == taken and path.exists() != taken


def test_a_full_disk_leaves_no_claim_that_others_would_wait_for(tmp_path):
    out = tmp_path / "c"
    claim = feature_build._claim(out / "x")
    with file_size_limit(0), pytest.raises(ResourceError, match=r"\.claim: cannot write"), claim:
        pytest.fail("claimed")
    assert list(out.iterdir()) == []


def test_a_torn_shard_is_built_again(tmp_path):
    out = tmp_path / "c"
    build(out, clips(tiny_clips()))
    shard = next((out / "shards").glob("00001*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:200])
    dataset = FeatureDataset(out)
    assert {bad.index for index in (3, 4, 5) for bad in dataset[(0, index)].bad} <= {3, 4, 5}
    assert "cannot read the shard" in dataset[(0, 4)].bad[0].reason and not dataset[(0, 0)].bad
    assert build(out, clips(tiny_clips())).samples == 3


def test_a_flipped_bit_is_noticed(tmp_path):
    out = tmp_path / "c"
    build(out, clips(tiny_clips()))
    shard = next((out / "shards").glob("00001*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 4
    shard.write_bytes(raw)
    dataset = FeatureDataset(out)
    noticed = [bad for index in (3, 4, 5) for epoch in range(3) for bad in dataset[(epoch, index)].bad]
    assert noticed and "damaged on disk" in noticed[0].reason


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    tiny_pipeline_folder()  # written once, by the same function
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        build(tmp_path / "c", clips(tiny_clips()))
    assert not list((tmp_path / "c" / "shards").iterdir())


# ---- never stale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: {"settings": replace(SETTINGS, num_frames=13)}, "num_frames: 9 -> 13"),
        (lambda: {"settings": replace(SETTINGS, frame_choice="head")}, "frame_choice: random -> head"),
        (lambda: {"settings": replace(SETTINGS, max_height=48)}, "max_height: 32 -> 48"),
        (lambda: {"task": "i2v"}, "task: t2v -> i2v"),
        (lambda: {"encoders": choice(text_dtype="fp32")}, "text_dtype: bf16 -> fp32"),
        (lambda: {"encoders": choice(max_length=77)}, "max_length: 512 -> 77"),
        (lambda: {"encoders": choice(tiny_pipeline_folder(seed=9))}, "weights of the text_encoder.*weights of the vae"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache, what, message):
    arguments = {"settings": SETTINGS, "task": "t2v", "encoders": choice(), **what()}
    with pytest.raises(DataError, match=message):
        FeatureDataset(cache).check(**arguments)


def test_the_same_cache_is_accepted(cache):
    dataset = FeatureDataset(cache)
    dataset.check(SETTINGS, "t2v", choice())
    away = choice(Path("/nowhere"))  # a machine without the encoders
    dataset.check(replace(SETTINGS, caption_dropout=0.0, reader="pyav"), "t2v", away)
    dataset.check(SETTINGS, "t2v", EncoderChoice(vae=None, text_encoder=None, vae_dtype="bf16", max_length=77))


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [("text_encoder", {"vae": str(tiny_pipeline_folder(seed=9) / "vae")}, "weights of the vae"),
     ("vae", {"text_encoder": str(tiny_pipeline_folder(seed=9) / "text_encoder")}, "weights of the text_encoder"),
     ("vae", {"vae_dtype": "bf16", "text_encoder": "/nowhere"}, "vae_dtype: fp32 -> bf16"),
     ("text_encoder", {"max_length": 226, "vae": "/nowhere"}, "max_length: 512 -> 226")],
)
def test_what_is_known_is_compared_although_an_encoder_is_not_here(cache, missing, changes, message):
    with pytest.raises(DataError, match=message):
        FeatureDataset(cache).check(SETTINGS, "t2v", choice(**{missing: "/nowhere", **changes}))


def test_building_into_another_cache_is_refused(cache):
    with pytest.raises(DataError, match="made differently.*num_frames"):
        settings = replace(SETTINGS, num_frames=5)
        build(cache, clips(tiny_clips(), settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "cache.json").unlink(), "not a feature cache"),
        (lambda c: (c / "cache.json").write_text("{"), "damaged"),
        (lambda c: (c / "cache.json").write_text('{"format": 99}'), "cache format 99"),
        (lambda c: (c / "cache.json").write_text('{"format": 1, "weights": []}'), "damaged"),
        (lambda c: (c / "index.json").write_text('{"key": 3'), "damaged"),
        (lambda c: shutil.rmtree(c) or c.write_text("a file"), "not a feature cache"),
        (lambda c: (c / "index.json").unlink(), "not finished"),
        (lambda c: (c / "index.json").write_text("[]"), "damaged"),
        (lambda c: (c / "index.json").write_text('{"key": "0", "samples": [1]}'), "different caches"),
    ],
)
def test_damaged_caches_are_named(cache, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    damage(copy)
    with pytest.raises(DataError, match=message):
        FeatureDataset(copy)


def test_missing_encoders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        build(tmp_path / "c", clips(tiny_clips()), encoders=replace(choice(), vae=str(tmp_path / "nowhere")))


# ---- MindSpeed-MM's feature folders ----------------------------------------------------------------------------------


def _mm_folder(root: Path, count=4, *, batched=True, i2v=False) -> Path:
    (root / "features").mkdir(parents=True)
    rows = []
    for number in range(count):
        latents, text = torch.full((16, 3, 8, 12), float(number)), torch.full((512, 32), float(number))
        mask = (torch.arange(512) < 5 + number).long()
        content = {"video": latents, "prompt_ids": text, "prompt_mask": mask}
        if i2v:
            content["i2v_vae_feature"] = torch.cat((torch.ones(4, 3, 8, 12), latents + 100))
        content = {name: value[None] for name, value in content.items()} if batched else content
        torch.save(content, root / "features" / f"{number}.pt")
        rows.append(json.dumps({"file": f"features/{number}.pt"}))
    (root / "data.jsonl").write_text("\n".join(rows) + "\n")
    return root / "data.jsonl"


@pytest.mark.parametrize("batched", [True, False])
def test_mm_feature_folder(tmp_path, batched):
    dataset = MMFeatureDataset(_mm_folder(tmp_path / "f", batched=batched, i2v=True), task="i2v")
    sample = dataset[(0, 2)]
    assert dataset.shapes == [(9, 64, 96)] * 4
    assert sample.latents.eq(2).all() and sample.text.shape == (7, 32) and sample.condition.eq(102).all()
    batch = next(iter(build_loader(dataset, GlobalBatchSampler(4, 0), Schedule(global_batch_size=4,
                                                                              micro_batch_size=4))))
    assert batch.latents.shape == (4, 16, 3, 8, 12) and batch.condition.shape == (4, 16, 3, 8, 12)


def _masked(mask: list[int]) -> dict[str, torch.Tensor]:
    return {"video": torch.zeros(16, 3, 8, 12), "prompt_ids": torch.zeros(3, 32), "prompt_mask": torch.tensor(mask)}


class _Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "features/1.pt").unlink(), "does not exist"),
        (lambda d: (d / "data.jsonl").write_text("{}"), "expected"),
        (lambda d: (d / "data.jsonl").write_text(""), "no samples"),
        (lambda d: (d / "data.jsonl").write_text('{"file": "features/0.pt"}\n' * 2), "named twice"),
    ],
)
def test_damaged_mm_folders_are_named(tmp_path, damage, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _mm_folder(tmp_path / "f")
    damage(tmp_path / "f")
    with pytest.raises(DataError, match=message):
        MMFeatureDataset(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "not a torch file"),
        ([1], "not a dict"),
        ({"x": torch.zeros(1)}, "has no latents"),
        ({"video": torch.zeros(3, 4)}, "expected 4 dimensions"),
        ({"video": _Canary()}, "cannot be read"),
        ({"video": torch.zeros(48, 3, 8, 12), "prompt_ids": torch.zeros(3, 32)}, "48 channels, the model reads 16"),
        ({"video": torch.zeros(16, 3, 8, 12), "prompt_ids": torch.zeros(3, 64)}, "64 channels, the model reads 32"),
        ({"video": torch.zeros(16, 3, 8, 12)}, "has no text states"),
        ({"video": torch.zeros(16, 3, 8, 12), "prompt_ids": torch.ones(1, 512).long()}, "text states is int64"),
        ({"video": torch.zeros(16, 3, 7, 12), "prompt_ids": torch.zeros(3, 32)}, "multiples of 16 pixels"),
        ({"video": torch.zeros(16, 0, 8, 12), "prompt_ids": torch.zeros(3, 32)}, "latents of 0x8x12"),
        ({"video": torch.zeros(16, 3, 8, 12), "prompt_ids": torch.zeros(700, 32)}, "700 text states"),
        (_masked([0, 0, 0]), "marks 0 of 3"), (_masked([0, 1, 1]), "marks 2 of 3"), (_masked([1] * 9), "for 3 text"),
    ],
)
def test_bad_mm_files_are_counted_like_bad_clips(tmp_path, content, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _mm_folder(tmp_path / "f")
    file = tmp_path / "f" / "features" / "1.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    dataset = MMFeatureDataset(path, channels=16, text_width=32, text_length=512)
    assert len(dataset) == 3 and [record.where for record, _ in dataset.unreadable] == [f"{path}:2"]
    assert message in dataset.unreadable[0][1]
    data = OpenedData(dataset, GlobalBatchSampler(3, 0), unreadable=dataset.unreadable)
    assert list(data.bad_sample_log(None, 0.25).found) == [3]
    with pytest.raises(DataError, match="1 of 4 clips cannot be read"):
        data.bad_sample_log(None, 0.2)
    assert not (tmp_path / "canary").exists()


def test_mm_features_of_another_task_are_refused_at_the_start(tmp_path):
    with pytest.raises(DataError, match="none of the 4 files can be read.*no i2v_vae_feature"):
        MMFeatureDataset(_mm_folder(tmp_path / "t2v"), task="i2v")
    path = _mm_folder(tmp_path / "i2v", i2v=True)
    assert MMFeatureDataset(path, task="t2v")[(0, 1)].condition is None
    other = torch.load(path.parent / "features" / "2.pt")
    torch.save({**other, "i2v_vae_feature": torch.zeros(1, 20, 5, 8, 12)}, path.parent / "features" / "2.pt")
    (record, reason), = MMFeatureDataset(path, task="i2v").unreadable
    assert record.where == f"{path}:3" and "i2v_vae_feature has shape [20, 5, 8, 12]" in reason


@pytest.mark.parametrize("name", ["video", "prompt_ids", "i2v_vae_feature"])
def test_bad_mm_features_are_replaced(tmp_path, name):
    path = _mm_folder(tmp_path / "f", i2v=True)
    dataset = MMFeatureDataset(path, task="i2v")
    file = tmp_path / "f" / "features" / "1.pt"
    content = torch.load(file)
    torch.save({**content, name: torch.full_like(content[name], torch.nan)}, file)
    log = BadSampleLog(None, 4, 0.3)
    loader = build_loader(dataset, GlobalBatchSampler(4, 0), Schedule(global_batch_size=1), bad_samples=log)
    assert all(torch.isfinite(batch.latents).all() for batch in islice(loader, 4))
    assert "not finite" in log.found[1].reason


def test_stale_seconds_leave_time_for_the_slowest_sample():
    assert feature_build._STALE_SECONDS >= 600  # a 720p clip of 81 frames takes minutes on a CPU


def test_out_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not a folder"):
        dispatch(["features", "build", "--mm-data", "absent", "--mm-model", "absent", "--out", str(tmp_path / "file")])
