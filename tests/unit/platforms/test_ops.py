"""The reference operations against independent formulas, their gradients, and how kernels are chosen."""

import importlib.util
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.platforms import attention as kernels
from mindspeed_wan.platforms import eager, ops, reference


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def softmax_attention(q, k, v, scale=None):
    """Sequence-first attention written out, in fp64."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_and_its_gradients(batch, scale):
    q, k, v = random(7, batch, 3, 8), random(11, batch, 3, 8, seed=1), random(11, batch, 3, 8, seed=2)
    out = ops.attention(q, k, v, scale=scale)
    expected = softmax_attention(q, k, v, scale)
    assert out.shape == q.shape
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), cotangent)
    for grad, want in zip(grads, torch.autograd.grad(expected, (q, k, v), cotangent.double()), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_padded_keys_are_not_attended_to():
    q, k, v = random(4, 1, 2, 8), random(9, 1, 2, 8, seed=1), random(9, 1, 2, 8, seed=2)
    poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
    poisoned_k[6:], poisoned_v[6:] = 1e4, math.nan
    out = ops.attention(q, poisoned_k, poisoned_v, kv_length=6)
    torch.testing.assert_close(out, ops.attention(q, k[:6], v[:6]))
    assert not torch.allclose(out, ops.attention(q, k, v))


def test_attention_result_of_one_clip_is_contiguous_sequence_first():
    q = random(16, 1, 2, 8)
    assert ops.attention(q, q, q).is_contiguous()


def test_ring_pieces_merge_to_full_attention_and_its_gradients():
    q, k, v = random(6, 2, 2, 8), random(10, 2, 2, 8, seed=1), random(10, 2, 2, 8, seed=2)
    pieces = [ops.attention_with_lse(q, k[a:b], v[a:b]) for a, b in ((0, 4), (4, 10))]
    pieces.append(ops.attention_with_lse(q, k, v, kv_length=0))
    lse = torch.stack([piece[1] for piece in pieces]).logsumexp(0)
    weight = lambda piece: (piece[1] - lse).exp().permute(2, 0, 1)[..., None]  # noqa: E731
    out = sum(piece[0] * weight(piece) for piece in pieces)
    reference = softmax_attention(q, k, v)
    torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-6)

    cotangent = torch.randn_like(out)
    want = torch.autograd.grad(reference, (q, k, v), cotangent.double())
    parts = [ops.attention_backward(cotangent, q, k[a:b], v[a:b], out=out, lse=lse) for a, b in ((0, 4), (4, 10))]
    got = (parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts]) for i in (1, 2)))
    for grad, expected in zip(got, want, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_ring_backward_gives_padded_keys_a_zero_gradient():
    q, k, v = (random(6, 1, 2, 8, seed=seed).detach() for seed in range(3))
    out, lse = ops.attention_with_lse(q, k, v, kv_length=4)
    cotangent = torch.randn_like(out)
    dq, dk, dv = ops.attention_backward(cotangent, q, k, v, out=out, lse=lse, kv_length=4)
    assert dk.shape == k.shape and dv.shape == v.shape
    assert dk[4:].abs().sum() == 0 and dv[4:].abs().sum() == 0
    short = ops.attention_backward(cotangent, q, k[:4], v[:4], out=out, lse=lse)
    torch.testing.assert_close(dq, short[0])
    torch.testing.assert_close(dk[:4], short[1])


def test_plain_maths_fallback_equals_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_CHUNK", 4)
    q, k, v = (random(10, 2, 3, 8, seed=seed).detach() for seed in range(3))
    heads = [kernels.heads_first(x) for x in (q, k, v)]
    out, lse = kernels._maths_with_lse(*heads, 0.4)
    fused_out, fused_lse = ops.attention_with_lse(q, k, v, scale=0.4)
    torch.testing.assert_close(kernels.sequence_first(out), fused_out)
    torch.testing.assert_close(lse, fused_lse)
    cotangent = torch.randn_like(out)
    grads = kernels._maths_backward(cotangent, *heads, out=out, lse=lse, scale=0.4)
    fused = ops.attention_backward(kernels.sequence_first(cotangent), q, k, v, out=fused_out, lse=fused_lse, scale=0.4)
    for grad, want in zip(grads, fused, strict=True):
        torch.testing.assert_close(kernels.sequence_first(grad), want, rtol=1e-5, atol=1e-6)


def rotary_tables(length, dim):
    angles = torch.outer(torch.arange(length).double(), 100.0 ** -torch.linspace(0, 1, dim // 2).double())
    doubled = angles.repeat_interleave(2, dim=-1)[:, None, None]
    return doubled.cos().float(), doubled.sin().float()


def test_rotary_is_a_complex_rotation_of_neighbouring_pairs():
    x = random(9, 2, 3, 8)
    cos, sin = rotary_tables(9, 8)
    turn = torch.complex(cos[..., ::2].double(), sin[..., ::2].double())
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    out = ops.rotary(x, cos, sin)
    torch.testing.assert_close(out, expected.float())
    (grad,) = torch.autograd.grad(out, x, out)  # a rotation's transpose undoes it
    torch.testing.assert_close(grad, x.detach())
    assert ops.rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype, weight_dtype):
    x, weight = random(5, 2, 16, dtype=dtype), random(16, dtype=weight_dtype, seed=1)
    expected = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    out = ops.rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    tolerance = 2e-2 if torch.bfloat16 in (dtype, weight_dtype) else 1e-5
    torch.testing.assert_close(out, expected.to(dtype), rtol=tolerance, atol=1e-5)
    cotangent = torch.randn_like(out)
    want = torch.autograd.grad(expected, (x, weight), cotangent.double())
    for grad, expected_grad in zip(torch.autograd.grad(out, (x, weight), cotangent), want, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=5 * tolerance, atol=5 * tolerance)


def test_rms_norm_takes_any_strides():
    x, weight, cotangent = random(2, 5, 16), random(16, seed=1), torch.randn(2, 5, 16)
    strided = torch.autograd.grad(ops.rms_norm(x.transpose(0, 1), weight, 1e-6).transpose(0, 1), (x, weight), cotangent)
    plain = torch.autograd.grad(ops.rms_norm(x, weight, 1e-6), (x, weight), cotangent)
    for grad, want in zip(strided, plain, strict=True):
        torch.testing.assert_close(grad, want)


def test_rms_norm_gives_only_the_gradients_that_are_needed():
    x, weight = random(5, 2, 16), random(16, seed=1)
    (grad,) = torch.autograd.grad(ops.rms_norm(x.detach(), weight, 1e-6).sum(), weight)
    assert torch.equal(grad, torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).sum(), weight)[0])
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight.detach(), 1e-6).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_kernels_equal_the_plain_formulas(dtype):
    x, weight, bias = random(6, 1, 16, dtype=dtype), random(16), random(16, seed=4)
    cos, sin = rotary_tables(6, 8)
    pairs = [
        (lambda m: m.rms_norm(x, weight, 1e-6)),
        (lambda m: m.rotary(x.unflatten(-1, (2, 8)), cos, sin)),
        (lambda m: m.rotary(x.unflatten(-1, (2, 8))[:, :, 1:], cos, sin)),
        (lambda m: m.layer_norm(x, weight, bias, 1e-6, None)),
        (lambda m: m.modulated_layer_norm(x, weight, bias, 1e-6, None)),
        (lambda m: m.modulated_layer_norm(x, weight[None, None], bias[None, None], 1e-6, torch.bfloat16)),
    ]
    for call in pairs:
        fast, plain = call(eager), call(reference)
        assert fast.dtype == plain.dtype
        torch.testing.assert_close(fast, plain, rtol=1e-5 if fast.dtype == torch.float32 else 1e-2, atol=1e-6)
        fast_grad, plain_grad = (torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (fast, plain))
        torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
def test_layer_norm(dtype, affine, out_dtype):
    x = random(5, 2, 16, dtype=dtype)
    weight, bias = (None, None) if affine is None else (random(16, dtype=affine), random(16, dtype=affine, seed=3))
    expected = F.layer_norm(x.double(), (16,), *(None if w is None else w.double() for w in (weight, bias)), eps=1e-6)
    out = ops.layer_norm(x, weight, bias, 1e-6, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype)
    tolerance = 2e-2 if torch.bfloat16 in (dtype, out_dtype, affine) else 1e-5
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 2, 16), (2, 16), (5, 2, 16)])
def test_modulated_layer_norm(shape):
    x, scale, shift = random(5, 2, 16), random(*shape, seed=1), random(*shape, seed=2)
    expected = F.layer_norm(x.double(), (16,), eps=1e-6) * (1 + scale.double()) + shift.double()
    out = ops.modulated_layer_norm(x, scale, shift, 1e-6)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(out)
    want = torch.autograd.grad(expected, (x, scale, shift), cotangent.double())
    for grad, expected_grad in zip(torch.autograd.grad(out, (x, scale, shift), cotangent), want, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    narrow = ops.modulated_layer_norm(x, scale, shift, 1e-6, out_dtype=torch.bfloat16)
    torch.testing.assert_close(narrow, out.bfloat16())


def test_modulation_in_bf16_is_computed_in_fp32():
    x, scale, shift = (random(64, 1, 32, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    exact = F.layer_norm(x.double(), (32,), eps=1e-6) * (1 + scale.double()) + shift.double()
    out = ops.modulated_layer_norm(x, scale, shift, 1e-6)
    assert torch.equal(out, exact.float().bfloat16()) or (out - exact).abs().max() <= 2**-7 * exact.abs().max()
    naive = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift
    assert (out - exact).abs().mean() < (naive - exact).abs().mean()


def test_all_operations_compile_without_a_graph_break():
    cos, sin = rotary_tables(8, 8)

    def block(x, weight, scale, shift):
        h = ops.modulated_layer_norm(x, scale, shift, 1e-6)
        h = ops.layer_norm(ops.rms_norm(h, weight, 1e-6), None, None, 1e-6)
        q = ops.rotary(h.unflatten(-1, (2, 8)), cos, sin)
        return ops.attention(q, q, q, kv_length=6).flatten(2)

    x, weight, scale, shift = random(8, 1, 16), random(16), random(1, 1, 16), random(1, 1, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, scale, shift), block(x, weight, scale, shift))


def test_choice_of_backends():
    assert ops.kernels_in_use() == "torch" and ops.attention_in_use() == "sdpa"
    with pytest.raises(ConfigError, match="did you mean 'sdpa'"):
        ops.use_attention("sdpaa")
    with pytest.raises(ConfigError, match="sageattention"):
        ops.use_attention("sage")
    with pytest.raises(ConfigError, match="no backward"):
        ops.use_attention("sage", needs_grad=True)
    with pytest.raises(ConfigError, match="does not exist"):
        ops.use("tpu")
    with ops.use_attention("cudnn"):
        assert ops.attention_in_use() == "cudnn"
    assert ops.attention_in_use() == "sdpa"


def test_sage_refuses_a_call_that_needs_gradients():
    q = random(4, 1, 2, 8)
    with pytest.raises(ConfigError, match="no backward"):
        ops.attention(q, q, q, backend="sage")


def _backends_here():
    """Every backend that this machine can run on some device, with the device and the loosest tolerance it needs."""
    for name, backend in kernels.BACKENDS.items():
        devices = [d for d in ("cpu", "cuda") if not backend.devices or d in backend.devices]
        for device in devices:
            needs = [pytest.mark.cuda] if device == "cuda" else []
            if device == "cuda" and not torch.cuda.is_available():
                needs.append(pytest.mark.skip(reason="no GPU"))
            elif backend.module and importlib.util.find_spec(backend.module) is None:
                needs.append(pytest.mark.skip(reason=f"{backend.module} is not installed"))
            yield pytest.param(name, device, marks=needs, id=f"{name}-{device}")


@pytest.mark.parametrize(("name", "device"), _backends_here())
@pytest.mark.parametrize("kv_length", [None, 150])
def test_every_backend_equals_the_formula(name, device, kv_length):
    """Cross- and self-attention lengths of no round size, 128 channels a head as in Wan; gradients where it has any."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (random(length, 2, 3, 128, dtype=dtype, seed=seed) for seed, length in enumerate((77, 200, 200)))
    backend = kernels.BACKENDS[name]
    moved = [x.detach().to(device).requires_grad_(backend.has_backward) for x in (q, k, v)]
    out = ops.attention(*moved, kv_length=kv_length, backend=name)
    expected = softmax_attention(q, k[:kv_length], v[:kv_length])
    close = 1e-5 if dtype == torch.float32 else 6e-2 if name == "sage" else 1e-2
    assert out.shape == q.shape and out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), expected, rtol=close, atol=close)
    if backend.has_backward:
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(out, moved, cotangent.to(out))
        wanted = torch.autograd.grad(expected, (q, k, v), cotangent)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.cpu().float(), want.float(), rtol=10 * close, atol=10 * close)


