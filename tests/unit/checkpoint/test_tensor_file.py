"""One safetensors file: whole or absent, readable as the umask says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mindspeed_wan.checkpoint.tensor_file import write_tensor_file
from mindspeed_wan.errors import ResourceError
from tests.faults.saves import file_size_limit

pytestmark = pytest.mark.core


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_the_file_has_the_umasks_mode(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensor_file(tmp_path / "new" / "a.safetensors", {"a": torch.arange(6).reshape(2, 3).T}, {"k": "v"})
    finally:
        os.umask(before)
    path = tmp_path / "new" / "a.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert torch.equal(load_file(path)["a"], torch.arange(6).reshape(2, 3).T)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}


@pytest.mark.parametrize("limit", [0, 7, 3000])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {"a": torch.ones(4)}, {})
    with file_size_limit(limit), pytest.raises(ResourceError, match=r"a\.safetensors: cannot write: File too large"):
        write_tensor_file(path, {"a": torch.zeros(1000)}, {})
    assert torch.equal(load_file(path)["a"], torch.ones(4))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        write_tensor_file(tmp_path / "file" / "a.safetensors", {"a": torch.ones(1)}, {})
