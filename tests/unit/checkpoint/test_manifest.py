"""Manifests, atomic commits and trackers: whole or absent, and damage is named."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from mindspeed_wan.checkpoint import manifest
from mindspeed_wan.checkpoint.manifest import (
    FileRecord,
    commit_folder,
    confined,
    hash_file,
    read_tracker,
    recover,
    remove_stale_staging,
    staging_folder,
    verify_manifest,
    write_manifest,
    write_tracker,
)
from mindspeed_wan.errors import CheckpointError, ResourceError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000010"
    (folder / "sub").mkdir(parents=True)
    rng = random.Random(0)
    for name, size in (("a.distcp", 50_000), ("sub/b.pt", 7), (".metadata", 900), ("empty", 0)):
        (folder / name).write_bytes(rng.randbytes(size))
    write_manifest(folder, {"iteration": 10})
    return folder


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_folder_verifies_and_returns_its_manifest(sealed: Path, full: bool) -> None:
    found = verify_manifest(sealed, full=full)
    assert found["iteration"] == 10
    assert set(found["files"]) == {"a.distcp", "sub/b.pt", ".metadata", "empty"}


def test_every_single_flipped_bit_is_found(sealed: Path) -> None:
    rng = random.Random(1)
    for _ in range(100):
        path = sealed / rng.choice(["a.distcp", "sub/b.pt", ".metadata"])
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=path.name):
            verify_manifest(sealed)
        path.write_bytes(good)
    verify_manifest(sealed, full=True)


def test_truncated_and_missing_files_are_named(sealed: Path) -> None:
    (sealed / "a.distcp").write_bytes((sealed / "a.distcp").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.distcp.*49999"):
        verify_manifest(sealed)
    (sealed / "a.distcp").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_manifest(sealed)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'])
def test_a_garbled_manifest_is_an_error(sealed: Path, text: str) -> None:
    (sealed / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_manifest(sealed)


def test_known_records_are_trusted_but_for_their_size(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    record = hash_file(tmp_path / "x")
    write_manifest(tmp_path, known={"x": record})
    verify_manifest(tmp_path, full=True)
    with pytest.raises(CheckpointError, match="changed"):
        write_manifest(tmp_path, known={"x": FileRecord(4, record.crc32, record.sha256)})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_names_leading_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="outside"):
        confined(tmp_path, name)


def test_links_leading_outside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside"):
        confined(tmp_path / "in", "link")


# ---- commit --------------------------------------------------------------------------------------------------


def stage(final: Path, text: str) -> Path:
    staging = staging_folder(final)
    (staging / "file").write_text(text)
    return staging


@pytest.mark.parametrize("can_exchange", [True, False])
def test_commit_replaces_an_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(manifest, "_exchange", lambda *_: False)
    final = tmp_path / "release"
    for text in ("one", "two"):
        commit_folder(stage(final, text), final)
        assert (final / "file").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_the_old_folder_stays_until_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "release"
    commit_folder(stage(final, "old"), final)
    monkeypatch.setattr(manifest, "_exchange", lambda *_: False)
    real, calls = os.rename, []

    def dies_between_the_renames(source: Path, target: Path) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(source)
        real(source, target)

    monkeypatch.setattr(os, "rename", dies_between_the_renames)
    with pytest.raises(KeyboardInterrupt):
        commit_folder(stage(final, "new"), final)
    monkeypatch.setattr(os, "rename", real)
    assert not final.exists()
    recover(final)
    assert (final / "file").read_text() == "old"


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    final = tmp_path / "transformer_2"
    final.symlink_to(tmp_path / "elsewhere")
    commit_folder(stage(final, "new"), final)
    assert not final.is_symlink() and (final / "file").read_text() == "new"
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


def test_stale_staging_folders_are_removed(tmp_path: Path) -> None:
    (staging_folder(tmp_path / "iter_0000003") / "half").write_text("x")
    assert not any(staging_folder(tmp_path / "iter_0000003").iterdir())
    (tmp_path / "iter_0000002").mkdir()
    assert remove_stale_staging(tmp_path) == [tmp_path / ".iter_0000003.tmp"]
    assert [p.name for p in tmp_path.iterdir()] == ["iter_0000002"]


def test_an_unwritable_place_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        staging_folder(tmp_path / "file" / "release")


# ---- tracker -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "value"), [
    (b"release", "release"), (b"release\n", "release"), (b"12", 12), (b"0000012\r\n", 12), (b"\xef\xbb\xbf7\n", 7)])
def test_trackers_that_people_write_are_read(tmp_path: Path, raw: bytes, value: int | str) -> None:
    (tmp_path / manifest.TRACKER_NAME).write_bytes(raw)
    assert read_tracker(tmp_path) == value


@pytest.mark.parametrize("raw", [b"", b" ", b"1000x", b"-1", b"1.5", b"release\nxx", b"\0\0\0", b"\xff\xfe", b"1" * 100,
                                 "٣".encode()])
def test_torn_trackers_are_errors(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / manifest.TRACKER_NAME).write_bytes(raw)
    with pytest.raises(CheckpointError, match=manifest.TRACKER_NAME):
        read_tracker(tmp_path)


def test_the_tracker_names_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_tracker(tmp_path)
    write_tracker(tmp_path, 12)
    assert (tmp_path / manifest.TRACKER_NAME).read_text() == "12"
    with pytest.raises(CheckpointError, match="names 12, but iter_0000012/ does not exist"):
        manifest.checkpoint_folder(tmp_path)
    (tmp_path / "iter_0000012").mkdir()
    with pytest.raises(CheckpointError, match="has no iter_0000009\n  fix: it holds iter_0000012"):  # --ckpt-step 9
        manifest.checkpoint_folder(tmp_path, 9)
    assert manifest.checkpoint_folder(tmp_path) == tmp_path / "iter_0000012"
    with pytest.raises(CheckpointError):
        write_tracker(tmp_path, "newest")


def test_a_tracker_that_a_killed_process_left_unfinished_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / f".{manifest.TRACKER_NAME}.{os.getpid() + 1}.tmp"
    own = tmp_path / f".{manifest.TRACKER_NAME}.{os.getpid()}.tmp"
    for path in (left, own):
        path.write_text("7\n")
    assert manifest.remove_stale_staging(tmp_path) == [left]
    assert own.exists() and not left.exists()  # our own may be on its way in another thread
