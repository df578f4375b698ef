"""8-bit storage of linear layers: the numbers by hand, the layer against the dequantised one, a whole model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models import quantization
from mindspeed_wan.models.quantization_spec import MODES, QuantizationSpec, expert_bytes
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan, init_weights
from mindspeed_wan.platforms import get_platform

CONFIG = WanConfig(num_layers=2, dim=96, ffn_dim=160, num_heads=4, text_dim=32, text_len=16, freq_dim=32)
WEIGHT_ONLY = [mode for mode in MODES if mode != "fp8_dynamic"]


def e4m3(bits: int) -> float:
    """Decode one e4m3 value from the format's definition."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, (bits >> 3) & 15, bits & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_codes_mean_what_the_format_says(dtype):
    codes = torch.tensor([[bits for bits in range(256) if bits & 0x7F != 0x7F]], dtype=torch.uint8).view(torch.int8)
    expected = [e4m3(bits & 0xFF) * 0.25 for bits in codes[0].tolist()]
    values = quantization.decode(codes, torch.full((1, 1), 0.25), "fp8", dtype)
    assert values[0].tolist() == expected  # exact in all three


def test_fp8_scales_are_the_smallest_powers_of_two_that_fit():
    rows = torch.tensor([[448.0, 1.0], [448.5, 1.0], [7.0, -0.1], [0.0, 0.0]])
    assert quantization.row_scales(rows, "fp8").flatten().tolist() == [1.0, 2.0, 2.0**-6, 1.0]


def test_int8_numbers_by_hand():
    rows = torch.tensor([[1.27, -0.4, 0.006], [0.0, 0.0, 0.0]])
    scales = quantization.row_scales(rows, "int8")
    assert scales.flatten().tolist() == pytest.approx([0.01, 1.0])
    assert quantization.encode(rows, scales, "int8").tolist() == [[127, -40, 1], [0, 0, 0]]


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_what_was_in_8_bits_stays_bit_for_bit(format):
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.03
    scales = quantization.row_scales(rows, format)
    codes = quantization.encode(rows, scales, format)
    values = quantization.decode(codes, scales, format, torch.float32)
    again = quantization.row_scales(values, format)
    codes = quantization.encode(values, again, format)
    torch.testing.assert_close(quantization.decode(codes, again, format, torch.float32), values,
                               rtol=1e-6 if format == "int8" else 0, atol=0)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="NaN"):
        quantization.row_scales(torch.tensor([[1.0, float("nan")]]), "fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", WEIGHT_ONLY)
