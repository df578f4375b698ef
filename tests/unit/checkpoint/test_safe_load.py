"""Reading foreign files: torch's tensors without torch's unpickler, DCP metadata, safetensors headers."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from mindspeed_wan.checkpoint.safe_load import (
    read_dcp_metadata,
    read_safetensors_header,
    read_safetensors_index,
    refuse_stand_in,
    safe_torch_load,
)
from mindspeed_wan.checkpoint.torch_file import Opaque
from mindspeed_wan.errors import CheckpointError


class RunsOnLoad:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64,
                                   torch.uint8, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, mmap: bool, dtype: torch.dtype) -> None:
    base = torch.randint(0, 2, (6, 4)).to(dtype)
    saved = {"plain": base, "view": base[2:5, 1:3], "transposed": base.t(), "scalar": torch.tensor(1, dtype=dtype),
             "empty": torch.empty(0, 3, dtype=dtype), "nested": [base, {"again": base}],
             "parameter": torch.nn.Parameter(base.float())}
    torch.save(saved, tmp_path / "x.pt")
    loaded = safe_torch_load(tmp_path / "x.pt", mmap=mmap)
    for name in ("plain", "view", "transposed", "scalar", "empty", "parameter"):
        assert loaded[name].dtype == saved[name].dtype and torch.equal(loaded[name], saved[name].detach()), name
    assert torch.equal(loaded["nested"][1]["again"], base)


def test_shared_storage_stays_shared(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    torch.save([base, base[1:]], tmp_path / "x.pt")
    first, second = safe_torch_load(tmp_path / "x.pt")
    first[1] = 9.0
    assert second[0] == 9.0
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)[0], base), "the file itself is not changed"


def test_training_arguments_become_inert(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "iteration": 7,
             "args": argparse.Namespace(lr=1.0, dtype=torch.bfloat16, path=Path("/x")),
             "rng_state": [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}]}
    torch.save(state, tmp_path / "x.pt")
    loaded = safe_torch_load(tmp_path / "x.pt")
    assert isinstance(loaded["args"], Opaque) and loaded["args"].state["lr"] == 1.0
    assert loaded["iteration"] == 7 and torch.equal(loaded["model"]["w"], torch.ones(2))


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": {}, "extra": RunsOnLoad(tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="system"):
        safe_torch_load(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()


def test_damaged_torch_files_are_errors(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(100, 10)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    for number in range(60):
        bad.write_bytes(good[:number * len(good) // 60])
        with pytest.raises(CheckpointError):
            safe_torch_load(bad)
    torch.save({"w": torch.ones(2)}, bad, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="zip"):
        safe_torch_load(bad)


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
    (b"\n<!doctype html><html>", "web page"), (b"<HTML>", "web page"), (b"<?xml version='1.0'?><Error>", "web page")])
def test_what_stands_in_for_weights_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    for read in (refuse_stand_in, read_safetensors_header, safe_torch_load):
        with pytest.raises(CheckpointError, match=expected):
            read(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError):
        refuse_stand_in(tmp_path / "absent")


# ---- DCP -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with pytest.warns(UserWarning):
        dcp.save({"model": {"a": torch.randn(30, 4), "b": torch.randn(3).bfloat16()}, "args": argparse.Namespace(x=1)},
                 checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def test_metadata_of_torch_is_read(folder: Path) -> None:
    ours, theirs = read_dcp_metadata(folder), dcp.FileSystemReader(str(folder)).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data


def test_code_in_metadata_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    metadata.planner_data = RunsOnLoad(tmp_path / "canary")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="system"):
        read_dcp_metadata(folder)
    assert not (tmp_path / "canary").exists()


def test_missing_and_truncated_storage_is_found_before_reading(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_dcp_metadata(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_dcp_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_damaged_metadata_is_an_error(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_dcp_metadata(folder)


# ---- safetensors ---------------------------------------------------------------------------------------------


def test_headers_are_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    table = read_safetensors_header(tmp_path / "x.safetensors")
    assert table.metadata == {"format": "pt"} and set(table.tensors) == {"a", "b"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    entry = table.tensors["a"]
    assert (entry.code, entry.shape) == ("F32", (3, 4))
    assert raw[entry.start:entry.stop] == state["a"].numpy().tobytes()


def entry(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(("header", "size"), [
    ({"a": entry(0, 8), "b": entry(4, 12)}, 12), ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    ({"a": entry(0, 8)}, 9), ({"a": entry(0, 8)}, 7), ({"a": entry(0, 12)}, 12), ({"a": entry(0, 8, (-2,))}, 8),
    ({"a": entry(0, 8, dtype="Q4")}, 8), ({"a": {"dtype": "F32"}}, 0), ([1], 0), ({"a": 3}, 0),
    ({"a": entry(0, 8, (1 << 40,))}, 8)])
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, size: int) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    with pytest.raises(CheckpointError):
        read_safetensors_header(tmp_path / "x.safetensors")


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert set(read_safetensors_index(path)) == {"1.safetensors", "2.safetensors"}
    for weight_map in ({"a": "1.safetensors", "b": "1.safetensors"}, {"a": "1.safetensors", "b": "3.safetensors"},
                       {"b": "1.safetensors"}, {"a": "../1.safetensors"}, {"a": 1}, [], None):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError):
            read_safetensors_index(path)
