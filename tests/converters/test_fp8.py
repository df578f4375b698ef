"""Published fp8 files through the converters: the values of codes times scales, in bf16 or, exactly, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan_converters import fp8
from mindspeed_wan_converters.cli import run
from tests.converters.tiny_weights import CONFIGS, random_state, read_expert

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("code", DTYPES)
def test_tables_equal_torch(code: str) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(DTYPES[code]).float().numpy()
    assert np.array_equal(fp8.VALUES[code], expected, equal_nan=True)


def publish(path: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write an fp8 file in Wan-AI's names; returns its folder and the exact values under Diffusers' names."""
    state, tensors, exact = random_state("t2v", "fp32"), {}, {}
    dtype = torch.float8_e5m2 if kind == "e5m2" else torch.float8_e4m3fn
    for number, param in enumerate(parameter_table(CONFIGS["t2v"])):
        value = state[param.hf]
        if param.block is None or value.ndim != 2:
            tensors[param.original] = value.half() if number % 2 else value
            exact[param.hf] = tensors[param.original].float()
            continue
        tensors[param.original] = codes = value.to(dtype)
        scale = torch.ones(())
        if kind == "comfy":
            scale = tensors[param.original.replace(".weight", ".scale_weight")] = torch.tensor(0.1 + number / 99)
        elif kind == "rows":
            scale = torch.linspace(0.5, 2, len(value))[:, None]
            tensors[param.original.replace(".weight", ".weight_scale")] = scale
        exact[param.hf] = codes.float() * scale
    if kind == "comfy":
        tensors = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
        tensors["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS["t2v"].to_original()), encoding="utf-8")
    save_file(tensors, path / "fp8.safetensors")
    return path, exact


@pytest.mark.parametrize("kind", ["comfy", "rows", "plain", "e5m2"])
def test_an_fp8_file_becomes_bf16_or_fp32(tmp_path: Path, kind: str) -> None:
    source, exact = publish(tmp_path / "fp8", kind)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        flags = [] if name == "bf16" else ["--dtype", "fp32"]
        assert run(["original_to_hf", str(source), str(tmp_path / name), "--quiet", *flags]) == 0
        found = read_expert(tmp_path / name)
        assert found.keys() == exact.keys()
        for key, value in exact.items():
            assert found[key].dtype == dtype and torch.equal(found[key], value.to(dtype)), key


def test_through_mindspeed_mm_and_back(tmp_path: Path) -> None:
    source, exact = publish(tmp_path / "fp8", "rows")
    assert run(["original_to_mm", str(source), str(tmp_path / "mm"), "--quiet",
                "--cfg.target_parallel_config.tp_size", "2"]) == 0
    assert run(["mm_to_hf", str(tmp_path / "mm"), str(tmp_path / "hf"), "--quiet"]) == 0
    found = read_expert(tmp_path / "hf")
    assert all(torch.equal(found[key], value.bfloat16()) for key, value in exact.items())


def test_a_scale_of_blocks_is_refused(tmp_path: Path) -> None:
    source, _ = publish(tmp_path / "fp8", "plain")
    tensors = load_file(source / "fp8.safetensors")
    tensors["blocks.0.ffn.0.weight_scale"] = torch.ones(2, 4)
    save_file(tensors, source / "fp8.safetensors")
    with pytest.raises(CheckpointError, match=r"\[2, 4\]"):
        run(["original_to_hf", str(source), str(tmp_path / "out"), "--quiet"])
