"""The FLOP count: against the published A14B figures and against torch's own counter on a real forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.flops import forward_flops, latent_shape, training_flops


@pytest.mark.parametrize("size,tera", [((81, 480, 832), 1678.0), ((81, 720, 1280), 6523.0)])
def test_a14b_figures(size: tuple[int, int, int], tera: float) -> None:
    forward = forward_flops(PRESETS["t2v-A14B"], latent_shape(*size))
    assert forward.total / 1e12 == pytest.approx(tera, rel=3e-4)


def test_latent_shape_of_the_standard_clip() -> None:
    assert latent_shape(81, 480, 832) == (21, 60, 104)
    assert PRESETS["t2v-A14B"].num_tokens((21, 60, 104)) == 32760


def test_agrees_with_torch_counting_a_diffusers_forward() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = WanConfig(num_layers=2, dim=96, ffn_dim=256, num_heads=4, text_dim=32, freq_dim=32)
    keys = ("num_layers", "ffn_dim", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
            "text_dim", "freq_dim", "rope_max_seq_len")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**{k: config.to_diffusers()[k] for k in keys})
        latents, time = torch.randn(1, 16, 3, 8, 12), torch.zeros(1)
        text = torch.randn(1, 512, 32)
    model.rope.to_empty(device="meta")
    with FlopCounterMode(display=False) as counter:
        model(latents, time, text)
    assert forward_flops(config, (3, 8, 12)).total == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_training_is_three_forwards_and_recompute_adds_the_blocks() -> None:
    config = WanConfig(num_layers=2, dim=96, ffn_dim=256, num_heads=4)
    forward = forward_flops(config, (3, 8, 12))
    assert training_flops(config, (3, 8, 12)) == pytest.approx(3 * forward.total)
    extra = training_flops(config, (3, 8, 12), recompute=True) - training_flops(config, (3, 8, 12))
    assert extra == pytest.approx(forward.total - forward.outside_blocks)
