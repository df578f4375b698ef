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
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Philox blocks (four 32-bit words) worked on at a time: the temporaries of a chunk stay in the CPU's L2 cache.
_CHUNK_BLOCKS = 1 << 14
# Up to here Python's integers are faster than kernels on tensors of a few words.
_FEW_BLOCKS = 16

Key = tuple[int, int, int, int]
Word = TypeVar("Word", int, Tensor)


def generator(seed: int, sample_index: int, epoch: int = 0, stream: str = "") -> torch.Generator:
    """Return a CPU ``torch.Generator`` for choices about one sample (crop, flip, caption drop).

    torch's CPU generator keeps only 32 bits of its seed, so two of a million samples may share a stream: harmless for
    a crop, not for noise. Draw noise with :func:`normal` and sigmas with :func:`uniform`, whose keys have 128 bits.
    """
    words = _key(seed, sample_index, epoch, stream)
    return torch.Generator(device="cpu").manual_seed(words[0])


def uniform(count: int, *, seed: int, sample_index: int, epoch: int = 0, stream: str) -> Tensor:
    """Return ``count`` uniform numbers in [0, 1), fp64 with 53 random bits each."""
    key = _key(seed, sample_index, epoch, stream)
    blocks = -(-count // 2)
    if blocks <= _FEW_BLOCKS:
        words = torch.tensor([philox((index, 0, *key[2:]), key[:2]) for index in range(blocks)], dtype=torch.int64)
    else:
        words = torch.cat([_words(start, blocks, [key]) for start in range(0, blocks, _CHUNK_BLOCKS)], dim=1)
    high, low = words.reshape(-1, 2)[:count].unbind(1)
    return ((high >> 5) * 67108864 + (low >> 6)).double() * 2.0**-53


def normal(shape: Sequence[int], *, seed: int, sample_index: int, epoch: int = 0, stream: str) -> Tensor:
    """Return standard normal noise of ``shape`` in fp32 on the CPU (|value| < 6.8, from 32-bit uniforms)."""
    return normals(shape, [(sample_index, epoch)], seed=seed, stream=stream)[0]


def normals(shape: Sequence[int], samples: Sequence[tuple[int, int]], *, seed: int, stream: str) -> Tensor:
    """Return the ``normal`` noise of every (sample index, epoch), fp32 [len(samples), *shape].

    Samples smaller than a chunk are drawn together: for small clips the kernels' launches would cost more than the
    numbers.
    """
    count, keys = math.prod(shape), [_key(seed, index, epoch, stream) for index, epoch in samples]
    blocks = -(-count // 4)
    together = max(1, _CHUNK_BLOCKS // max(1, blocks))
    out = torch.empty(len(keys), count, dtype=torch.float32)
    for first in range(0, len(keys), together):
        rows = out[first : first + together]
        for start in range(0, blocks, _CHUNK_BLOCKS):
            part = rows[:, 4 * start : 4 * (start + _CHUNK_BLOCKS)]
            part.copy_(_box_muller(_words(start, blocks, keys[first : first + together]))[:, : part.shape[1]])
    return out.reshape(len(keys), *shape)


def _key(seed: int, sample_index: int, epoch: int, stream: str) -> Key:
    """Hash the four names of a stream to 128 bits, as four 32-bit words."""
    text = f"mindspeed-wan/{int(seed)}/{int(sample_index)}/{int(epoch)}/{stream}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12))  # type: ignore[return-value]


def _words(start: int, blocks: int, keys: Sequence[Key]) -> Tensor:
    """Return the 32-bit words of one chunk of blocks, from ``start`` up to ``blocks``: int64 [keys, 4 * chunk].

    The first half of a key is Philox's key, the second half the upper two words of the counter.
    """
    index = torch.arange(start, min(start + _CHUNK_BLOCKS, blocks), dtype=torch.int64)
    k0, k1, k2, k3 = torch.tensor(keys, dtype=torch.int64)[..., None].unbind(1)  # [keys, 1] each
    return torch.stack(philox((index & _WORD, index >> 32, k2, k3), (k0, k1)), dim=-1).flatten(1)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Apply Philox-4x32-10 to four 32-bit counter words; returns four 32-bit words.

    Words are ints, or int64 tensors that broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: Word, b: int) -> tuple[Word, Word]:
    """Return the high and low 32-bit words of ``a * b``; halves of ``b`` keep every product inside int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    total = upper + (lower >> 16)  # a * b == total * 2^16 + (lower & 0xffff)
    return total >> 16, ((total & 0xFFFF) << 16) | (lower & 0xFFFF)


# ---- Box-Muller from IEEE-exact operations ----------------------------------------------------------------------


def _box_muller(words: Tensor) -> Tensor:
    """Map an even number of 32-bit words (the last dim) to as many normals, fp32."""
    u = (words[..., 0::2].double() + 0.5) * 2.0**-32
    radius = torch.sqrt(_log(u) * -2.0)
    angle = words[..., 1::2]
    quadrant, fraction = angle >> 30, angle & 0x3FFFFFFF
    # The angle inside its quadrant, centred: [-pi/4, pi/4), where short Taylor series are exact to 1e-12.
    theta = ((fraction.double() + 0.5) * 2.0**-30 - 0.5) * (math.pi / 2)
    sine, cosine = _sin_cos(theta)
    swap = (quadrant & 1) == 1
    first = torch.where(swap, -sine, cosine)
    second = torch.where(swap, cosine, sine)
    sign = 1.0 - (quadrant & 2).double()
    radius = radius * sign
    return torch.stack((radius * first, radius * second), dim=-1).flatten(-2).float()


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
