"""The NPU code path on the CPU: torch_npu's real operator schemas, compared with the torch reference."""

import pytest
import torch

from mindspeed_wan.platforms import attention as kernels
from mindspeed_wan.platforms import ops, reference
from tests.unit.platforms import fake_npu
from tests.unit.platforms.test_ops import random, rotary_tables


@pytest.fixture(scope="module", autouse=True)
def operators():
    library = fake_npu.define_operators()
    yield
    library._destroy()


@pytest.fixture
def npu():
    with ops.use("npu"):
        yield


def both(call):
    """Return the result of ``call`` with the NPU kernels and with the reference."""
    with ops.use("npu"):
        assert ops.kernels_in_use() == "npu" and ops.attention_in_use() == "npu"
        fused = call()
    return fused, call()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_length", [None, 8])
def test_attention_and_gradients_equal_the_reference(batch, kv_length):
    q, k, v = random(7, batch, 4, 16), random(11, batch, 4, 16, seed=1), random(11, batch, 4, 16, seed=2)
    cotangent = torch.randn(7, batch, 4, 16)

    def run():
        out = ops.attention(q, k, v, kv_length=kv_length)
        return out, *torch.autograd.grad(out, (q, k, v), cotangent)

    for fused, plain in zip(*both(run), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_ring_pieces_equal_the_reference():
    q, k, v = (random(6, 2, 2, 8, seed=seed).detach() for seed in range(3))

    def run():
        out, lse = ops.attention_with_lse(q, k, v, scale=0.3, kv_length=5)
        merged = lse + 0.7  # as if other ranks had contributed: the backward must use this, not its own
        return out, lse, *ops.attention_backward(out + 1, q, k, v, out=out, lse=merged, scale=0.3, kv_length=5)

    for fused, plain in zip(*both(run), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_equals_the_plain_formula_exactly(dtype, npu):
    x = random(9, 2, 3, 8, dtype=dtype)
    cos, sin = rotary_tables(9, 8)
    fused = ops.rotary(x, cos, sin)
    assert fused.dtype == dtype
    assert torch.equal(fused, reference.rotary(x, cos, sin))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(weight_dtype):
    x, weight = random(5, 2, 16), random(16, dtype=weight_dtype, seed=1)
    fused, reference = both(lambda: ops.rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(fused, reference)


@pytest.mark.parametrize("shape", [(1, 1, 16), (16,), (1, 2, 16)])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_modulated_layer_norm_without_gradients(shape, out_dtype):
    x, scale, shift = random(5, 2, 16), random(*shape, seed=1), random(*shape, seed=2)
    with torch.no_grad():
        fused, reference = both(lambda: ops.modulated_layer_norm(x, scale, shift, 1e-6, out_dtype=out_dtype))
    torch.testing.assert_close(fused, reference)


def test_layer_norm_uses_the_inference_kernel_only_without_gradients(npu, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.ops.npu, "npu_layer_norm_eval", lambda x, *a, **k: calls.append(1) or fake_npu.layer_norm_eval(x, *a, **k)
    )
    x, weight, bias = random(5, 1, 16), random(16), random(16)
    ops.layer_norm(x, weight, bias, 1e-6).sum().backward()
    ops.modulated_layer_norm(x, weight, bias, 1e-6).sum().backward()
    assert not calls and x.grad is not None
    with torch.no_grad():
        ops.layer_norm(x, weight, bias, 1e-6)
        ops.modulated_layer_norm(x, weight, bias, 1e-6)
    assert len(calls) == 2


def test_a_wrong_keyword_is_refused_by_the_schema():
    q = torch.randn(3, 1, 8)
    with pytest.raises(RuntimeError, match="scal"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 2, "SBH", scal=1.0)


def test_the_npu_backend_can_be_named_where_its_operators_exist(npu):
    with ops.use_attention("npu", needs_grad=True):
        assert ops.attention_in_use() == "npu"
    assert kernels.BACKENDS["npu"].has_backward