def test_layer_equals_the_layer_with_its_dequantised_weight(mode, dtype):
    """Output and gradient, bit for bit."""
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype).requires_grad_(False)
    plain = copy.deepcopy(model)
    assert quantization.quantize_linears(model, QuantizationSpec(mode)) == 1
    plain[0].weight.copy_(model[0].dequantized())
    x = torch.randn(5, 64, dtype=dtype)
    gradients = []
    for network in (model, plain):
        leaf = x.clone().requires_grad_(True)
        out = network(leaf)
        (out.float() ** 2).sum().backward()
        gradients.append((out.detach(), leaf.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_backward_keeps_no_copy_of_the_weight():
    """Autograd would save the dequantised weight of every layer and undo what 8 bits save."""
    layer = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    quantization.quantize_linears(layer, QuantizationSpec("fp8_weight_only"))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert all(not t.is_floating_point() for t in saved)
    assert sum(t.numel() * t.element_size() for t in saved) == 48 * 64 + 4 * 48


@pytest.mark.parametrize(("mode", "config"), [
    ("fp8_weight_only", "Float8WeightOnlyConfig"), ("int8_weight_only", "Int8WeightOnlyConfig")])
def test_error_is_that_of_torchao(mode, config):
    torchao = pytest.importorskip("torchao.quantization")
    generator = torch.Generator().manual_seed(2)
    plain = nn.Sequential(nn.Linear(128, 96)).requires_grad_(False)
    plain[0].weight.copy_(torch.randn(96, 128, generator=generator) * 0.05)
    x = torch.randn(64, 128, generator=generator)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    quantization.quantize_linears(ours, QuantizationSpec(mode))
    torchao.quantize_(theirs, getattr(torchao, config)())
    errors = [float((network(x) - plain(x)).norm() / plain(x).norm()) for network in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15) and errors[0] > 1e-3


@pytest.mark.parametrize("mode", WEIGHT_ONLY)
def test_layer_is_one_graph_forwards_and_backwards(mode):
    layer = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    quantization.quantize_linears(layer, QuantizationSpec(mode))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for network in (layer, compiled):
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_(True)
        network(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def scaled_mm_runs() -> bool:
    one, a = torch.ones(()), torch.zeros(16, 16).to(quantization.FP8)
    try:
        torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.skipif(not scaled_mm_runs(), reason="this torch multiplies no fp8 on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_product_is_the_product_of_the_rounded_factors(dtype):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 9, 64), (48, 64), (48,)))
    scales = quantization.row_scales(weight, "fp8")
    codes = quantization.encode(weight, scales, "fp8")
    token = x.float().abs().amax(-1, keepdim=True) / 448
    rounded = (x.float() / token).to(quantization.FP8).double() * token.double()
    expected = F.linear(rounded, quantization.decode(codes, scales, "fp8", torch.float64), bias.double())
    out = quantization.fp8_product(x, codes, scales, bias)
    assert out.dtype == dtype and out.shape == (2, 9, 48)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)


# ---- a model ---------------------------------------------------------------------------------------------------------


def build(mode: str | None, keep: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> WanDiT:
    spec = QuantizationSpec(mode, keep) if mode else None
    model = build_wan(CONFIG, platform=get_platform("cpu"), param_dtype=dtype,
                      modify=None if spec is None else lambda m: quantization.quantize_layers(m, spec))
    init_weights(model, seed=3)
    with torch.no_grad():
        model.head.head.weight.normal_(generator=torch.Generator().manual_seed(4))
    return model.requires_grad_(False)


def run(model: WanDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 2, 8, 8), (1, 7, 32)))
    return model(latents.to(dtype), torch.tensor([700.0]), text.to(dtype))


@pytest.mark.parametrize("mode", WEIGHT_ONLY)
def test_model_equals_the_model_that_was_dequantised(mode):
    model, plain = build(mode), build(None)
    plain.load_state_dict(quantization.dequantized_state(model, torch.float32))
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize(("mode", "limit"), [("fp8_weight_only", 0.06), ("int8_weight_only", 0.02)])
def test_error_of_a_forward_pass(mode, limit):
    exact = run(build(None))
    error = ((run(build(mode)) - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < limit


def test_layers_outside_the_blocks_and_named_ones_are_kept():
    model = build("fp8_weight_only", keep=("blocks.1", "ffn.2"))
    names = [name for name, _ in quantization.quantized_layers(model)]
    assert len(names) == 9 and all(name.startswith("blocks.0.") and not name.endswith("ffn.2") for name in names)


@pytest.mark.parametrize("name", ["blocks.7", "proj", "head", "blocks.{1-"])
def test_a_kept_layer_that_does_not_exist_is_an_error(name):
    with pytest.raises(ConfigError, match="no linear layer"):
        QuantizationSpec("fp8_weight_only", (name,)).layers(CONFIG)


def test_bytes_of_an_expert():
    a14b = PRESETS["t2v-A14B"]
    assert expert_bytes(a14b, element=2) == pytest.approx(28.58e9, rel=1e-3)
    for mode in MODES:
        assert expert_bytes(a14b, element=2, quantization=QuantizationSpec(mode)) == pytest.approx(14.54e9, rel=1e-3)
    model = build("fp8_weight_only", dtype=torch.bfloat16)
    assert quantization.weight_bytes(model) == expert_bytes(CONFIG, element=2,
                                                            quantization=QuantizationSpec("fp8_weight_only"))


def test_fp8_products_need_the_hardware(monkeypatch):
    quantization.check_device("fp8_weight_only", torch.device("cpu"))
    with pytest.raises(ConfigError, match="sm_89"):
        quantization.check_device("fp8_dynamic", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.0"):
        quantization.check_device("fp8_dynamic", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    quantization.check_device("fp8_dynamic", torch.device("cuda"))
