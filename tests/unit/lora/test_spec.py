"""Targets: exact matching in every dialect, and errors that list the legal names."""

from __future__ import annotations

import pytest

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.lora.spec import (
    DEFAULT_TARGETS,
    LoraSpec,
    legal_targets,
    linear_modules,
    match_targets,
    parse_targets,
)
from mindspeed_wan.models.wan.config import PRESETS, WanConfig

A14B = PRESETS["t2v-A14B"]
TINY = WanConfig(num_layers=2, dim=48, ffn_dim=96, num_heads=4, text_dim=32, freq_dim=16)


def test_linear_modules_of_the_real_model() -> None:
    modules = linear_modules(A14B)
    assert len(modules) == 406
    assert sum(module.block is not None for module in modules.values()) == 400
    ffn = modules["blocks.7.ffn.0"]
    assert (ffn.out_features, ffn.in_features, ffn.tp_axis) == (13824, 5120, 0)
    assert modules["blocks.7.self_attn.proj_out"].tp_axis == 1
    assert modules["text_embedding.linear_1"].original == "text_embedding.0"


@pytest.mark.parametrize(
    "targets",
    ["proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2", "q,k,v,o,ffn.0,ffn.2",
     "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2", "blocks"],
)
def test_all_dialects_name_the_same_400_modules(targets: str) -> None:
    chosen = match_targets(parse_targets(targets), A14B)
    assert chosen == match_targets(DEFAULT_TARGETS, A14B)
    assert len(chosen) == 400


def test_parameter_count_of_diffsynths_recipe() -> None:
    """Rank 32 on q,k,v,o,ffn.0,ffn.2 has 153.35 M parameters."""
    sizes = LoraSpec(rank=32, alpha=32).resolve(A14B)
    modules = linear_modules(A14B)
    count = sum(size.rank * (modules[n].in_features + modules[n].out_features) for n, size in sizes.items())
    assert count == pytest.approx(153.35e6, rel=1e-4)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["self_attn.proj_q"], ["blocks.0.self_attn.proj_q", "blocks.1.self_attn.proj_q"]),
        (["attn2.to_out.0"], ["blocks.0.cross_attn.proj_out", "blocks.1.cross_attn.proj_out"]),
        (["proj_out"], [f"blocks.{i}.{a}.proj_out" for i in (0, 1) for a in ("self_attn", "cross_attn")]),
        (["blocks.1.ffn.net.2"], ["blocks.1.ffn.2"]),
        (["head.head", "text_embedding.0"], ["text_embedding.linear_1", "head.head"]),
        (["condition_embedder.time_proj"], ["time_projection.1"]),
    ],
)
def test_single_targets(targets: list[str], expected: list[str]) -> None:
    assert list(match_targets(targets, TINY)) == expected


def test_groups() -> None:
    assert len(match_targets(["all-linear"], TINY)) == 26
    assert len(match_targets(["attention"], TINY)) == 16
    assert set(match_targets(["blocks"], TINY)) < set(match_targets(["all-linear"], TINY))


@pytest.mark.parametrize(
    ("target", "reason"),
    [("0", "ambiguous"), ("2", "ambiguous"), ("linear_1", "ambiguous"), ("block", "substring"), ("qq", "no module"),
     ("proj", "substring"), ("patch_embedding", "no module"), ("norm_q", "no module"), ("blocks.9.ffn.0", "no module")],
)
def test_unknown_targets_are_errors_that_list_the_legal_names(target: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        match_targets([target], TINY)
    for name in ("proj_q", "to_q", "ffn.0", "all-linear"):
        assert name in str(error.value)


def test_a_typo_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean proj_q"):
        match_targets(["projq"], TINY)


def test_no_alias_means_two_kinds_of_module() -> None:
    """An alias stands for one kind of module, or the self/cross pair of it."""
    for alias, names in legal_targets(A14B).items():
        kinds = {name.split(".", 2)[2].split(".", 1)[-1] if name.startswith("blocks.") else name for name in names}
        assert len(kinds) == 1, (alias, kinds)


def test_wan21_image_projections() -> None:
    config = WanConfig(num_layers=1, dim=48, ffn_dim=96, num_heads=4, in_channels=36, image_dim=64)
    assert list(match_targets(["k_img", "add_v_proj"], config)) == ["blocks.0.cross_attn.k_img",
                                                                   "blocks.0.cross_attn.v_img"]
    assert "blocks.0.cross_attn.k_img" not in match_targets(["k", "v"], config)


def test_ranks_and_scales() -> None:
    spec = LoraSpec(rank=8, alpha=16, targets=("q", "ffn.0"), rank_pattern={"ffn.0": 4})
    sizes = spec.resolve(TINY)
    assert sizes["blocks.0.self_attn.proj_q"].scale == 2.0
    assert (sizes["blocks.0.ffn.0"].rank, sizes["blocks.0.ffn.0"].scale) == (4, 2.0)
    stabilised = spec.with_changes(rslora=True).resolve(TINY)
    assert stabilised["blocks.0.self_attn.proj_q"].scale == pytest.approx(16 / 8**0.5)
    assert stabilised["blocks.0.ffn.0"].scale == pytest.approx(16 / 4**0.5)
    assert LoraSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "make",
    [lambda: LoraSpec(rank=0), lambda: LoraSpec(rank=2.5), lambda: LoraSpec(alpha=0), lambda: LoraSpec(dropout=1.0),
     lambda: LoraSpec(rank=64).resolve(TINY), lambda: LoraSpec(targets=()).resolve(TINY),
     lambda: LoraSpec(targets=("q",), rank_pattern={"ffn.0": 4}).resolve(TINY),
     lambda: LoraSpec(rank_pattern={"q": 0})],
)
def test_bad_specs(make) -> None:
    with pytest.raises(ConfigError):
        make()
