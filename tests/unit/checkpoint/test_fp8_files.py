"""Published fp8 weights: each publisher's file is read as the numbers that its fp8 codes and scales stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_wan.checkpoint.sources import check_names_and_shapes, find, open_weights
from mindspeed_wan.checkpoint.weights import read_weights
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models import quantization
from mindspeed_wan.models.quantization import weight_views
from mindspeed_wan.models.quantization_spec import QuantizationSpec
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.platforms import get_platform

CONFIG = WanConfig(num_layers=2, dim=48, ffn_dim=64, num_heads=4, text_dim=32, text_len=16, freq_dim=32)
SHAPES = {param.mm: param.shape for param in parameter_table(CONFIG)}
Q = "blocks.0.self_attn.q.weight"
MM_Q = "blocks.0.self_attn.proj_q.weight"
CODES = torch.tensor([0x38, 0xB9, 0x7E, 0x01], dtype=torch.uint8)
"""1.0, -1.125, 448 and 2^-9, by the definition of e4m3."""
VALUES = [1.0, -1.125, 448.0, 2.0**-9]


def published(kind: str) -> dict[str, torch.Tensor]:
    """Return an expert as ``kind`` publishes it: Wan-AI's names, block matrices in fp8, the rest mixed."""
    generator = torch.Generator().manual_seed(0)
    prefix = "model.diffusion_model." if kind == "comfy_prefixed" else ""
    dtype = torch.float8_e5m2 if kind == "kijai_e5m2" else torch.float8_e4m3fn
    tensors: dict[str, torch.Tensor] = {}
    for param in parameter_table(CONFIG):
        value = torch.randn(param.shape, generator=generator) * 0.1
        if param.block is None or len(param.shape) != 2:
            tensors[param.original] = value if "modulation" in param.original else value.bfloat16()
            continue
        codes = value.to(dtype)
        if param.original == Q and dtype == torch.float8_e4m3fn:
            codes.view(torch.uint8)[0, :4] = CODES
        tensors[param.original] = codes
        module = param.original.removesuffix(".weight")
        if kind.startswith("comfy"):
            tensors[f"{module}.scale_weight"] = torch.tensor(0.03125 * 3)
            tensors[f"{module}.scale_input"] = torch.tensor(1.0)
        elif kind == "lightx2v":
            tensors[f"{module}.weight_scale"] = torch.arange(1, param.shape[0] + 1).float()[:, None] / 64
    if kind.startswith("comfy"):
        tensors["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    return {prefix + name: value for name, value in tensors.items()}


def write(tmp_path, tensors):
    path = tmp_path / "expert.safetensors"
    save_file(tensors, path)
    return find(path)


@pytest.mark.parametrize(("kind", "factor"), [
    ("comfy", 0.09375), ("comfy_prefixed", 0.09375), ("lightx2v", 1 / 64), ("kijai", 1.0)])
def test_values_are_codes_times_scales(tmp_path, kind, factor):
    with open_weights(write(tmp_path, published(kind)), CONFIG) as files:
        check_names_and_shapes(files, SHAPES, CONFIG)
        whole = files.read(MM_Q)
        assert whole.dtype == torch.float32 and whole[0, :4].tolist() == [v * factor for v in VALUES]
        part = files.read(MM_Q, (slice(8, 20), slice(4, 12)))
        assert torch.equal(part, whole[8:20, 4:12])
        assert files.read("patch_embedding.weight").dtype == torch.bfloat16


def test_scales_of_rows_follow_the_rows(tmp_path):
    tensors = published("lightx2v")
    with open_weights(write(tmp_path, tensors), CONFIG) as files:
        expected = tensors[Q].float() * torch.arange(1, 49).float()[:, None] / 64
        assert torch.equal(files.read(MM_Q, (slice(30, 48), slice(0, 48))), expected[30:48])


def test_newer_comfy_files_describe_each_layer(tmp_path):
    tensors = published("kijai")
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name in [name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn]:
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.weight_scale": torch.tensor(0.5), f"{module}.comfy_quant": note.clone()}
    with open_weights(write(tmp_path, tensors), CONFIG) as files:
        check_names_and_shapes(files, SHAPES, CONFIG)
        assert files.read(MM_Q)[0, :4].tolist() == [v * 0.5 for v in VALUES]


def test_e5m2_is_read(tmp_path):
    tensors = published("kijai_e5m2")
    with open_weights(write(tmp_path, tensors), CONFIG) as files:
        assert torch.equal(files.read(MM_Q), tensors[Q].float())


def test_a_scaled_file_without_a_scale_is_damaged(tmp_path):
    tensors = published("comfy")
    del tensors["blocks.1.ffn.0.scale_weight"]
    with pytest.raises(CheckpointError, match=r"have no scale.*blocks\.1\.ffn\.0"):
        open_weights(write(tmp_path, tensors), CONFIG)


def test_scales_per_block_of_a_weight_are_refused(tmp_path):
    tensors = published("lightx2v")
    tensors["blocks.0.self_attn.q.weight_scale"] = torch.ones(48, 2)
    with pytest.raises(CheckpointError, match=r"\[48, 2\]"):
        open_weights(write(tmp_path, tensors), CONFIG)


@pytest.mark.parametrize("kind", ["comfy", "lightx2v"])
def test_a_scale_that_is_no_number_is_damage(tmp_path, kind):
    tensors = published(kind)
    scale = "scale_weight" if kind == "comfy" else "weight_scale"
    tensors[f"blocks.0.self_attn.q.{scale}"] = tensors[f"blocks.0.self_attn.q.{scale}"] * float("nan")
    with open_weights(write(tmp_path, tensors), CONFIG) as files, pytest.raises(CheckpointError, match="NaN"):
        files.read(MM_Q)


def test_other_8_bit_weights_are_refused(tmp_path):
    tensors = published("kijai")
    tensors[Q] = torch.zeros(48, 48, dtype=torch.int8)
    with open_weights(write(tmp_path, tensors), CONFIG) as files, pytest.raises(CheckpointError, match="is I8"):
        check_names_and_shapes(files, SHAPES, CONFIG)


def test_one_fp8_tensor_among_others_is_damage(tmp_path):
    tensors = {name: value.float() for name, value in published("kijai").items()}
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)
    with open_weights(write(tmp_path, tensors), CONFIG) as files, pytest.raises(CheckpointError, match="is F8_E4M3"):
        check_names_and_shapes(files, SHAPES, CONFIG)