def _library(name, **functions):
    module = types.ModuleType(name)
    for key, function in functions.items():
        setattr(module, key, function)
    return module


def _batch_first(q, k, v, scale):
    return softmax_attention(*(x.transpose(0, 1) for x in (q, k, v)), scale).transpose(0, 1).to(q.dtype)


def test_libraries_are_called_by_their_own_signatures(monkeypatch):
    """flash-attn 2 and 3 and SageAttention as they declare themselves, batch first; only the arithmetic is ours."""

    def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert dropout_p == 0 and not causal
        return _batch_first(q, k, v, softmax_scale)

    def flash3(q, k, v, softmax_scale=None, causal=False):
        assert not causal
        return _batch_first(q, k, v, softmax_scale), torch.zeros(1)

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "NHD" and not is_causal and not return_lse
        return _batch_first(q, k, v, sm_scale)

    libraries = {"flash_attn": {"flash_attn_func": flash2}, "flash_attn_interface": {"flash_attn_func": flash3},
                 "sageattention": {"sageattn": sageattn}}
    for name, functions in libraries.items():
        monkeypatch.setitem(sys.modules, name, _library(name, **functions))
    q, k, v = (random(length, 2, 3, 8, seed=seed).detach() for seed, length in enumerate((7, 11, 11)))
    for name in ("flash2", "flash3", "sage"):
        torch.testing.assert_close(ops.attention(q, k, v, scale=0.3, backend=name), ops.attention(q, k, v, scale=0.3))


def test_backends_know_their_devices_and_dtypes():
    for name in ("torch_efficient", "cudnn", "flash2", "sage", "npu"):
        with pytest.raises(ConfigError, match=r"(?s)not on cpu.*use auto, sdpa, torch_flash, torch_math"):
            kernels.check_device(name, "cpu", torch.float32)
    with pytest.raises(ConfigError, match="takes bf16 and fp16, not float32"):
        kernels.check_device("flash3", "cuda", torch.float32)
    kernels.check_device("torch_efficient", "cuda", torch.float32)
    kernels.check_device("torch_flash", "cpu", torch.float32)


@pytest.mark.parametrize("name", ["torch_flash", "torch_math"])
def test_a_chosen_kernel_compiles_without_a_graph_break(name):
    q = random(8, 1, 2, 8)
    compiled = torch.compile(lambda x: ops.attention(x, x, x, backend=name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), ops.attention(q, q, q))
