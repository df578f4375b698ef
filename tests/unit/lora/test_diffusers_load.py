"""Files written here, loaded by diffusers and PEFT: the adapted transformers give the same output as ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindspeed_wan.lora.apply import load_adapter
from mindspeed_wan.lora.formats import LoraFile, write_lora
from mindspeed_wan.models.wan.model import WanDiT
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch
from tests.unit.lora.cases import random_lora

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

BLOCKS = ("proj_q", "proj_k", "proj_v", "proj_out", "ffn.0", "ffn.2")


def ours(lora: LoraFile, seed: int, weight: float = 1.0) -> Tensor:
    model = WanDiT(TINY)
    model.load_state_dict(mm_state_dict(diffusers_model(TINY, seed), TINY))
    load_adapter(model, lora, "x", weight=weight)
    batch = random_batch(TINY)
    with torch.no_grad():
        return model(batch.latents, batch.timestep, batch.text)


def theirs(transformer) -> Tensor:
    batch = random_batch(TINY)
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, TINY.text_len - batch.text.shape[1]))
    with torch.no_grad():
        return transformer(batch.latents, batch.timestep, text, return_dict=False)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def pipeline(high, low):
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=high, transformer_2=low,
                                 scheduler=diffusers.UniPCMultistepScheduler(), boundary_ratio=0.875)


@pytest.mark.parametrize("format_name", ["diffusers", "comfy", "lightx2v", "kohya"])
@pytest.mark.parametrize("targets", [BLOCKS, ("q", "v")], ids=["blocks", "some"])
def test_both_experts_load_in_a_wan_pipeline(tmp_path: Path, format_name: str, targets: tuple[str, ...]) -> None:
    if format_name == "kohya" and targets != BLOCKS:
        pytest.skip("diffusers' kohya reader needs all ten modules of every block")
    loras = {"high": random_lora(TINY, targets=targets, alpha=6.0), "low": random_lora(TINY, targets=targets, seed=9)}
    pipe = pipeline(diffusers_model(TINY, 0), diffusers_model(TINY, 1))
    for expert, lora in loras.items():
        write_lora(lora, tmp_path / f"{expert}.safetensors", TINY, format_name)
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{expert}.safetensors", adapter_name=expert,
                               load_into_transformer_2=expert == "low")
    assert relative(theirs(pipe.transformer), ours(loras["high"], 0)) < 1e-5
    assert relative(theirs(pipe.transformer_2), ours(loras["low"], 1)) < 1e-5
    assert relative(theirs(pipe.transformer), theirs(diffusers_model(TINY, 0))) > 1e-3


def test_embeddings_and_head_and_mixed_ranks_load_in_diffusers(tmp_path: Path) -> None:
    plain, wide = random_lora(TINY, targets=("all-linear",), alpha=6.0), random_lora(TINY, targets=("ffn.0",), rank=7)
    lora = LoraFile({**plain.adapters, **wide.adapters})
    write_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", TINY, "diffusers")
    pipe = pipeline(diffusers_model(TINY, 0), diffusers_model(TINY, 1))
    pipe.load_lora_weights(str(tmp_path), adapter_name="all")
    pipe.set_adapters(["all"], adapter_weights=[0.5])
    assert relative(theirs(pipe.transformer), ours(lora, 0, weight=0.5)) < 1e-5


def test_peft_loads_the_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    lora = random_lora(TINY, targets=("all-linear",), alpha=6.0)
    write_lora(lora, tmp_path / "adapter", TINY, "peft")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    model = PeftModel.from_pretrained(diffusers_model(TINY, 0), str(tmp_path / "adapter"))
    assert relative(theirs(model), ours(lora, 0)) < 1e-5


def test_we_read_what_diffusers_writes(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from mindspeed_wan.lora.formats import read_lora

    transformer = diffusers_model(TINY, 0)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"]))
    torch.manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = get_peft_model_state_dict(transformer)
    metadata = transformer.peft_config["default"].to_dict()
    diffusers.WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers,
                                            transformer_lora_adapter_metadata=metadata)
    lora = read_lora(tmp_path, TINY)
    assert (lora.format, lora.alpha_source, len(lora.adapters)) == ("diffusers", "metadata", 8)
    assert relative(ours(lora, 0), theirs(transformer)) < 1e-5
