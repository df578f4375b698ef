"""8-bit weights on every layout: the same codes, the same loss and adapter gradients, the same video as on one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.lora import apply
from mindspeed_wan.lora.formats import LoraFile
from mindspeed_wan.lora.spec import LoraSpec
from mindspeed_wan.models.quantization import QuantizedView, quantize_layers, quantized_layers, weight_views
from mindspeed_wan.models.quantization_spec import QuantizationSpec
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.models.wan.views import global_views, local_slices
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.fsdp2 import shards_integers
from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups, destroy
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import Fsdp2, Layout, gathered_grads, local_loss
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks
from tests.unit.lora.cases import random_lora

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("all-linear",))
FSDP = Fsdp2(num_to_forward_prefetch=1)
LAYOUTS = {
    "tp2": (2, Layout({"tensor": 2})),
    "tp2-sp-recompute": (2, Layout({"tensor": 2, "sequence_parallel": True}, recompute=RecomputePlan())),
    "cp2": (2, Layout({"context": 2})),
    "fsdp2": (2, Layout({}, fsdp2=FSDP)),
    "cp2-fsdp2-recompute": (2, Layout({"context": 2}, fsdp2=FSDP, recompute=RecomputePlan())),
    "tp2-sp-fsdp2": (4, Layout({"tensor": 2, "sequence_parallel": True}, fsdp2=FSDP)),
}
Case = tuple[str, dict[str, Tensor], LoraFile, Batch]
needs_integer_shards = pytest.mark.skipif(not shards_integers(), reason="FSDP2 of this torch shards no integers")


def case(mode: str) -> Case:
    weights = mm_state_dict(diffusers_model(TINY), TINY)
    batch = random_batch(TINY, timesteps=(700.0, 31.5))
    return mode, weights, random_lora(TINY, targets=SPEC.targets, rank=4, alpha=8.0), batch


def built(layout: Layout, groups: ParallelGroups, given: Case) -> WanDiT:
    mode, weights, lora, _ = given

    def modify(model: WanDiT) -> None:
        quantize_layers(model, QuantizationSpec(mode))
        apply.add_adapter(model, SPEC, dtype=torch.float32)

    model = build_wan(TINY, groups=groups, platform=get_platform("cpu"), fsdp2=layout.fsdp2,
                      recompute=layout.recompute, modify=modify)
    for name, view in weight_views(model, groups).items():
        if apply.is_factor(name):
            continue
        if isinstance(view, QuantizedView):
            view.fill(weights[name][view.rows])
        else:
            local, index = local_slices(view)
            local.copy_(weights[name][index])
    apply.fill_adapter(model, lora, groups)
    return model


def step(model: WanDiT, groups: ParallelGroups, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    _, loss = local_loss(model, groups, batch)
    loss.backward()
    finish_grads(model, groups, 0.0)
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total), gathered_grads(model, groups)


def on_ranks(rank: int, world_size: int, layout: Layout, given: Case) -> Any:
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    model = built(layout, groups, given)
    views = global_views(model, groups)
    names = [f"{name}.{part}" for name, _ in quantized_layers(model) for part in ("weight", "weight_scale")]
    local_bytes = sum(local_slices(views[name])[0].nbytes for name in names)
    codes = {name: views[name].full_tensor() if isinstance(views[name], DTensor) else views[name] for name in names}
    loss, grads = step(model, groups, given[3])
    destroy()
    return codes, local_bytes, loss, grads


def one_rank(given: Case) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    groups = ParallelGroups()
    model = built(Layout(), groups, given)
    loss, grads = step(model, groups, given[3])
    codes = {name: p.detach() for name, p in model.named_parameters() if not p.is_floating_point()}
    return codes, loss, grads


QUICK = {("fp8_weight_only", "tp2-sp-recompute"), ("fp8_weight_only", "fsdp2"), ("int8_weight_only", "tp2")}


def cases() -> list[Any]:
    every = [(mode, name) for mode in ("fp8_weight_only", "int8_weight_only") for name in LAYOUTS]
    return [
        pytest.param(*given, id="-".join(given), marks=[
            *([needs_integer_shards] if LAYOUTS[given[1]][1].fsdp2 else []),
            *([] if given in QUICK else [pytest.mark.slow]),
        ]) for given in every
    ]


@pytest.mark.parametrize(("mode", "name"), cases())
def test_every_layout_trains_adapters_as_one_rank(mode: str, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    given = case(mode)
    codes, loss, grads = one_rank(given)
    assert len(grads) == 2 * len(given[2].adapters)
    for seen_codes, local_bytes, seen_loss, seen_grads in run_ranks(on_ranks, world_size, layout, given):
        assert seen_codes.keys() == codes.keys()
        assert all(torch.equal(seen_codes[key], value) for key, value in codes.items())
        if layout.fsdp2 is not None:
            assert local_bytes <= 0.55 * sum(value.nbytes for value in codes.values())
        assert seen_loss == pytest.approx(loss, rel=1e-5)
        assert seen_grads.keys() == grads.keys()
        for parameter, grad in grads.items():
            torch.testing.assert_close(seen_grads[parameter], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max() + 1))


def test_gradients_equal_those_with_a_base_that_was_dequantised() -> None:
    """Bit for bit, in fp32 and with recomputation."""
    from mindspeed_wan.models.quantization import dequantized_state

    for mode in ("fp8_weight_only", "int8_weight_only"):
        given = case(mode)
        groups = ParallelGroups()
        held = built(Layout(recompute=RecomputePlan()), groups, given)
        plain = build_wan(TINY, platform=get_platform("cpu"), modify=partial(apply.add_adapter, spec=SPEC))
        plain.load_state_dict(dequantized_state(held, torch.float32))
        loss, grads = step(held, groups, given[3])
        wanted_loss, wanted = step(plain, groups, given[3])
        assert loss == wanted_loss
        assert all(torch.equal(grads[name], grad) for name, grad in wanted.items())


@needs_integer_shards
def test_fsdp2_gathers_8_bits_also_when_it_computes_in_bf16() -> None:
    """A floating parameter would be cast to bf16 before it is gathered."""
    layout = replace(LAYOUTS["fsdp2"][1], fsdp2=replace(FSDP, param_dtype="bf16"))
    assert run_ranks(gathered_dtypes, 2, layout, case("fp8_weight_only")) == [{"torch.int8", "torch.int32"}] * 2


def gathered_dtypes(rank: int, world_size: int, layout: Layout, given: Case) -> set[str]:
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    model = built(layout, groups, given)
    seen: set[str] = set()
    for _, layer in quantized_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args: seen.update((str(module.weight.dtype), str(module.weight_scale.dtype))))
    with torch.no_grad():
        local_loss(model, groups, given[3])
    destroy()
    return seen


@pytest.mark.skipif(shards_integers(), reason="this torch's FSDP2 shards integers")
def test_an_old_fsdp2_is_refused() -> None:
    assert all("newer torch" in text for text in run_ranks(refusal, 2, LAYOUTS["fsdp2"][1], case("fp8_weight_only")))


def refusal(rank: int, world_size: int, layout: Layout, given: Case) -> str:
    groups = build_groups(ParallelDims(world_size=world_size, **layout.dims), get_platform("cpu"))
    with pytest.raises(ConfigError) as caught:
        built(layout, groups, given)
    destroy()
    return str(caught.value)


# ---- generating ------------------------------------------------------------------------------------------------------

GENERATE: list[tuple[int, dict[str, Any]]] = [
    (2, {"layout": {"tensor": 2}, "memory": "block"}),
    (2, {"layout": {"ulysses": 2}, "memory": "sequential"}),
    (2, {"layout": {"tensor": 2}}),
    (2, {"layout": {"pipeline": 2}, "memory": "sequential"}),
]
SLOW = pytest.mark.slow
GENERATE_CASES = [GENERATE[0], *(pytest.param(*given, marks=SLOW) for given in GENERATE[1:])]


@pytest.mark.parametrize(("world_size", "options"), GENERATE_CASES)
def test_same_video_on_every_layout(world_size: int, options: dict[str, Any]) -> None:
    check_video(world_size, options)


@needs_integer_shards
@pytest.mark.parametrize("options", [pytest.param({}, marks=SLOW), {"memory": "sequential"}])
def test_same_video_with_sharded_codes(options: dict[str, Any]) -> None:
    check_video(2, {"layout": {"ulysses": 2, "dit_fsdp": True}, **options})


def check_video(world_size: int, options: dict[str, Any]) -> None:
    from mindspeed_wan.inference.quantize_options import QuantizeOptions
    from tests.distributed.test_inference_layouts import PROMPTS, _generate, relative
    from tests.helpers.tiny import tiny_pipeline_folder

    quantize = {"quantize": QuantizeOptions(dit="fp8_weight_only")}
    expected = run_ranks(_generate, 1, tiny_pipeline_folder(), dict(quantize))[0][PROMPTS[0]][0]
    for outcome in run_ranks(_generate, world_size, tiny_pipeline_folder(), {**options, **quantize}):
        assert relative(outcome[PROMPTS[0]][0], expected) <= 1e-5
