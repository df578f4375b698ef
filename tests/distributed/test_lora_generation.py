"""Adapters while generating on several ranks: every layout makes the latents that one rank makes."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_wan.inference.lora_options import LoraOptions
from mindspeed_wan.lora.formats import LoraFile, write_lora
from mindspeed_wan.lora.model_config import config_of
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder
from tests.launches.test_generate import SMALL, launch
from tests.unit.lora.cases import random_lora

LAYOUTS: list[Any] = [
    {"layout": {"ulysses": 2}}, {"layout": {"tensor": 2}},
    *(pytest.param(options, marks=pytest.mark.slow) for options in (
        {"layout": {"tensor": 2}, "merge": True}, {"layout": {"tensor": 2}, "memory": "block"},
        {"layout": {"ulysses": 2, "dit_fsdp": True}, "memory": "sequential"})),
]


@functools.cache
def adapters() -> dict[str, Path]:
    """A file per expert on every linear layer, with a bias of B, so that each way of cutting a layer is met."""
    folder, config = Path(mkdtemp(prefix="lora-generation-")), config_of(tiny_pipeline_folder() / "transformer")
    made = {}
    for seed, expert in enumerate(("high", "low")):
        lora = random_lora(config, targets=("all-linear",), seed=seed, scale=0.1)
        biases = {f"{mm}.bias": lora.adapters[mm].up[:, 0].clone() for mm in lora.adapters}
        path = folder / f"{expert}.safetensors"
        made[expert] = write_lora(LoraFile(lora.adapters, biases), path, config, "diffusers")
    return made


def _generate(rank: int, world_size: int, options: dict[str, Any]) -> torch.Tensor:
    from mindspeed_wan.inference.pipeline import WanGenerator

    options = dict(options)
    layout = InferenceLayout(world_size=world_size, **options.pop("layout", {}))
    files, merge = options.pop("files"), options.pop("merge", False)
    lora = LoraOptions(low_paths=(files["low"],), high_paths=(files["high"],), low_weights=(0.4,), high_weights=(0.55,),
                       merge=merge) if files else LoraOptions()
    generator = WanGenerator.from_pretrained(tiny_pipeline_folder(), dtype="fp32", device="cpu", layout=layout,
                                             lora=lora, **options)
    return generator("a fox", size=(64, 96), num_frames=5, steps=6, seed=3, decode=False).latents


def shortened(name: str) -> dict[str, Any]:
    """Return what makes a generation cheaper, by name: it has to know the adapters on every stage."""
    from mindspeed_wan.inference.cache_options import CacheOptions
    from mindspeed_wan.inference.quantize_options import QuantizeOptions

    return {
        "exact": {},
        "taylorseer": {"cache": CacheOptions(method="taylorseer", interval=2)},
        "teacache": {"cache": CacheOptions(method="teacache", threshold=10.0, coefficients=((1.0, 0.0),))},
        "int8": {"quantize": QuantizeOptions(dit="int8_weight_only")},
        "merged": {"merge": True},
        "int8 merged": {"quantize": QuantizeOptions(dit="int8_weight_only"), "merge": True},
        "fp8 streamed": {"quantize": QuantizeOptions(dit="fp8_weight_only"), "memory": "sequential"},
    }[name]


@functools.cache
def reference() -> torch.Tensor:
    tiny_pipeline_folder()  # made before the ranks are forked
    return run_ranks(_generate, 1, {"files": adapters()})[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_adapters_act_on_every_layout_as_on_one_rank(options: dict[str, Any]) -> None:
    for rank, latents in enumerate(run_ranks(_generate, 2, {**options, "files": adapters()})):
        assert relative(latents, reference()) <= 1e-5, f"rank {rank}"


@pytest.mark.parametrize("name", ["taylorseer", "int8", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "exact", "teacache", "merged", "int8 merged", "fp8 streamed"))])
def test_over_pipeline_stages(name: str) -> None:
    options = {**shortened(name), "files": adapters()}
    expected = run_ranks(_generate, 1, options)[0]
    assert name in ("exact", "merged") or relative(expected, reference()) > 1e-4
    for latents in run_ranks(_generate, 2, {**options, "layout": {"pipeline": 2}}):
        assert relative(latents, expected) <= 1e-5


def test_the_adapters_change_the_video() -> None:
    assert relative(run_ranks(_generate, 1, {"files": None})[0], reference()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--ulysses_size", "--tensor_size"])
def test_by_the_launcher(flag: str, tmp_path: Path) -> None:
    files = adapters()
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_pipeline_folder()), *SMALL, "--prompt", "a fox",
             "--lora_high_path", str(files["high"]), "--lora_high_weight", "0.55", "--lora_path", str(files["low"])]
    made = {}
    for ranks in (1, 2):
        save = ["--save_file", f"{ranks}.mp4", "--save_latents", f"{ranks}.safetensors"]
        result = launch(tmp_path, *flags, *save, *([flag, "2"] if ranks == 2 else []), ranks=ranks)
        assert result.returncode == 0, result.stderr
        made[ranks] = load_file(tmp_path / f"{ranks}.safetensors")["latents"]
    assert relative(made[2], made[1]) <= 1e-5
