"""Counter-based randomness: known answers, independence of layout, statistics, golden bits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from mindspeed_wan.diffusion import randomness


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    """The test vectors published with Random123 for philox4x32-10."""
    assert list(randomness.philox(tuple(counter), key)) == expected
    words = randomness.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in words] == expected


GOLDEN = "cf1f4921a0207257"


def test_bits_never_change() -> None:
    """Golden hash: a change here changes every training run and every seed's video."""
    noise = randomness.normal((3, 1001), seed=42, sample_index=7, epoch=1, stream="noise")
    uniform = randomness.uniform(100, seed=42, sample_index=7, epoch=1, stream="sigma")
    digest = hashlib.sha256(noise.numpy().tobytes() + uniform.numpy().tobytes()).hexdigest()
    assert digest[:16] == GOLDEN


@pytest.mark.parametrize("changed", [{"seed": 1}, {"sample_index": 4}, {"epoch": 3}, {"stream": "other"}])
def test_each_part_of_the_key_matters(changed: dict) -> None:
    key = {"seed": 0, "sample_index": 3, "epoch": 2, "stream": "noise"}
    a, b = randomness.normal((4096,), **key), randomness.normal((4096,), **{**key, **changed})
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.06
    assert not (a == b).any()


def test_a_value_depends_on_its_position_only() -> None:
    """A longer draw starts with the shorter one, across the chunk border; shape does not matter."""
    key = {"seed": 0, "sample_index": 0, "stream": "noise"}
    long = randomness.normal((200_001,), **key)
    assert torch.equal(long[:70_000], randomness.normal((7, 100, 100), **key).reshape(-1))
    assert torch.equal(long[:3], randomness.normal((3,), **key))
    assert torch.equal(randomness.uniform(10, **key), randomness.uniform(50_000, **key)[:10])


@pytest.mark.parametrize("shape", [(1,), (3,), (16, 3, 6, 6), (3, 5, 7), (16, 5, 30, 52)])
def test_samples_drawn_together_are_those_drawn_alone(shape: tuple[int, ...]) -> None:
    samples = [(index, index % 3) for index in range(9)]
    together = randomness.normals(shape, samples, seed=5, stream="noise")
    alone = [randomness.normal(shape, seed=5, sample_index=index, epoch=epoch, stream="noise")
             for index, epoch in samples]
    assert torch.equal(together, torch.stack(alone))


def test_normal_distribution() -> None:
    noise = randomness.normal((16, 21, 30, 52), seed=5, sample_index=0, stream="noise")
    assert noise.dtype == torch.float32
    flat = noise.reshape(-1).double().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(flat.mean()) < 4 / np.sqrt(flat.size)
    assert abs(flat.var() - 1) < 4 * np.sqrt(2 / flat.size)
    assert abs(stats.kurtosis(flat)) < 0.03
    for lag in (1, 2, 4, 52):
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 4 / np.sqrt(flat.size)


def test_uniform_distribution() -> None:
    draws = randomness.uniform(100_000, seed=5, sample_index=0, stream="sigma")
    assert (draws.dtype, float(draws.min()) >= 0, float(draws.max()) < 1) == (torch.float64, True, True)
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3


def test_first_value_over_samples_is_uniform_too() -> None:
    """What training sees is the first draw of many streams, not many draws of one."""
    draws = [float(randomness.uniform(1, seed=0, sample_index=i, stream="sigma")) for i in range(3000)]
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_own_logarithm_and_trigonometry() -> None:
    x = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (1 - 2.0**-33) + 2.0**-33
    x = torch.cat([x, torch.tensor([2.0**-33, 0.5, 2.0**-0.5, 1 - 2.0**-33], dtype=torch.float64)])
    assert torch.allclose(randomness._log(x), torch.log(x), rtol=1e-11, atol=0)
    theta = (x - 0.5) * (torch.pi / 2)
    sine, cosine = randomness._sin_cos(theta)
    assert torch.allclose(sine, torch.sin(theta), rtol=0, atol=1e-12)
    assert torch.allclose(cosine, torch.cos(theta), rtol=0, atol=1e-12)


def test_extreme_words_give_finite_normals() -> None:
    words = torch.tensor([0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFF, 1, 0x40000000])
    normals = randomness._box_muller(words)
    assert torch.isfinite(normals).all()
    assert float(normals.abs().max()) < 6.8


def test_torch_generator_is_keyed() -> None:
    draws = {float(torch.rand(1, generator=randomness.generator(0, i, 0, "crop"))) for i in range(50)}
    assert len(draws) == 50
    again = torch.rand(4, generator=randomness.generator(9, 2, 1, "crop"))
    assert torch.equal(again, torch.rand(4, generator=randomness.generator(9, 2, 1, "crop")))
