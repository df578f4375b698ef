"""The DiT against diffusers' in fp32: outputs, every gradient, and what the official model does with text padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindspeed_wan.errors import ConfigError, DataError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch, relative_error

MID = WanConfig(
    num_layers=4, dim=512, ffn_dim=1024, num_heads=4, in_channels=16, out_channels=16, text_dim=64, text_len=32
)
WAN21_I2V = TINY.with_changes(in_channels=8, image_dim=48, text_len=512)  # diffusers tells image from text by 512


def _pair(config: WanConfig) -> tuple[torch.nn.Module, WanDiT]:
    reference = diffusers_model(config)
    model = WanDiT(config)
    model.load_state_dict(mm_state_dict(reference, config), strict=True)
    return reference, model


def _reference_forward(reference: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return reference(batch.latents, batch.timestep, batch.text, batch.image_embeds, return_dict=False)[0]


class _OfficialSinusoid(torch.nn.Module):
    """The official fp64 sinusoid. diffusers multiplies in fp32, wrong by 4e-5 at t = 700, which a wide model shows."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angle = timestep.double()[:, None] * frequencies
        return torch.cat((angle.cos(), angle.sin()), -1).float()


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "grid"),
    [
        pytest.param(TINY, (3, 10, 14), id="t2v"),
        pytest.param(TINY.with_changes(in_channels=36), (2, 6, 10), id="i2v-36-channels"),
        pytest.param(WAN21_I2V, (1, 6, 6), id="wan2.1-i2v-image-branch"),
        pytest.param(TINY.with_changes(num_heads=2, dim=88), (5, 2, 18), id="uneven-rope-split"),
        pytest.param(MID, (3, 14, 26), id="mid-size"),
    ],
)
def test_forward_and_every_gradient_equal_diffusers(config: WanConfig, grid: tuple[int, int, int]) -> None:
    reference, model = _pair(config)
    if config is MID:
        reference.condition_embedder.timesteps_proj = _OfficialSinusoid()
    batch = random_batch(config, grid)
    expected = _reference_forward(reference, batch)
    actual = model(batch.latents, batch.timestep, batch.text, batch.image_embeds)
    assert relative_error(actual, expected) <= 2e-6

    (expected * batch.cotangent).sum().backward()
    (actual * batch.cotangent).sum().backward()
    expected_grads = {name: p.grad for name, p in reference.named_parameters()}
    actual_grads = {name: p.grad for name, p in model.named_parameters()}
    errors = {p.mm: relative_error(actual_grads[p.mm], expected_grads[p.hf]) for p in parameter_table(config)}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-5, f"{worst}: {errors[worst]:.1e}"


def test_short_text_is_padded_with_zeros_that_are_attended() -> None:
    config = TINY.with_changes(text_len=40)
    reference, model = _pair(config)
    batch = random_batch(config, text_rows=11)
    actual = model(batch.latents, batch.timestep, batch.text)
    batch.text = F.pad(batch.text, (0, 0, 0, 29))
    assert relative_error(actual, _reference_forward(reference, batch)) <= 2e-6
    batch.text = batch.text[:, :11]
    assert relative_error(actual, _reference_forward(reference, batch)) > 1e-3  # diffusers does not pad by itself


@pytest.mark.parametrize("config", [TINY, WAN21_I2V], ids=["t2v", "wan2.1-i2v"])
def test_a_text_context_gives_the_same_bits(config: WanConfig) -> None:
    _, model = _pair(config)
    batch = random_batch(config, (1, 6, 6))
    with torch.no_grad():
        direct = model(batch.latents, batch.timestep, batch.text, batch.image_embeds)
        context = model.encode_text(batch.text, batch.image_embeds)
        cached = model(batch.latents, batch.timestep, text_context=context)
        halves = [[None if t is None else t[i : i + 1] for t in (batch.text, batch.image_embeds)] for i in range(2)]
        one_by_one = torch.cat([model.encode_text(*half).blocks[1].key for half in halves], dim=1)
    assert torch.equal(cached, direct)
    torch.testing.assert_close(one_by_one, context.blocks[1].key)


def test_fp32_islands_and_residual_under_bf16() -> None:
    """bf16 weights: an fp32 residual stream halves the error at least; timesteps one apart stay different."""
    config = MID.with_changes(num_layers=8)
    _, exact = _pair(config)
    batch = random_batch(config, (3, 8, 8), timesteps=(997.0, 31.5))
    errors = {}
    with torch.no_grad():
        expected = exact(batch.latents, batch.timestep, batch.text)
        for residual in (None, torch.float32):
            model = WanDiT(config, residual_dtype=residual).to(torch.bfloat16)
            model.load_state_dict(exact.state_dict())
            output = model(batch.latents, batch.timestep, batch.text)
            assert output.dtype == torch.float32
            errors[residual] = relative_error(output, expected)
        time_997, _ = model.embed_time(torch.tensor([997.0]))
        time_998, _ = model.embed_time(torch.tensor([998.0]))  # equal to 997 after rounding to bf16
    assert time_997.dtype == torch.float32
    assert not torch.equal(time_997, time_998)
    assert errors[torch.float32] < 0.75 * errors[None]


def test_a_step_cache_can_replace_the_blocks() -> None:
    _, model = _pair(TINY)
    batch = random_batch(TINY)
    changes = []

    def remember(x: torch.Tensor, run: object) -> torch.Tensor:
        out = run(x)  # type: ignore[operator]
        changes.append(out - x)
        return out

    with torch.no_grad():
        first = model(batch.latents, batch.timestep, batch.text, around_blocks=remember)
        skipped = model(batch.latents, batch.timestep, batch.text, around_blocks=lambda x, run: x + changes[0])
    torch.testing.assert_close(skipped, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 36, 1, 4, 4)}, "36"),
        ({"latents": torch.zeros(1, 4, 1, 5, 4)}, "multiple of the patch"),
        ({"text": torch.zeros(1, 25, 32)}, "at most 24"),
        ({"text": None}, "either text or text_context"),
        ({"image_embeds": torch.zeros(1, 257, 48)}, "does not take image_embeds"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    inputs = {"latents": torch.zeros(1, 4, 1, 4, 4), "timestep": torch.zeros(1), "text": torch.zeros(1, 3, 32)}
    with pytest.raises(DataError, match=message):
        WanDiT(TINY)(**{**inputs, **change})


def test_a_grid_beyond_the_rotary_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_max_len 8"):
        WanDiT(TINY.with_changes(rope_max_len=8))(torch.zeros(1, 4, 1, 2, 20), torch.zeros(1), torch.zeros(1, 3, 32))