def loaded(found, mode: str | None, dtype: torch.dtype = torch.float32) -> WanDiT:
    spec = QuantizationSpec(mode) if mode else None
    model = build_wan(CONFIG, platform=get_platform("cpu"), param_dtype=dtype,
                      modify=None if spec is None else lambda m: quantization.quantize_layers(m, spec))
    read_weights(found, weight_views(model), CONFIG)
    return model


@pytest.mark.parametrize("kind", ["comfy", "lightx2v", "kijai"])
def test_fp8_files_load_into_fp8_layers_bit_for_bit(tmp_path, kind):
    tensors = published(kind)
    found = write(tmp_path, tensors)
    held, plain = loaded(found, "fp8_weight_only"), loaded(found, None)
    assert torch.equal(held.blocks[0].self_attn.proj_q.weight.view(torch.float8_e4m3fn).float(), tensors[Q].float())
    for name, value in quantization.dequantized_state(held, torch.float32).items():
        assert torch.equal(value, plain.get_parameter(name)), name


def test_fp8_files_load_into_int8_layers(tmp_path):
    found = write(tmp_path, published("comfy"))
    held = quantization.dequantized_state(loaded(found, "int8_weight_only"), torch.float32)[MM_Q]
    plain = loaded(found, None).get_parameter(MM_Q)
    assert ((held - plain).abs() <= plain.abs().amax(1, keepdim=True) / 254 * 1.001).all()
