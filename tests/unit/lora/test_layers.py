"""Adapters on a model, against PEFT on diffusers' transformer: forward, every gradient, loading, weights, unloading."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora import apply
from mindspeed_wan.lora.formats import Adapter, LoraFile
from mindspeed_wan.lora.merge_model import merge_into_model
from mindspeed_wan.lora.spec import LoraSpec, linear_modules
from mindspeed_wan.models.wan.model import WanDiT
from tests.helpers.oracle import TINY, diffusers_model, mm_state_dict, random_batch
from tests.unit.lora.cases import random_lora

ALL = ("all-linear",)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return mm_state_dict(diffusers_model(TINY), TINY)


@pytest.fixture
def model(weights: dict[str, Tensor]) -> WanDiT:
    model = WanDiT(TINY)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    batch = random_batch(TINY)
    return model(batch.latents, batch.timestep, batch.text)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


def peft_model(lora: LoraFile, rslora: bool = False):
    peft = pytest.importorskip("peft")
    modules = linear_modules(TINY)
    reference = diffusers_model(TINY)
    some = next(iter(lora.adapters.values()))
    alpha = some.alpha / some.rank**0.5 if rslora else some.alpha
    config = peft.LoraConfig(r=some.rank, lora_alpha=alpha, use_rslora=rslora,
                             target_modules=[modules[mm].hf for mm in lora.adapters])
    wrapped = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for mm, adapter in lora.adapters.items():
            layer = wrapped.base_model.model.get_submodule(modules[mm].hf)
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_B["default"].weight.copy_(adapter.up)
    return wrapped


@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_equal_peft(model: WanDiT, rslora: bool) -> None:
    lora = random_lora(TINY, targets=ALL, rank=4, alpha=6.0)
    reference = peft_model(lora, rslora)
    spec = LoraSpec(rank=4, alpha=6.0 / 2 if rslora else 6.0, targets=ALL, rslora=rslora)
    apply.add_adapter(model, spec)
    apply.fill_adapter(model, lora)
    batch = random_batch(TINY)
    ours = model(batch.latents, batch.timestep, batch.text)
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, TINY.text_len - batch.text.shape[1]))
    theirs = reference(batch.latents, batch.timestep, text, return_dict=False)[0]
    assert relative(ours, theirs) < 2e-6
    (ours * batch.cotangent).sum().backward()
    (theirs * batch.cotangent).sum().backward()
    modules = linear_modules(TINY)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(lora.adapters)
    for mm in lora.adapters:
        layer = reference.base_model.model.get_submodule(modules[mm].hf)
        for part in ("lora_A", "lora_B"):
            expected = getattr(layer, part)["default"].weight.grad
            assert relative(trained[f"{mm}.{part}.default.weight"], expected) < 1e-4, (mm, part)


def test_only_adapters_are_trained(model: WanDiT) -> None:
    apply.add_adapter(model, LoraSpec(rank=2, alpha=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(apply.adapter_views(model))
    assert len(trainable) == 2 * 20
    assert trainable <= set(model.param_layout)


def test_initial_adapter_changes_nothing_and_follows_peft(model: WanDiT) -> None:
    model.requires_grad_(False)  # operators choose their kernels by it
    before = run(model)
    apply.add_adapter(model, LoraSpec(rank=8, alpha=8))
    apply.init_adapter(model, seed=1)
    assert torch.equal(run(model), before)
    down = model.get_parameter("blocks.0.ffn.0.lora_A.default.weight").detach()
    bound = 1 / TINY.dim**0.5  # kaiming_uniform_(a=sqrt(5)) over fan_in
    assert down.abs().max() <= bound
    assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    other = model.get_parameter("blocks.1.ffn.0.lora_A.default.weight").detach()
    assert not torch.equal(down, other)
    first = down.clone()
    apply.init_adapter(model, seed=1)
    assert torch.equal(down, first)
    apply.init_adapter(model, seed=2)
    assert not torch.equal(down, first)


def test_several_adapters_add_up_and_unload(model: WanDiT) -> None:
    base = run(model)
    one, two = (random_lora(TINY, targets=ALL, seed=seed) for seed in (1, 2))
    apply.load_adapter(model, one, "one", weight=0.5)
    only_one = run(model)
    apply.load_adapter(model, two, "two")
    both = run(model)
    assert apply.adapter_names(model) == ["one", "two"]
    assert relative(only_one, base) > 1e-3
    assert relative(both, only_one) > 1e-3
    apply.set_weight(model, "two", 0.0)
    assert torch.equal(run(model), only_one)
    apply.set_weight(model, "two", 1.0)
    apply.unload(model, "one")
    apply.set_weight(model, "two", 0.0)
    assert torch.equal(run(model), base)
    apply.unload(model, "two")
    assert torch.equal(run(model), base)
    assert apply.adapter_names(model) == []


def test_unloading_leaves_nothing_behind(model: WanDiT, weights: dict[str, Tensor]) -> None:
    layouts = dict(model.param_layout)
    apply.load_adapter(model, random_lora(TINY, diffs=True), "x", weight=0.7)
    assert set(model.state_dict()) != set(weights)
    apply.unload(model, "x")
    assert model.param_layout == layouts
    state = model.state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not any(module._forward_hooks for module in model.modules())


def test_runtime_adapter_equals_merged_weights(model: WanDiT) -> None:
    lora = random_lora(TINY, targets=ALL, diffs=True)
    apply.load_adapter(model, lora, "x", weight=0.8)
    unmerged = run(model)
    apply.unload(model, "x")
    with torch.no_grad():
        for mm, adapter in lora.adapters.items():
            model.get_parameter(f"{mm}.weight").add_(adapter.delta(0.8))
        for name, diff in lora.diffs.items():
            model.get_parameter(name).add_(diff * 0.8)
    assert relative(unmerged, run(model)) < 5e-6


def test_a_pair_on_the_patch_embedding_acts_beside_the_weights(model: WanDiT) -> None:
    down, up = torch.randn(4, 64) * 0.1, torch.randn(TINY.dim, 4) * 0.1
    lora = LoraFile({"patch_embedding": Adapter(down, up, 2.0)})
    base = run(model)
    apply.load_adapter(model, lora, "x", weight=0.8)
    beside = run(model)
    apply.unload(model, "x")
    assert torch.equal(run(model), base)
    merge_into_model(model, [(lora, 0.8)])
    assert relative(beside, base) > 1e-3
    assert relative(beside, run(model)) < 5e-6


def test_adapters_may_change_the_same_parameter(model: WanDiT) -> None:
    base = run(model)
    one, two = (random_lora(TINY, diffs=True, seed=seed) for seed in (1, 2))
    apply.load_adapter(model, two, "two", weight=0.5)
    only_two = run(model)
    apply.load_adapter(model, one, "one")
    both = run(model)
    assert relative(both, only_two) > 1e-3
    apply.set_weight(model, "two", 0.25)
    assert relative(run(model), both) > 1e-3
    apply.set_weight(model, "two", 0.5)
    assert torch.equal(run(model), both)
    apply.unload(model, "one")
    assert torch.equal(run(model), only_two)
    apply.unload(model, "two")
    assert torch.equal(run(model), base)


def test_text_context_sees_the_adapter(model: WanDiT) -> None:
    """Keys and values cached for inference come from the adapted layers."""
    apply.load_adapter(model, random_lora(TINY, targets=("cross_attn.k", "cross_attn.v")), "x")
    batch = random_batch(TINY)
    cached = model(batch.latents, batch.timestep, text_context=model.encode_text(batch.text))
    assert relative(cached, run(model)) < 1e-6


def test_export_returns_what_was_loaded(model: WanDiT) -> None:
    lora = random_lora(TINY, targets=("q", "ffn.2"), alpha=3.0)
    apply.load_adapter(model, lora, "x")
    back = apply.export_adapter(model, name="x")
    assert list(back.adapters) == list(lora.adapters)
    for mm, adapter in lora.adapters.items():
        assert torch.equal(back.adapters[mm].up, adapter.up)
        assert back.adapters[mm].alpha == adapter.alpha


def test_bf16_base_with_adapter(model: WanDiT) -> None:
    model.to(torch.bfloat16)
    lora = random_lora(TINY, targets=ALL)
    base = run(model)
    apply.load_adapter(model, lora, "kept_fp32", dtype=torch.float32)
    assert model.get_parameter("blocks.0.ffn.0.lora_A.kept_fp32.weight").dtype == torch.float32
    assert torch.isfinite(run(model)).all()
    assert relative(run(model), base) > 1e-3


def test_dropout_acts_in_training_only(model: WanDiT) -> None:
    apply.add_adapter(model, LoraSpec(rank=4, alpha=4, dropout=0.5, targets=ALL))
    apply.fill_adapter(model, random_lora(TINY, targets=ALL, alpha=4.0))
    model.eval()
    assert torch.equal(run(model), run(model))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(run(model), run(model))


def test_fill_keeps_the_function_when_scales_differ(model: WanDiT) -> None:
    lora = random_lora(TINY, targets=("q",), rank=4, alpha=2.0)
    apply.load_adapter(model, lora, "x")
    expected = run(model)
    apply.unload(model, "x")
    apply.add_adapter(model, LoraSpec(rank=4, alpha=16.0, targets=("q",)))
    apply.fill_adapter(model, lora)
    assert relative(run(model), expected) < 1e-6


def test_wrong_adapters_are_refused(model: WanDiT) -> None:
    apply.add_adapter(model, LoraSpec(rank=4, alpha=4, targets=("q", "k")))
    with pytest.raises(CheckpointError, match="only in the run"):
        apply.fill_adapter(model, random_lora(TINY, targets=("q",)))
    with pytest.raises(CheckpointError, match="rank 2 in the file"):
        apply.fill_adapter(model, random_lora(TINY, targets=("q", "k"), rank=2))
    with pytest.raises(ConfigError, match="already there"):
        apply.add_adapter(model, LoraSpec())
    with pytest.raises(ConfigError, match="no adapter is called 'y'"):
        apply.unload(model, "y")
    with pytest.raises(ConfigError, match="no adapter is called 'y'"):
        apply.set_weight(model, "y", 0.5)
    with pytest.raises(ConfigError, match="adapter name"):
        apply.load_adapter(model, random_lora(TINY), "a.b")


def test_compiled_blocks_notice_a_new_adapter(model: WanDiT) -> None:
    lora = random_lora(TINY)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    base = run(model)
    apply.load_adapter(model, lora, "x")
    adapted = run(model)
    assert relative(adapted, base) > 1e-3
    apply.set_weight(model, "x", 0.5)
    assert relative(run(model), adapted) > 1e-4
    apply.unload(model, "x")
    assert relative(run(model), base) < 1e-6
