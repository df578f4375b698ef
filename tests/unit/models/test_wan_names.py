"""The table of parameters against the models themselves, at the real A14B size on the meta device."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import by_name, parameter_table

COUNTS = {
    "t2v-A14B": (1095, 14_288_491_584),
    "i2v-A14B": (1095, 14_288_901_184),
    "inp-A14B": (1095, 14_288_901_184),
    "t2v-14B": (1095, 14_288_491_584),
}
FLF2V = PRESETS["i2v-14B"].with_changes(pos_embed_len=514)
CONFIGS = {**PRESETS, "flf2v-14B": FLF2V}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_parameters_are_the_table(name: str) -> None:
    with torch.device("meta"):
        model = WanDiT(CONFIGS[name])
    ours = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert ours == {p.mm: p.shape for p in parameter_table(CONFIGS[name])}
    assert list(model.state_dict()) == [n for n, _ in model.named_parameters()]  # nothing else is saved
    assert model.param_layout.keys() == ours.keys()
    if name in COUNTS:
        assert (len(ours), sum(p.numel() for p in model.parameters())) == COUNTS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_parameters_are_the_table(name: str) -> None:
    from diffusers import WanTransformer3DModel

    config = CONFIGS[name]
    with torch.device("meta"):
        reference = WanTransformer3DModel.from_config(config.to_diffusers())
    theirs = {n: tuple(p.shape) for n, p in reference.state_dict().items()}
    assert theirs == {p.hf: p.shape for p in parameter_table(config)}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_translate_both_ways(name: str) -> None:
    table = parameter_table(CONFIGS[name])
    for source in ("mm", "hf", "original"):
        known = by_name(CONFIGS[name], source)
        assert len(known) == len(table)  # no two parameters share a name
        for target in ("mm", "hf", "original"):
            there = {p.name(source): p.name(target) for p in table}
            back = {p.name(target): p.name(source) for p in table}
            assert all(back[there[key]] == key for key in known)


def test_original_names_are_those_of_the_release() -> None:
    """Spot checks against the keys of Wan-AI's published index (the norm swap is the trap)."""
    names = {p.hf: p.original for p in parameter_table(WanConfig())}
    assert names["blocks.7.attn1.to_out.0.bias"] == "blocks.7.self_attn.o.bias"
    assert names["blocks.7.attn2.norm_k.weight"] == "blocks.7.cross_attn.norm_k.weight"
    assert names["blocks.7.norm2.weight"] == "blocks.7.norm3.weight"
    assert names["blocks.7.ffn.net.0.proj.weight"] == "blocks.7.ffn.0.weight"
    assert names["condition_embedder.time_proj.bias"] == "time_projection.1.bias"
    assert names["scale_shift_table"] == "head.modulation"
    assert names["proj_out.weight"] == "head.head.weight"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_tensor_axis_divides_on_a14b(size: int) -> None:
    for p in parameter_table(WanConfig()):
        assert p.tp_axis is None or p.shape[p.tp_axis] % size == 0, p.mm
