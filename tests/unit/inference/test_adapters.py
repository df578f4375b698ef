"""Adapters while generating: diffusers' latents, every memory mode, merged, several at once, mistakes, presets."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.inference.adapters import read_adapters
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.inference.lora_options import LoraOptions
from mindspeed_wan.inference.options import NEGATIVE_PROMPT
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.lora.apply import adapter_names
from mindspeed_wan.lora.formats import write_lora
from mindspeed_wan.models.wan.config import WanConfig
from tests.helpers.tiny import tiny_pipeline_folder
from tests.unit.lora.cases import random_lora

HEIGHT, WIDTH, FRAMES, STEPS, SHIFT, SEED, PROMPT = 64, 96, 9, 8, 3.0, 5, "a fox in the snow"
HIGH_WEIGHT, LOW_WEIGHT = 0.55, 0.4


@functools.cache
def architecture() -> WanConfig:
    text = (tiny_pipeline_folder() / "transformer" / "config.json").read_text("utf-8")
    return WanConfig.from_diffusers(json.loads(text))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, expert in enumerate(("high", "low")):
        lora = random_lora(architecture(), seed=seed, scale=0.2)
        made[expert] = write_lora(lora, folder / f"style_{expert}.safetensors", architecture(), "diffusers")
    other = random_lora(architecture(), targets=("ffn.0",), seed=7, scale=0.2, diffs=True)
    made["diffs"] = write_lora(other, folder / "other.safetensors", architecture(), "lightx2v")
    return made


def generate(lora: LoraOptions, **options: Any) -> torch.Tensor:
    generator = WanGenerator.from_pretrained(
        tiny_pipeline_folder(), device="cpu", grid="diffusers", noise="diffusers", shift=SHIFT, steps=STEPS,
        guidance=(3.0, 4.0), size=(HEIGHT, WIDTH), num_frames=FRAMES, boundary=0.875, lora=lora,
        **{"dtype": "fp32", **options},
    )
    first = generator(PROMPT, seed=SEED, decode=False).latents
    assert torch.equal(generator(PROMPT, seed=SEED, decode=False).latents, first)  # starts with the low expert in place
    return first


def both(files: dict[str, Path], **more: Any) -> LoraOptions:
    return LoraOptions(low_paths=(files["low"],), high_paths=(files["high"],), low_weights=(LOW_WEIGHT,),
                       high_weights=(HIGH_WEIGHT,), **more)


@pytest.fixture(scope="module")
def beside(files: dict[str, Path]) -> torch.Tensor:
    return generate(both(files))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_diffusers_gives_the_same_latents(files: dict[str, Path], beside: torch.Tensor) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_pipeline_folder(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(files["high"].parent), weight_name=files["high"].name, adapter_name="high")
    pipe.load_lora_weights(str(files["low"].parent), weight_name=files["low"].name, adapter_name="low",
                           load_into_transformer_2=True)
    pipe.transformer.set_adapters(["high"], [HIGH_WEIGHT])
    pipe.transformer_2.set_adapters(["low"], [LOW_WEIGHT])
    expected = pipe(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
                    num_inference_steps=STEPS, guidance_scale=4.0, guidance_scale_2=3.0, output_type="latent",
                    generator=torch.Generator().manual_seed(SEED)).frames[0]
    assert difference(beside, expected) <= 1e-5
    assert difference(generate(LoraOptions()), expected) > 1e-2  # the adapters do something


@pytest.mark.parametrize("memory", ["sequential", "block"])
def test_memory_modes_change_nothing(memory: str, files: dict[str, Path], beside: torch.Tensor) -> None:
    assert torch.equal(generate(both(files), memory=memory), beside)


@pytest.mark.parametrize("memory", ["resident", "sequential", "block"])
def test_merged_in_fp32(memory: str, files: dict[str, Path], beside: torch.Tensor,
                        capsys: pytest.CaptureFixture[str]) -> None:
    merged = generate(both(files, merge=True), memory=memory)
    assert difference(merged, beside) <= 1e-5 and not torch.equal(merged, beside)
    assert "of the change kept" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["resident", "sequential", "block"])
def test_several_with_plain_differences_on_one_expert(memory: str, files: dict[str, Path]) -> None:
    chosen = LoraOptions(high_paths=(files["high"], files["diffs"]), high_weights=(0.5, 0.8))
    expected = generate(LoraOptions(high_paths=chosen.high_paths, high_weights=(0.5, 0.8), merge=True))
    assert difference(generate(chosen, memory=memory), expected) <= 1e-5


def test_hot_unload(files: dict[str, Path]) -> None:
    plain = generate(LoraOptions())
    generator = WanGenerator.from_pretrained(
        tiny_pipeline_folder(), device="cpu", dtype="fp32", grid="diffusers", noise="diffusers", shift=SHIFT,
        steps=STEPS, guidance=(3.0, 4.0), size=(HEIGHT, WIDTH), num_frames=FRAMES, boundary=0.875, lora=both(files))
    generator(PROMPT, seed=SEED, decode=False)
    generator.set_adapters(LoraOptions())
    assert torch.equal(generator(PROMPT, seed=SEED, decode=False).latents, plain)
    generator.set_adapters(both(files))
    assert adapter_names(generator.experts((3, 8, 12)).use("high")) == ["adapter_0"]


def test_a_file_of_the_other_expert_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    told = {"mindspeed_wan.training": json.dumps({"expert": "high"})}
    file = write_lora(random_lora(architecture()), tmp_path / "a.safetensors", architecture(), metadata=told)
    with pytest.raises(CheckpointError, match="high-noise expert"):
        generate(LoraOptions(low_paths=(file,)))


def test_keys_without_a_place_and_files_without_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem, width = "diffusion_model.blocks.0.{}", architecture().dim
    tensors = {stem.format(f"{module}.{end}"): torch.ones(shape) for module in ("self_attn.q", "cross_attn.k_img")
               for end, shape in (("lora_down.weight", (4, width)), ("lora_up.weight", (width, 4)))}
    save_file(tensors, tmp_path / "distilled.safetensors")
    stored = random_lora(architecture(), rank=4, alpha=8.0)
    stated = write_lora(stored, tmp_path / "stated.safetensors", architecture(), "kohya2")

    def read(*flags: str) -> list[tuple[float, int]]:
        chosen = options_of("--lora_path", str(tmp_path / "distilled.safetensors"), str(stated), *flags).lora
        runtime: Any = SimpleNamespace(rank=0, agree=lambda function: function())
        found = read_adapters(chosen, architecture(), ("high", "low"), runtime)
        assert found is not None
        return [(next(iter(lora.adapters.values())).alpha, len(lora.unmatched)) for lora, _ in found.files["low"]]

    with pytest.raises(CheckpointError, match="k_img"):
        read()
    assert read("--lora_allow_unmatched") == [(4.0, 2), (8.0, 0)]
    assert "2 keys" in capsys.readouterr().out
    assert read("--lora_allow_unmatched", "--lora_alpha", "2") == [(2.0, 2), (8.0, 0)]


def options_of(*flags: str) -> Any:
    return parse(["--ckpt_dir", str(tiny_pipeline_folder()), "--prompt", "x", *flags], world_size=1)


def test_flags(files: dict[str, Path]) -> None:
    high, low = str(files["high"]), str(files["low"])
    options = options_of("--lora_path", low, high, "--lora_weight", "0.55", "--lora_high_path", high)
    assert options.lora.of("low") == [(files["low"], 0.55), (files["high"], 0.55)]
    assert options.lora.of("high") == [(files["high"], 1.0)] and not options.lora.merge
    preset = options_of("--sample_preset", "lightx2v", "--sample_steps", "8")
    assert (preset.steps, preset.shift, preset.solver, preset.guidance) == (8, 5.0, "euler", (1.0, 1.0))
    assert options_of("--GPU_memory_mode", "sequential_cpu_offload").memory == "block"
    assert options_of("--GPU_memory_mode", "model_full_load").memory == "resident"
    for wrong, text in ((("--lora_path", "/nowhere.safetensors"), "does not exist"),
                        (("--lora_path", low, "--lora_weight", "1", "2"), "2 values for 1 files"),
                        (("--sample_preset", "light"), "lightx2v"), (("--lora_merge",), "without --lora_path"),
                        (("--lora_path", low, "--lora_weight", "nan"), "nan is not a number"),
                        (("--lora_path", low, "--lora_alpha", "0"), "is not positive")):
        with pytest.raises(ConfigError, match=text):
            options_of(*wrong)


def test_the_distilled_schedule_is_the_published_four_levels() -> None:
    schedule = WanGenerator.schedule(options_of("--sample_preset", "lightx2v"))
    assert [round(float(sigma), 4) for sigma in schedule.sigmas[:4]] == [1.0, 0.9375, 0.8333, 0.625]
