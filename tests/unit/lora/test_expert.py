"""The expert an adapter file is for, by its metadata and by names as they are in use."""

from __future__ import annotations

import json
import random

import pytest

from mindspeed_wan.lora.expert import OWN_TRAINING, expert_of, guess_expert

HIGH = [  # each has a low twin, which is checked as well
    "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors", "high_noise_model.safetensors", "HighNoise_lora.safetensors",
    "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "wan2.2_t2v_highnoise_style.safetensors",
    "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", "my-style-HighNoise.safetensors",
    "Wan2.2-T2V-A14B_high_noise_lora", "xxx_high_e20.safetensors", "style_HIGH.safetensors", "wan22-high-t2v.pt",
    "character_000002500_high_noise.safetensors", "Wan22_HIGH_14B_v2.safetensors", "adapter_high.safetensors",
    "wan2.2_t2v_high_lora_rank64.safetensors", "t2vHighNoise.safetensors", "WAN22HIGHNOISE14B.safetensors", "high",
    "high_detail_low_light_highnoise.safetensors", "low_poly_toys_high_noise_v3.safetensors",
]
LETTERS = [("wan22_H_style.safetensors", "high"), ("Wan2.2-T2V-L-style.safetensors", "low"),
           ("WAN2.2_style_HN.safetensors", "high"), ("wan2.2_style_LN_v2.safetensors", "low")]
NEITHER = [
    "high_detail_skin.safetensors", "low_light_photo.safetensors", "low-rank-adapter.safetensors", "lora.safetensors",
    "high_quality_v2.safetensors", "HighFps.safetensors", "slow_motion.safetensors", "highlands.safetensors",
    "slow_noise.safetensors", "high_and_low.safetensors", "high_noise_and_low_noise.safetensors", "lowpoly.safetensors",
    "flow_match.safetensors", "style_H_L.safetensors", "wan22_H_and_L.safetensors", "low_angle_high.safetensors",
    "transformer.safetensors", "yellow_noise.safetensors", "high-speed-chase_wan2.2.safetensors", "vitamin_H.pt",
]


def _twin(name: str) -> str:
    """Return the name with the expert's level, the last one in it, exchanged; in the same letter case."""
    at = name.lower().rfind("high")
    word = name[at : at + 4]
    return name[:at] + ("LOW" if word.isupper() else "Low" if word[0].isupper() else "low") + name[at + 4 :]


@pytest.mark.parametrize("name", HIGH)
def test_names_of_an_expert(name: str) -> None:
    assert (guess_expert(name), guess_expert(_twin(name))) == ("high", "low")


@pytest.mark.parametrize(("name", "expert"), [
    *LETTERS, *((name, None) for name in NEITHER), ("风格_高噪声.safetensors", "high"), ("低噪_v1.safetensors", "low"),
    ("runs/transformer_2/pytorch_lora_weights.safetensors", "low"),
])
def test_other_names(name: str, expert: str | None) -> None:
    assert guess_expert(name) == expert


def test_spelling_and_surroundings_do_not_matter() -> None:
    """Any words around 'high noise' in any spelling, as long as they do not name the other level's noise."""
    rng = random.Random(0)
    words = ["style", "high_detail", "low_light", "wan2.2", "A14B", "rank64", "v1", "slow", "flow", "e20", "L", "H"]
    for _ in range(500):
        level = rng.choice(["high", "low"])
        case = rng.choice([str.lower, str.upper, str.title])
        spelled = rng.choice(["{}_noise", "{}-noise", "{}noise", "{} noise", "{}.noise"]).format(level)
        separator = rng.choice("_- .")
        parts = [*rng.sample(words, rng.randint(0, 3)), case(spelled), *rng.sample(words, rng.randint(0, 3))]
        name = separator.join(parts) + rng.choice(["", ".safetensors", ".pt"])
        assert guess_expert(name) == level, name


def test_metadata_comes_first() -> None:
    own = {OWN_TRAINING: json.dumps({"expert": "low"})}
    assert expert_of(own, "style_high_noise.safetensors") == "low"
    assert expert_of({"ss_output_name": "style-LowNoise"}, "style_high_noise.safetensors") == "low"
    assert expert_of({"ss_sd_model_name": "wan2.2_t2v_high_noise_14B_fp16.safetensors"}, "style.safetensors") == "high"
    assert expert_of({"ss_tag_frequency": "high noise"}, "style.safetensors") is None  # a caption, not a name
    assert expert_of({OWN_TRAINING: "[]"}, "loras/high_noise/pytorch_lora_weights.safetensors") == "high"
    assert expert_of({}, "home/high_noise/loras/style.safetensors") is None
