"""Adapter files: known key grammars, bit-exact round trips through every pair of formats, alpha from every place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora.formats import FORMATS, Adapter, LoraFile, parse, read_lora, to_tensors, write_lora
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from tests.helpers import reward_lora as reward
from tests.unit.lora.cases import TINY, random_lora, same

CARRY_DIFFS = [name for name, spelling in FORMATS.items() if spelling.diffs]


def write(lora: LoraFile, folder: Path, name: str, config: WanConfig = TINY) -> Path:
    return write_lora(lora, folder / (name if name == "peft" else f"{name}.safetensors"), config, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_round_trip_through_two_formats_is_bit_exact(
    tmp_path: Path, first: str, second: str, dtype: torch.dtype
) -> None:
    lora = random_lora(alpha=2.0, dtype=dtype, targets=("q", "v", "o", "ffn.0"))
    once = read_lora(write(lora, tmp_path, first), TINY)
    twice = read_lora(write(once, tmp_path, second), TINY)
    assert same(once, lora)
    assert same(twice, lora)
    assert (once.format, twice.format) == (first, second)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CARRY_DIFFS, 2)))
def test_differences_round_trip(tmp_path: Path, first: str, second: str) -> None:
    lora = random_lora(diffs=True)
    once = read_lora(write(lora, tmp_path, first), TINY)
    assert same(read_lora(write(once, tmp_path, second), TINY), lora)
    assert "head.modulation" in once.diffs
    assert "blocks.1.modulation" in once.diffs


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(CARRY_DIFFS)))
def test_differences_are_not_lost_silently(tmp_path: Path, name: str) -> None:
    lora = random_lora(diffs=True)
    with pytest.raises(CheckpointError, match="differences"):
        write(lora, tmp_path, name)
    kept = read_lora(write_lora(lora, tmp_path / "kept", TINY, name, drop_diffs=True), TINY)
    biases_of_b = {name for name in lora.diffs if name.endswith("proj_q.bias")} if FORMATS[name].up_bias else set()
    assert kept.diffs.keys() == biases_of_b
    assert len(kept.adapters) == len(lora.adapters)


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_and_alphas_may_differ_per_module(tmp_path: Path, name: str) -> None:
    ordinary = random_lora(targets=("q",), rank=4, alpha=4.0)
    other = random_lora(targets=("ffn.2",), rank=8, alpha=16.0, seed=1)
    mixed = LoraFile({**ordinary.adapters, **other.adapters})
    mixed = LoraFile(dict(sorted(mixed.adapters.items(), key=lambda item: list(random_lora().adapters).index(item[0]))))
    assert same(read_lora(write(mixed, tmp_path, name), TINY), mixed)


def test_odd_scales_survive_formats_that_fold_them(tmp_path: Path) -> None:
    """DiffSynth's loader knows no alpha, so the scale goes into B, in the dtype that gives every bit back."""
    lora = random_lora(rank=4, alpha=2.2)
    assert same(read_lora(write(lora, tmp_path, "diffsynth"), TINY), lora)
    seen_by_diffsynth = load_file(tmp_path / "diffsynth.safetensors")
    key = "blocks.0.self_attn.q.lora_B.default.weight"
    assert torch.equal(seen_by_diffsynth[key], lora.adapters["blocks.0.self_attn.proj_q"].up.double() * (2.2 / 4))


def test_modules_of_several_dtypes_survive_folding(tmp_path: Path) -> None:
    lora, half = random_lora(rank=4, alpha=2.2), random_lora(rank=4, alpha=2.2, dtype=torch.bfloat16)
    name = "blocks.1.ffn.0"
    mixed = LoraFile({**lora.adapters, name: half.adapters[name]})
    assert same(read_lora(write(mixed, tmp_path, "diffsynth"), TINY), mixed)


