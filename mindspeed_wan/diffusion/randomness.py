"""Randomness that belongs to the sample, not to the rank: keyed by (seed, sample index, epoch, stream).

``uniform`` and ``normal`` are counter-based: Philox-4x32-10 (Salmon et al., SC 2011) under a key hashed from the four
values. Value ``i`` of a stream is a function of the key and ``i`` alone, so every layout sees the same global batch.

The bits are stable across platforms and torch versions because nothing here depends on a library's random streams or
transcendental functions: integers are exact, and the Box-Muller transform takes its logarithm, sine and cosine from
polynomials in fp64 add, multiply, divide and square root, which IEEE 754 defines to the last bit. Each operation is a
torch kernel of its own, so none is fused. Everything runs on the CPU; move the result to the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Philox blocks (four 32-bit words) worked on at a time: the temporaries of a chunk stay in the CPU's L2 cache.
_CHUNK_BLOCKS = 1 << 14


def generator(seed: int, sample_index: int, epoch: int = 0, stream: str = "") -> torch.Generator:
    """Return a CPU ``torch.Generator`` for choices about one sample (crop, flip, caption drop).

    torch's CPU generator keeps only 32 bits of its seed, so two of a million samples may share a stream: harmless for
    a crop, not for noise. Draw noise with :func:`normal` and sigmas with :func:`uniform`, whose keys have 128 bits.
    """
    words = _key(seed, sample_index, epoch, stream)
    return torch.Generator(device="cpu").manual_seed(words[0])


def uniform(count: int, *, seed: int, sample_index: int, epoch: int = 0, stream: str) -> Tensor:
    """Return ``count`` uniform numbers in [0, 1), fp64 with 53 random bits each."""
    words = _words(2 * count, _key(seed, sample_index, epoch, stream))
    high, low = words[0::2], words[1::2]
    return ((high >> 5) * 67108864 + (low >> 6)).double() * 2.0**-53


def normal(shape: Sequence[int], *, seed: int, sample_index: int, epoch: int = 0, stream: str) -> Tensor:
    """Return standard normal noise of ``shape`` in fp32 on the CPU (|value| < 6.8, from 32-bit uniforms)."""
    count = math.prod(shape)
    words = _words(count + count % 2, _key(seed, sample_index, epoch, stream))
    out = torch.empty(count + count % 2, dtype=torch.float32)
    step = 2 * _CHUNK_BLOCKS
    for start in range(0, out.numel(), step):
        out[start : start + step] = _box_muller(words[start : start + step])
    return out[:count].reshape(tuple(shape))


def _key(seed: int, sample_index: int, epoch: int, stream: str) -> tuple[int, int, int, int]:
    """Hash the four names of a stream to 128 bits, as four 32-bit words."""
    text = f"mindspeed-wan/{int(seed)}/{int(sample_index)}/{int(epoch)}/{stream}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12))  # type: ignore[return-value]


def _words(count: int, key: tuple[int, int, int, int]) -> Tensor:
    """Return ``count`` 32-bit words of the stream ``key`` as int64 [count].

    The first half of the key is Philox's key, the second half the upper two words of the counter.
    """
    blocks = -(-count // 4)
    out = torch.empty(blocks, 4, dtype=torch.int64)
    for start in range(0, blocks, _CHUNK_BLOCKS):
        index = torch.arange(start, min(start + _CHUNK_BLOCKS, blocks), dtype=torch.int64)
        counter = [index & _WORD, index >> 32, torch.full_like(index, key[2]), torch.full_like(index, key[3])]
        out[start : start + _CHUNK_BLOCKS] = torch.stack(philox(counter, key[:2]), dim=1)
    return out.reshape(-1)[:count]


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Apply Philox-4x32-10 to four int64 tensors of 32-bit counter words; returns four tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32-bit words of ``a * b``; halves of ``b`` keep every product inside int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    total = upper + (lower >> 16)  # a * b == total * 2^16 + (lower & 0xffff)
    return total >> 16, ((total & 0xFFFF) << 16) | (lower & 0xFFFF)


# ---- Box-Muller from IEEE-exact operations ----------------------------------------------------------------------


def _box_muller(words: Tensor) -> Tensor:
    """Map an even number of 32-bit words to as many normals, fp32."""
    u = (words[0::2].double() + 0.5) * 2.0**-32
    radius = torch.sqrt(_log(u) * -2.0)
    angle = words[1::2]
    quadrant, fraction = angle >> 30, angle & 0x3FFFFFFF
    # The angle inside its quadrant, centred: [-pi/4, pi/4), where short Taylor series are exact to 1e-12.
    theta = ((fraction.double() + 0.5) * 2.0**-30 - 0.5) * (math.pi / 2)
    sine, cosine = _sin_cos(theta)
    swap = (quadrant & 1) == 1
    first = torch.where(swap, -sine, cosine)
    second = torch.where(swap, cosine, sine)
    sign = 1.0 - (quadrant & 2).double()
    radius = radius * sign
    return torch.stack((radius * first, radius * second), dim=1).reshape(-1).float()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of x in (0, 1), relative error below 1e-12: exponent plus the atanh series."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa + mantissa, mantissa)
    exponent = exponent.double() - small.double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * math.log(2.0) + s * _horner(s * s, [2.0 / (2 * k + 1) for k in range(9)])


def _sin_cos(theta: Tensor) -> tuple[Tensor, Tensor]:
    square = theta * theta
    sine = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]
    cosine = [(-1) ** k / math.factorial(2 * k) for k in range(8)]
    return theta * _horner(square, sine), _horner(square, cosine)


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    """Evaluate ``sum_k coefficients[k] x^k``; multiply and add stay separate kernels, so no FMA rounds differently."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value.mul_(x).add_(coefficient)
    return value
