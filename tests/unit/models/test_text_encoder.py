"""The frozen text encoder: equal to diffusers, both layouts, cleaning, and the versions that load zero embeddings."""

from __future__ import annotations

import pytest
import torch

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.original_names import TEXT_FILE, umt5_names
from mindspeed_wan.models.text_encoder import TextEncoder, clean_prompt, pad_states
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder

PROMPTS = ["a red ball rolls &amp;amp; falls   to the left.", "", "红色的球在桌子上滚动", "x " * 800]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(tiny_pipeline_folder(), torch.float32)


def test_states_equal_diffusers(encoder):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_pipeline_folder())
    with torch.no_grad():
        reference, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    states = encoder.encode(PROMPTS)
    assert [len(s) for s in states] == [10, 1, len(states[2]), 512]
    padded = pad_states(states)
    assert ((padded - reference).norm() / reference.norm()) < 2e-6


def test_states_do_not_depend_on_the_batch(encoder):
    together = encoder.encode(PROMPTS)
    for prompt, states in zip(PROMPTS, together):
        assert torch.equal(encoder.encode([prompt])[0], states)


def test_original_file_gives_the_same_states(encoder):
    for path in (tiny_original_folder(), tiny_original_folder() / TEXT_FILE):
        original = TextEncoder.from_pretrained(path, torch.float32)
        for left, right in zip(original.encode(PROMPTS), encoder.encode(PROMPTS)):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_component_folder_and_explicit_tokenizer(encoder):
    folder = tiny_pipeline_folder()
    for options in ({}, {"tokenizer": folder / "tokenizer"}):
        other = TextEncoder.from_pretrained(folder / "text_encoder", torch.float32, **options)
        torch.testing.assert_close(other.encode(PROMPTS[:1])[0], encoder.encode(PROMPTS[:1])[0])


def test_names_of_the_real_size_are_complete():
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(num_layers=24, feed_forward_proj="gated-gelu"))
    assert set(umt5_names().values()) == {n for n, _ in model.named_parameters()}
    assert len(umt5_names()) == 242


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  b\n\tc ", "a b c"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("全角，逗号", "全角，逗号".replace("，", ",")),
        ("", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_prompt(raw) == clean


def test_max_length_keeps_the_end_token(encoder):
    ids = encoder.token_ids("x " * 800, 16)
    assert len(ids) == 16 and ids[-1] == encoder.tokenizer.eos_token_id
    assert len(encoder.token_ids("x " * 800, None)) > 512


def test_padding_is_zero_beyond_the_prompt():
    padded = pad_states([torch.ones(3, 4), torch.ones(9, 4)], length=6)
    assert padded.shape == (2, 6, 4) and padded[0, 3:].abs().sum() == 0 and padded[1].sum() == 24


def _rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_zero_embeddings_in_the_file_are_refused(tmp_path):
    folder = tiny_pipeline_folder(tmp_path)
    _rewrite(folder, lambda state: state["shared.weight"].zero_())
    with pytest.raises(CheckpointError, match="all zeros"):
        TextEncoder.from_pretrained(folder)


def test_a_library_that_ignores_the_embedding_is_detected(monkeypatch):
    from transformers.models.umt5 import modeling_umt5

    monkeypatch.setattr(
        modeling_umt5.UMT5Stack, "get_input_embeddings", lambda self: torch.nn.Embedding(206, 32), raising=False
    )
    with pytest.raises(CheckpointError, match="does not use the file's token embedding"):
        TextEncoder.from_pretrained(tiny_pipeline_folder(), torch.float32)


def test_both_names_of_the_embedding_in_one_file(tmp_path, encoder):
    folder = tiny_pipeline_folder(tmp_path)

    def add_tied_copy(state):
        state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()

    _rewrite(folder, add_tied_copy)
    other = TextEncoder.from_pretrained(folder, torch.float32)
    torch.testing.assert_close(other.encode(PROMPTS[:1])[0], encoder.encode(PROMPTS[:1])[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "text_encoder" / "config.json").write_text('{"model_type": "t5"}'), "text encoder is umt5"),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
        (lambda f: (f / "tokenizer").rename(f / "tok"), "no tokenizer folder"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda f: _rewrite(f, lambda s: s.pop("shared.weight")), "token embedding is missing"),
        (lambda f: _rewrite(f, lambda s: s.pop("encoder.final_layer_norm.weight")), "final_layer_norm"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    folder = tiny_pipeline_folder(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        TextEncoder.from_pretrained(folder)
    assert str(tmp_path) in str(caught.value)
