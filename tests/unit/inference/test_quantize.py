"""Generating with weights in 8 bits: the same video in every memory mode, adapters, published files, UMT5, flags."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.inference.lora_options import LoraOptions
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.inference.quantize_options import QuantizeOptions
from mindspeed_wan.lora.formats import write_lora
from mindspeed_wan.lora.merge_files import merge_files
from mindspeed_wan.models.quantization import FP8, quantized_layers, weight_bytes
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from tests.helpers.tiny import tiny_pipeline_folder
from tests.unit.lora.cases import random_lora

PROMPT, SEED = "a fox in the snow", 5
FP8_DIT = QuantizeOptions(dit="fp8_weight_only")
EXPERTS = {"high": "transformer", "low": "transformer_2"}


@functools.cache
def architecture() -> WanConfig:
    text = (tiny_pipeline_folder() / "transformer" / "config.json").read_text("utf-8")
    return WanConfig.from_diffusers(json.loads(text))


def generator(**options: Any) -> WanGenerator:
    return WanGenerator.from_pretrained(
        tiny_pipeline_folder(), **{"device": "cpu", "dtype": "fp32", "steps": 4, "guidance": (3.0, 4.0),
                                   "size": (64, 96), "num_frames": 9, "shift": 3.0, **options})


def generate(**options: Any) -> torch.Tensor:
    return generator(**options)(PROMPT, seed=SEED, decode=False).latents


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return generate()


@pytest.fixture(scope="module")
def fp8() -> torch.Tensor:
    return generate(quantize=FP8_DIT)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = random_lora(architecture(), seed=1, scale=0.2)
    return write_lora(made, tmp_path_factory.mktemp("lora") / "style_high.safetensors", architecture(), "diffusers")


@pytest.mark.parametrize(("mode", "limit"), [("fp8_weight_only", 0.1), ("int8_weight_only", 0.02)])
def test_the_video_stays_close(mode: str, limit: float, plain: torch.Tensor) -> None:
    assert 1e-4 < difference(generate(quantize=QuantizeOptions(dit=mode)), plain) < limit


@pytest.mark.parametrize("memory", ["sequential", "block"])
def test_memory_modes_change_nothing(memory: str, fp8: torch.Tensor) -> None:
    assert torch.equal(generate(quantize=FP8_DIT, memory=memory), fp8)


@pytest.mark.parametrize("memory", ["resident", "sequential", "block"])
def test_adapters_run_beside_8_bit_weights(memory: str, lora: Path, fp8: torch.Tensor) -> None:
    adapters = LoraOptions(high_paths=(lora,))
    latents = generate(quantize=FP8_DIT, lora=adapters, memory=memory)
    assert difference(latents, generate(lora=adapters)) < 0.05 < difference(latents, fp8)


@pytest.mark.parametrize("memory", ["resident", "sequential", "block"])
def test_adapters_are_merged_in_fp32_and_then_rounded(memory: str, lora: Path, tmp_path: Path) -> None:
    from mindspeed_wan.lora.formats import read_lora

    merge_files(tiny_pipeline_folder() / "transformer", [(read_lora(lora, architecture()), 1.0)],
                tmp_path / "transformer", architecture(), dtype=torch.float32)
    expected = generate(quantize=FP8_DIT, high_noise_ckpt=tmp_path / "transformer")
    merged = generate(quantize=FP8_DIT, lora=LoraOptions(high_paths=(lora,), merge=True), memory=memory)
    assert difference(merged, expected) < 1e-5


def test_plain_differences_of_8_bit_weights_are_refused(tmp_path: Path) -> None:
    made = random_lora(architecture(), targets=("ffn.0",), seed=7)
    made.diffs["blocks.0.self_attn.proj_q.weight"] = torch.ones(architecture().dim, architecture().dim)
    file = write_lora(made, tmp_path / "other.safetensors", architecture(), "lightx2v")
    with pytest.raises(ConfigError, match="held in 8 bits"):
        generate(quantize=FP8_DIT, lora=LoraOptions(high_paths=(file,)))


@pytest.mark.parametrize("memory", ["resident", "block"])
def test_kept_blocks_stay_in_high_precision(memory: str, plain: torch.Tensor, fp8: torch.Tensor) -> None:
    quantize = QuantizeOptions(dit="fp8_weight_only", keep=("blocks.0",))
    made = generator(quantize=quantize, memory=memory)
    latents = made(PROMPT, seed=SEED, decode=False).latents
    names = [name for name, _ in quantized_layers(made.experts((3, 8, 12)).use("high"))]
    assert names and not any(name.startswith("blocks.0.") for name in names)
    assert difference(latents, plain) < difference(fp8, plain)


def publish(folder: Path, expert: str) -> Path:
    """Write an expert of the tiny pipeline as ComfyUI publishes it: one fp8 file, one scale per matrix."""
    source = load_file(next((tiny_pipeline_folder() / EXPERTS[expert]).glob("*.safetensors")))
    tensors: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for param in parameter_table(architecture()):
        value = source[param.hf].float()
        if param.block is None or len(param.shape) != 2:
            tensors[param.original] = value
            continue
        scale = value.abs().max() / 448
        tensors[param.original] = (value / scale).to(FP8)
        tensors[param.original.replace(".weight", ".scale_weight")] = scale
    save_file(tensors, folder / f"{expert}_fp8_scaled.safetensors")
    return folder / f"{expert}_fp8_scaled.safetensors"


@pytest.mark.parametrize("memory", ["resident", "sequential"])
def test_published_fp8_files_run_as_they_are(memory: str, tmp_path: Path, plain: torch.Tensor) -> None:
    """Read into fp32 weights or kept in fp8, the numbers are the same."""
    experts = {f"{name}_noise_ckpt": publish(tmp_path, name) for name in EXPERTS}
    wide, narrow = generate(**experts), generate(**experts, quantize=FP8_DIT, memory=memory)
    assert torch.equal(narrow, wide)
    assert 1e-4 < difference(wide, plain) < 0.2


def test_umt5_in_8_bits() -> None:
    made = generator()
    states = made.prompts.encode([PROMPT])[0]
    sizes = {None: weight_bytes(made.prompts._load("cpu").model)}
    for mode in ("fp8_weight_only", "int8_weight_only"):
        made = generator(quantize=QuantizeOptions(text=mode))
        rounded = made.prompts.encode([PROMPT])[0]
        assert 1e-5 < difference(rounded, states) < 0.1
        sizes[mode] = weight_bytes(made.prompts._load("cpu").model)
    assert sizes["fp8_weight_only"] == sizes["int8_weight_only"] < sizes[None]


def options_of(*flags: str) -> Any:
    return parse(["--ckpt_dir", str(tiny_pipeline_folder()), "--prompt", "x", *flags], world_size=1)


def test_flags() -> None:
    options = options_of("--quantize", "int8_weight_only", "--quantize-text-encoder", "fp8_weight_only",
                         "--quantize_keep", "blocks.0", "ffn.2")
    assert options.quantize == QuantizeOptions(dit="int8_weight_only", text="fp8_weight_only",
                                               keep=("blocks.0", "ffn.2"))
    video_x = options_of("--GPU_memory_mode", "model_cpu_offload_and_qfloat8")
    assert (video_x.memory, video_x.quantize.dit) == ("sequential", "fp8_weight_only")
    job = options_of().jobs()[0]
    assert "quantize" not in options_of().settings(job, "w")
    assert options.settings(job, "w")["quantize"]["dit"] == "int8_weight_only"


@pytest.mark.parametrize(("flags", "text"), [
    (("--quantize", "fp8"), "fp8_weight_only"),
    (("--quantize_keep", "blocks.0"), "not given"),
    (("--quantize", "int8_weight_only", "--GPU_memory_mode", "model_cpu_offload_and_qfloat8"), "contradicts"),
])
def test_mistakes(flags: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        options_of(*flags)


def test_sharded_umt5_is_not_quantised() -> None:
    with pytest.raises(ConfigError, match="t5_fsdp"):
        parse(["--ckpt_dir", str(tiny_pipeline_folder()), "--prompt", "x", "--ulysses_size", "2", "--t5_fsdp",
               "--quantize_text_encoder", "fp8_weight_only"], world_size=2)


@pytest.mark.parametrize("quantize", [QuantizeOptions(dit="fp8_dynamic"), QuantizeOptions(text="fp8_dynamic")])
def test_fp8_products_are_refused_on_the_cpu(quantize: QuantizeOptions) -> None:
    with pytest.raises(ConfigError, match="sm_89"):
        generate(quantize=quantize)
