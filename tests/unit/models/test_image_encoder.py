"""The CLIP vision tower of Wan2.1 I2V: transformers' states, from either release layout, loaded strictly."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.conditioning import clip_pixels
from mindspeed_wan.models.image_encoder import ImageEncoder
from mindspeed_wan.models.original_names import IMAGE_FILE
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder

TASK = "wan2.1-i2v"


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    return clip_pixels([image], "diffusers")


def test_states_are_transformers(pixels):
    from transformers import CLIPVisionModel

    folder = tiny_pipeline_folder(task=TASK) / "image_encoder"
    expected = CLIPVisionModel.from_pretrained(folder)(pixels, output_hidden_states=True).hidden_states[-2]
    states = ImageEncoder.from_pretrained(folder).encode(pixels)
    assert states.shape == (1, 257, 32) and torch.allclose(states, expected, atol=1e-6)


def test_the_original_file_holds_the_same_tower(pixels):
    expected = ImageEncoder.from_pretrained(tiny_pipeline_folder(task=TASK) / "image_encoder").encode(pixels)
    encoder = ImageEncoder.from_pretrained(tiny_original_folder(task=TASK) / IMAGE_FILE)
    assert encoder.side == 224 and torch.allclose(encoder.encode(pixels), expected, atol=1e-6)


def test_both_ways_to_the_square():
    image = Image.effect_noise((400, 100), 80).convert("RGB")
    cut, stretched = clip_pixels([image], "diffusers"), clip_pixels([image], "official")
    assert cut.shape == stretched.shape == (1, 3, 224, 224) and not torch.allclose(cut, stretched, atol=0.1)


def test_what_is_no_tower(tmp_path):
    with pytest.raises(CheckpointError, match="umt5"):
        ImageEncoder.from_pretrained(tiny_pipeline_folder(task=TASK) / "text_encoder")
    with pytest.raises(CheckpointError, match="not Wan's CLIP file"):
        ImageEncoder.from_pretrained(tiny_original_folder(task=TASK) / "Wan2.1_VAE.pth")
