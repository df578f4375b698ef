"""PEFT's ``lora_bias=True``: the bias of B is read, converted where a format has a place for it, and never dropped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.lora.formats import FORMATS, LoraFile, parse, read_lora, to_tensors, write_lora
from mindspeed_wan.lora.formats.alpha import PEFT_KEY
from mindspeed_wan.lora.formats.bias import from_difference, to_difference
from tests.helpers.oracle import TINY as ORACLE
from tests.helpers.oracle import diffusers_model
from tests.unit.lora.cases import TINY, random_lora, same
from tests.unit.lora.test_diffusers_load import ours, pipeline, relative, theirs

CARRY = [name for name in FORMATS if name != "diffsynth"]


def biased(dtype: torch.dtype = torch.float32, alpha: float = 2.0, config=TINY) -> LoraFile:
    """Adapters whose B have a bias, but for one."""
    lora = random_lora(config, targets=("q", "v", "ffn.0"), alpha=alpha, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    diffs = {f"{mm}.bias": to_difference((torch.randn(adapter.up.shape[0], generator=generator) * 0.1).to(dtype),
                                         adapter.scale) for mm, adapter in list(lora.adapters.items())[1:]}
    return LoraFile(lora.adapters, diffs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CARRY, 2)))
def test_round_trip_through_two_formats(tmp_path: Path, first: str, second: str, dtype: torch.dtype) -> None:
    lora = biased(dtype)
    once = read_lora(write_lora(lora, tmp_path / f"a{first}.safetensors", TINY, first), TINY)
    assert same(once, lora)
    assert same(read_lora(write_lora(once, tmp_path / f"b{second}.safetensors", TINY, second), TINY), lora)


def test_keys_and_settings(tmp_path: Path) -> None:
    tensors, metadata = to_tensors(biased(), TINY, "diffusers")
    biases = [name for name in tensors if name.endswith(".lora_B.bias")]
    assert len(biases) == len(tensors) // 3 and "transformer.blocks.1.attn1.to_v.lora_B.bias" in biases
    assert not tensors["transformer.blocks.0.attn1.to_q.lora_B.bias"].any()  # PEFT knows all or none
    assert json.loads(metadata[PEFT_KEY])["transformer.lora_bias"] is True
    tensors, _ = to_tensors(biased(alpha=2.0), TINY, "comfy")
    assert "diffusion_model.blocks.1.self_attn.v.diff_b" in tensors
    assert "diffusion_model.blocks.0.self_attn.q.diff_b" not in tensors
    assert "lora_bias" not in to_tensors(random_lora(), TINY, "diffusers")[1][PEFT_KEY]


def test_diffsynth_has_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"differences \(first blocks\..*bias\) cannot be written as diffsynth"):
        write_lora(biased(), tmp_path / "x.safetensors", TINY, "diffsynth")


def test_other_differences_still_have_no_place_in_peft(tmp_path: Path) -> None:
    lora = biased()
    norm = {"blocks.0.norm3.weight": torch.ones(TINY.dim)}
    with pytest.raises(CheckpointError, match=r"1 differences \(first blocks\.0\.norm3\.weight\)"):
        write_lora(LoraFile(lora.adapters, {**lora.diffs, **norm}), tmp_path / "x.safetensors", TINY, "peft")


@pytest.mark.parametrize(("change", "message"), [
    (lambda t, k: t.update({k: torch.zeros(7)}), "made for a layer|is \\[7\\]"),
    (lambda t, k: t.update({k.replace("lora_B.bias", "diff_b"): torch.zeros(48)}), "has a bias of B and a .diff_b"),
    (lambda t, k: t.pop(k.replace("bias", "weight")), "no up matrix"),
    (lambda t, k: t.update({k.replace("lora_B", "lora_A"): torch.zeros(4)}), "match nothing in the model"),
])
def test_damaged_files_are_named(change, message: str) -> None:
    tensors, metadata = to_tensors(biased(), TINY, "diffusers")
    change(tensors, "transformer.blocks.1.attn1.to_v.lora_B.bias")
    with pytest.raises(CheckpointError, match=message):
        parse(tensors, metadata, TINY)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3, 2.2 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_scale_keeps_the_bits(dtype: torch.dtype, scale: float) -> None:
    bias = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    back = from_difference(to_difference(bias, scale), scale, dtype)
    assert back.dtype == dtype and torch.equal(back, bias)
    again = to_difference(from_difference(bias, scale, dtype), scale)
    assert torch.equal(again.to(dtype), bias)


def test_what_peft_writes_acts_as_it_does_there(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(diffusers_model(ORACLE, 0), LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "ffn.net.2"], lora_bias=True))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path))
    assert any(key.endswith("lora_B.bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    lora = read_lora(tmp_path, ORACLE)
    assert len(lora.diffs) == len(lora.adapters) == 10
    assert relative(ours(lora, 0), theirs(model)) < 1e-5
    without = LoraFile(lora.adapters)
    assert relative(ours(without, 0), theirs(model)) > 1e-3


def test_diffusers_loads_what_we_write(tmp_path: Path) -> None:
    lora = biased(alpha=6.0, config=ORACLE)
    pipe = pipeline(diffusers_model(ORACLE, 0), diffusers_model(ORACLE, 1))
    write_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", ORACLE, "diffusers")
    pipe.load_lora_weights(str(tmp_path))
    assert relative(theirs(pipe.transformer), ours(lora, 0)) < 1e-5


def test_a_zero_bias_is_no_difference(tmp_path: Path) -> None:
    tensors, metadata = to_tensors(random_lora(), TINY, "diffusers")
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key.replace("weight", "bias")] = torch.zeros(tensors[key].shape[0])
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert same(read_lora(tmp_path / "a.safetensors", TINY), random_lora())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(tensors)
