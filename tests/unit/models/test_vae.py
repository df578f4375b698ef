"""The frozen VAE: equal to diffusers, both release layouts, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from mindspeed_wan.errors import CheckpointError, ConfigError, DataError
from mindspeed_wan.models.original_names import VAE_FILE, vae_names
from mindspeed_wan.models.vae import Tiling, WanVAE, latent_shape
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE.from_pretrained(tiny_pipeline_folder())


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_and_decode_equal_diffusers_bit_for_bit(vae, video):
    from diffusers import AutoencoderKLWan

    reference = AutoencoderKLWan.from_pretrained(tiny_pipeline_folder() / "vae")
    mean = torch.tensor(reference.config.latents_mean).view(1, 16, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(reference.config.latents_std).view(1, 16, 1, 1, 1)
    with torch.no_grad():
        latents = (reference.encode(video).latent_dist.mode() - mean) * inverse_std
        decoded = reference.decode(latents / inverse_std + mean).sample
    assert torch.equal(vae.encode(video), latents)
    assert torch.equal(vae.decode(latents), decoded)
    assert latents.shape[2:] == latent_shape(9, 32, 48) == (3, 4, 6)


def test_original_file_gives_the_same_latents(vae, video):
    for path in (tiny_original_folder(), tiny_original_folder() / VAE_FILE):
        original = WanVAE.from_pretrained(path)
        torch.testing.assert_close(original.encode(video), vae.encode(video), rtol=1e-6, atol=1e-6)


def test_names_of_the_real_size_are_complete():
    """Every tensor of the released architecture has an original name (194 of them), checked on the meta device."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        expected = set(AutoencoderKLWan().state_dict())
    names = vae_names()
    assert expected <= set(names.values()) and len(expected) == 194
    assert len(set(names.values())) == len(names)


def test_sampling_follows_the_generator_and_is_off_by_default(vae, video):
    draws = [vae.encode(video, do_sample=True, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], vae.encode(video))
    assert torch.equal(vae.encode(video), vae.encode(video))


def test_bf16_latents_come_out_in_fp32(video):
    half = WanVAE.from_pretrained(tiny_pipeline_folder(), torch.bfloat16)
    full = WanVAE.from_pretrained(tiny_pipeline_folder())
    latents = half.encode(video)
    assert latents.dtype == torch.float32
    assert (latents - full.encode(video)).norm() / full.encode(video).norm() < 0.05


def test_tiles_change_little_and_can_be_switched_off(video):
    vae = WanVAE.from_pretrained(tiny_pipeline_folder())
    whole = vae.decode(vae.encode(video))
    vae.set_tiling(Tiling(24, 32, 16, 24))
    tiled = vae.decode(vae.encode(video))
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    vae.set_tiling(None)
    assert torch.equal(vae.decode(vae.encode(video)), whole)


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 5, 30, 32), (1, 1, 5, 32, 32), (3, 5, 32, 32)])
def test_shapes_that_the_network_would_cut_are_refused(vae, shape):
    with pytest.raises(DataError):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [(100, 256, 64, 64), (64, 64, 128, 64), (0, 8, 8, 8)])
def test_illegal_tiles_are_refused(sizes):
    with pytest.raises(ConfigError):
        Tiling(*sizes)


def test_the_5b_vae_is_refused_in_both_layouts(tmp_path):
    folder = tiny_pipeline_folder(tmp_path)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "z_dim": 48, "is_residual": True}))
    with pytest.raises(CheckpointError, match="48 latent channels.*16-channel"):
        WanVAE.from_pretrained(folder)
    torch.save({"encoder.conv1.weight": torch.zeros(8, 12, 3, 3, 3), "conv2.weight": torch.zeros(48, 48, 1, 1, 1)},
               tmp_path / "Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError, match="48 latent channels"):
        WanVAE.from_pretrained(tmp_path / "Wan2.2_VAE.pth")


def _damage(folder, kind):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if kind == "missing folder":
        return folder / "nowhere"
    if kind == "no vae":
        return folder / "tokenizer"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "git-lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    elif kind == "html":
        file.write_text("<!DOCTYPE html><html></html>")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "config":
        (folder / "vae" / "config.json").write_text("{")
    elif kind == "class":
        return folder / "text_encoder"
    elif kind == "tensor gone":
        from safetensors.torch import load_file, save_file

        state = load_file(file)
        state["encoder.conv_inn.bias"] = state.pop("encoder.conv_in.bias")
        save_file(state, file)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing folder", "no such file"), ("no vae", "no VAE here"), ("truncated", "cannot read"),
        ("git-lfs", "git-lfs"), ("html", "HTML"), ("empty", "empty"), ("config", "not JSON"),
        ("class", "not AutoencoderKLWan"), ("tensor gone", "encoder.conv_in.bias may be"),
    ],
)
def test_damaged_folders_are_named(tmp_path, kind, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        WanVAE.from_pretrained(_damage(tiny_pipeline_folder(tmp_path), kind))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02}q\x00.", b"<html>"])
def test_damaged_original_files_are_named(tmp_path, content):
    (tmp_path / VAE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        WanVAE.from_pretrained(tmp_path)