KNOWN_KEYS = {
    "kohya": ["lora_unet_blocks_1_cross_attn_k.lora_down.weight", "lora_unet_blocks_1_cross_attn_k.alpha",
              "lora_unet_blocks_0_ffn_2.lora_up.weight", "lora_unet_text_embedding_0.lora_up.weight"],
    "kohya2": ["lora_unet__blocks_0_cross_attn_k.lora_down.weight", "lora_unet__head_head.alpha",
               "lora_unet__time_projection_1.lora_up.weight"],
    "comfy": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.ffn.0.alpha"],
    "lightx2v": ["diffusion_model.blocks.0.self_attn.q.lora_down.weight",
                 "diffusion_model.blocks.0.ffn.0.lora_up.weight"],
    "diffsynth": ["blocks.0.self_attn.q.lora_A.default.weight", "blocks.1.ffn.0.lora_B.default.weight"],
    "diffusers": ["transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.1.attn2.to_out.0.lora_B.weight",
                  "transformer.proj_out.lora_A.weight", "transformer.blocks.0.ffn.net.0.proj.lora_A.weight"],
    "peft": ["base_model.model.blocks.0.attn1.to_q.lora_A.weight"],
    "mm": ["base_model.model.blocks.0.self_attn.proj_q.lora_A.default.weight"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_key_grammar(name: str) -> None:
    tensors, metadata = to_tensors(random_lora(targets=("all-linear",)), TINY, name)
    assert set(KNOWN_KEYS[name]) <= set(tensors)
    assert len(tensors) == 26 * (3 if FORMATS[name].alpha == "tensor" else 2)
    assert metadata["format"] == "pt"


def test_lightx2v_differences_grammar() -> None:
    tensors, _ = to_tensors(random_lora(diffs=True), TINY, "lightx2v")
    assert {"diffusion_model.blocks.0.diff_m", "diffusion_model.blocks.0.norm3.diff",
            "diffusion_model.blocks.0.norm3.diff_b", "diffusion_model.blocks.0.self_attn.norm_q.diff",
            "diffusion_model.blocks.0.self_attn.q.diff_b", "diffusion_model.head.head.diff",
            "diffusion_model.patch_embedding.diff_b"} <= set(tensors)


def test_reward_lora_at_real_size_on_meta() -> None:
    """326 modules, 978 tensors, 429,171,014 values, all resolved against the real A14B-InP model."""
    tensors = reward.reward_lora(PRESETS["inp-A14B"], device="meta")
    assert len(tensors) == reward.NUM_TENSORS
    assert sum(tensor.numel() for tensor in tensors.values()) == reward.NUM_VALUES
    lora = parse(tensors, {}, PRESETS["inp-A14B"])
    assert len(lora.adapters) == reward.NUM_MODULES
    assert (lora.ranks, lora.format, lora.alpha_source) == ([128], "kohya2", "stored")
    assert lora.num_values + reward.NUM_MODULES == reward.NUM_VALUES
    assert all(adapter.scale == 0.5 for adapter in lora.adapters.values())
    again, _ = to_tensors(lora, PRESETS["inp-A14B"], "kohya2")
    assert list(again) and {k: (v.shape, v.dtype) for k, v in again.items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("lora_unet_blocks_0.cross_attn.k", "blocks.0.cross_attn.proj_k"),
        ("lora_unet__blocks_0_self_attn_o", "blocks.0.self_attn.proj_out"),
        ("lora_transformer_blocks_1_ffn_0", "blocks.1.ffn.0"),
        ("model.diffusion_model.blocks.1.ffn.0", "blocks.1.ffn.0"),
        ("transformer_2.blocks.1.attn1.to_v", "blocks.1.self_attn.proj_v"),
        ("base_model.model.predictor.blocks.1.self_attn.proj_v", "blocks.1.self_attn.proj_v"),
        ("pipe.dit.blocks.0.self_attn.q", "blocks.0.self_attn.proj_q"),
        ("time_embedding.2", "time_embedding.2"),
        ("lora_unet_time_embedding_0", "time_embedding.0"),
    ],
)
@pytest.mark.parametrize("endings", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"),
                                     ("lora_A.default.weight", "lora_B.default.weight"),
                                     ("lora.down.weight", "lora.up.weight")])
def test_spellings_in_the_wild(key: str, module: str, endings: tuple[str, str]) -> None:
    out_features, in_features = {p.mm: p.shape for p in _params()}[f"{module}.weight"]
    tensors = {f"{key}.{endings[0]}": torch.ones(2, in_features), f"{key}.{endings[1]}": torch.ones(out_features, 2)}
    assert list(parse(tensors, {}, TINY).adapters) == [module]


def _params():
    from mindspeed_wan.models.wan.param_map import parameter_table

    return parameter_table(TINY)


def test_no_two_modules_share_an_underscore_name() -> None:
    from mindspeed_wan.lora.names import LAYOUTS, NameTable

    for config in (PRESETS["t2v-A14B"], PRESETS["i2v-14B"], TINY):
        table = NameTable(config)
        for param in table.params.values():
            for layout in LAYOUTS:
                stem = param.name(layout).rpartition(".")[0]
                if stem:
                    assert table.resolve(stem).mm == param.mm.rpartition(".")[0]
                    assert table.resolve("lora_unet_" + stem.replace(".", "_")).mm == param.mm.rpartition(".")[0]


# ---- alpha ------------------------------------------------------------------------------------------------------


def pair(key: str = "blocks.0.self_attn.q", a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict:
    return {f"{key}.{a}": torch.ones(4, 48), f"{key}.{b}": torch.ones(48, 4)}


def test_alpha_missing_means_rank_and_can_be_overridden() -> None:
    lora = parse(pair(), {}, TINY)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.alpha_source) == (1.0, "default")
    lora = parse(pair(), {}, TINY, alpha_override=2.0)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.alpha_source) == (0.5, "override")


