"""torch_npu's operators on the CPU: the real schemas, with reference kernels behind them.

The schema strings are those registered in libtorch_npu.so of torch_npu 2.7.1.post11 and 2.13.0 (identical). Calling an
operator with a wrong keyword, dtype or layout fails as it would on the device; the numerics are the reference's.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor

SCHEMAS = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) '
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, "
    "Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    'int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-6) -> (Tensor, Tensor)",
    'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    "npu_layer_norm_eval(Tensor input, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-5) -> Tensor",
)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # SBH -> BNSD


def _join_heads(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).flatten(2)


def fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, *rest, **options
):
    """Softmax max and sum come back as ``[B, N, S, 8]``, eight equal values, as on the device."""
    assert input_layout == "SBH" and query.dim() == 3
    assert pse is padding_mask is atten_mask is None
    q, k, v = (_split_heads(x, head_num) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * scale
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    wide = [x.expand(*x.shape[:-1], 8).contiguous() for x in (largest, total)]
    return _join_heads(weights / total @ v), *wide, torch.empty(0), 0, 0, 0


def fusion_attention_grad(
    query, key, value, dy, head_num, input_layout, *, softmax_max, softmax_sum, attention_in, scale_value, **options
):
    """P = exp(S - max) / sum, and the textbook gradients from it."""
    assert input_layout == "SBH" and softmax_max.shape[-1] == softmax_sum.shape[-1] == 8
    q, k, v, grad, out = (_split_heads(x, head_num) for x in (query, key, value, dy, attention_in))
    weights = (q @ k.transpose(-1, -2) * scale_value - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    grad_scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale_value
    grads = (grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    return *map(_join_heads, grads), torch.empty(0), torch.empty(0)


def rms_norm(input, gamma, epsilon=1e-6):
    """Also returns the reciprocal root mean square."""
    assert gamma.dtype == input.dtype
    scale = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input * scale * gamma).to(input.dtype), scale


def rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    """``input * r1 + rotated(input) * r2``; the device wants one dtype and contiguous memory."""
    assert input.dtype == r1.dtype == r2.dtype and input.is_contiguous()
    if rotary_mode == "interleave":
        turned = torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)
    else:
        first, second = input.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return input * r1 + turned * r2


def layer_norm_eval(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Inference only: the device's kernel has no backward."""
    assert not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)))
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)


def define_operators() -> torch.library.Library:
    """Register the operators under ``torch.ops.npu`` for as long as the returned library is kept."""
    library = torch.library.Library("npu", "DEF")
    kernels = (fusion_attention, fusion_attention_grad, rms_norm, rotary_mul, layer_norm_eval)
    for schema, kernel in zip(SCHEMAS, kernels, strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")
    return library


class FakeNpu(types.SimpleNamespace):
    """What the platform asks of ``torch.npu``; records what was set."""

    def __init__(self, devices: int = 2, name: str = "Ascend910B2") -> None:
        super().__init__(calls=[])
        self.is_available = lambda: devices > 0
        self.device_count = lambda: devices
        self.get_device_name = lambda device=None: name
        self.set_device = lambda device: self.calls.append(("set_device", device))
        self.set_compile_mode = lambda jit_compile: self.calls.append(("jit_compile", jit_compile))
        self.synchronize = lambda: self.calls.append(("synchronize",))
        self.empty_cache = lambda: self.calls.append(("empty_cache",))
        self.reset_peak_memory_stats = lambda: self.calls.append(("reset_peak",))
        self.max_memory_reserved = lambda: 7 << 30
        self.memory_reserved = lambda: 5 << 30
        self.memory_allocated = lambda: 3 << 30
        self.mem_get_info = lambda: (50 << 30, 64 << 30)
        self.config = types.SimpleNamespace(allow_internal_format=True)


def fake_modules(npu: FakeNpu) -> dict[str, types.ModuleType]:
    """Return the modules ``torch_npu`` and ``torch_npu.contrib.transfer_to_npu`` for ``sys.modules``."""
    package, contrib = types.ModuleType("torch_npu"), types.ModuleType("torch_npu.contrib")
    transfer = types.ModuleType("torch_npu.contrib.transfer_to_npu")
    package.npu, package.contrib, contrib.transfer_to_npu = npu, contrib, transfer
    return {"torch_npu": package, "torch_npu.contrib": contrib, "torch_npu.contrib.transfer_to_npu": transfer}