def test_a_default_alpha_counts_where_the_file_says_none() -> None:
    lora = parse(pair(), {}, TINY, alpha_default=2.0)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.alpha_source) == (0.5, "given")
    stored = {**pair("lora_unet_blocks_0_self_attn_q"), "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(4.0)}
    lora = parse(stored, {}, TINY, alpha_default=2.0)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.alpha_source) == (1.0, "stored")


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_on_the_patch_embedding_keeps_the_convolutions_shape(tmp_path: Path, name: str) -> None:
    down, up = torch.randn(4, 16, 1, 2, 2), torch.randn(TINY.dim, 4, 1, 1, 1)
    stem = "transformer.patch_embedding."
    lora = parse({stem + "lora_A.weight": down, stem + "lora_B.weight": up}, {}, TINY)
    assert torch.equal(lora.adapters["patch_embedding"].down, down.flatten(1))
    path = write(lora, tmp_path, name)
    assert same(read_lora(path, TINY), lora)
    assert sorted(map(tuple, (t.shape for t in load_file(path).values() if t.ndim))) == [(4, 16, 1, 2, 2),
                                                                                        (TINY.dim, 4, 1, 1, 1)]


def test_a_pair_on_another_models_patch_embedding_is_named() -> None:
    stem = "transformer.patch_embedding."
    tensors = {stem + "lora_A.weight": torch.ones(4, 36, 1, 2, 2),
               stem + "lora_B.weight": torch.ones(TINY.dim, 4, 1, 1, 1)}
    with pytest.raises(CheckpointError, match="made for a layer of 48 x 144, this model's is 48 x 64"):
        parse(tensors, {}, TINY)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        write_lora(random_lora(), tmp_path, TINY, "comfy")


def test_override_of_a_folded_file(tmp_path: Path) -> None:
    lora = random_lora(rank=4, alpha=2.0)
    path = write(lora, tmp_path, "diffsynth")
    overridden = read_lora(path, TINY, alpha_override=8.0)
    for name, adapter in lora.adapters.items():
        assert torch.equal(overridden.adapters[name].up, adapter.up)
        assert overridden.adapters[name].scale == 2.0


def test_alpha_from_kohya_metadata() -> None:
    lora = parse(pair("lora_unet_blocks_0_self_attn_q"), {"ss_network_alpha": "2", "ss_network_dim": "4"}, TINY)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.alpha_source) == (0.5, "metadata")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"r": 4, "lora_alpha": 8}, 2.0), ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
     ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
     ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_q": 2}}, 2.0),
     ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"blocks\.\d+\.attn1.*": 16}}, 4.0)],
)
def test_alpha_from_peft_metadata(settings: dict, scale: float) -> None:
    tensors = pair("transformer.blocks.0.attn1.to_q")
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    lora = parse(tensors, metadata, TINY)
    assert lora.adapters["blocks.0.self_attn.proj_q"].scale == pytest.approx(scale)


def test_alpha_from_peft_config_file(tmp_path: Path) -> None:
    save_file(pair("base_model.model.blocks.0.attn1.to_q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1}))
    lora = read_lora(tmp_path, TINY)
    assert (lora.adapters["blocks.0.self_attn.proj_q"].scale, lora.format) == (0.25, "peft")


def test_kohya_writes_alpha_in_the_files_dtype_when_exact() -> None:
    tensors, _ = to_tensors(random_lora(dtype=torch.bfloat16, alpha=64.0), TINY, "kohya2")
    assert tensors["lora_unet__blocks_0_ffn_0.alpha"].dtype == torch.bfloat16
    tensors, _ = to_tensors(random_lora(dtype=torch.bfloat16, alpha=1.1), TINY, "kohya2")
    assert float(tensors["lora_unet__blocks_0_ffn_0.alpha"]) == 1.1


# ---- containers and errors --------------------------------------------------------------------------------------


def test_torch_files(tmp_path: Path) -> None:
    lora = random_lora()
    tensors, _ = to_tensors(lora, TINY, "kohya")
    torch.save({"state_dict": tensors}, tmp_path / "lora.pt")
    assert same(read_lora(tmp_path / "lora.pt", TINY), lora)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    lora = random_lora()
    write_lora(lora, tmp_path / "anything.safetensors", TINY, "kohya")
    assert same(read_lora(tmp_path, TINY), lora)
    write_lora(lora, tmp_path / "second.safetensors", TINY, "kohya")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        read_lora(tmp_path, TINY)
    write_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", TINY, "diffusers")
    assert read_lora(tmp_path, TINY).format == "diffusers"


def test_unmatched_keys_are_fatal_unless_allowed() -> None:
    tensors = {**pair(), **pair("img_emb.proj.1"), "blocks.0.cross_attn.k_img.diff_b": torch.ones(48)}
    with pytest.raises(CheckpointError, match=r"3 keys match nothing.*img_emb\.proj\.1"):
        parse(tensors, {}, TINY)
    lora = parse(tensors, {}, TINY, allow_unmatched=True)
    assert len(lora.unmatched) == 3
    assert list(lora.adapters) == ["blocks.0.self_attn.proj_q"]


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_lora(random_lora(), tmp_path / "a.safetensors", TINY, "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kohya'"):
        to_tensors(random_lora(), TINY, "kohyaa")


def test_an_adapter_alone_knows_its_delta() -> None:
    adapter = Adapter(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), alpha=0.5)
    assert torch.equal(adapter.delta(2.0), torch.tensor([[3.0, 6.0], [4.0, 8.0]]))
