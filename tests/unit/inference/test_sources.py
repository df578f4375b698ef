"""Weight folders: every layout recognised, everything wrong with one named before anything large is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_wan.config.mm_files import PredictorFile
from mindspeed_wan.errors import CheckpointError, ConfigError, WanError
from mindspeed_wan.inference.options import GenerateOptions
from mindspeed_wan.inference.sources import recognise
from mindspeed_wan.models.wan.config import WanConfig
from tests.helpers.tiny import tiny_original_folder, tiny_pipeline_folder


def options(path: Path | None = None, **fields) -> GenerateOptions:
    return GenerateOptions(ckpt_dir=path, prompts=("x",), **fields)


@pytest.mark.parametrize("make", [tiny_pipeline_folder, tiny_original_folder])
@pytest.mark.parametrize(
    ("kind", "task"),
    [("t2v", "t2v-A14B"), ("i2v", "i2v-A14B"), ("wan2.1-t2v", "t2v-14B"), ("wan2.1-i2v", "i2v-14B")],
)
def test_layouts(make, kind, task):
    folder = recognise(options(make(task=kind)))
    assert folder.task == task
    assert set(folder.experts) == ({"high", "low"} if task.endswith("A14B") else {"high"})
    assert (folder.image_encoder is not None) == (task == "i2v-14B")
    assert folder.config.head_dim == 12 or make is tiny_original_folder


def test_videox_transformer_is_the_low_expert(tmp_path):
    root = tiny_original_folder(tmp_path, task="i2v")
    for old, new in (("low_noise_model", "transformer"), ("high_noise_model", "transformer_2")):
        (root / old).rename(root / new)
        config = root / new / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "Wan2_2Transformer3DModel"}))
    folder = recognise(options(root))
    assert folder.task == "inp-A14B"
    assert folder.experts["low"].path.name == "transformer" and folder.experts["high"].path.name == "transformer_2"
    with pytest.raises(ConfigError, match="weights are inp-A14B"):
        options(root, task="i2v-A14B").resolve(folder.task)


def _mm_expert(root: Path, folder: Path) -> Path:
    """Write a Diffusers expert as a MindSpeed-MM checkpoint."""
    import torch
    from safetensors.torch import load_file

    from mindspeed_wan.models.wan.param_map import by_name

    config = WanConfig.from_diffusers(json.loads((folder / "config.json").read_text()))
    names = by_name(config, "hf")
    weights = {names[k].mm: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    target = root / "release" / "mp_rank_00"
    target.mkdir(parents=True)
    torch.save({"model": weights}, target / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


@pytest.fixture
def mm_experts(tmp_path):
    source = tiny_pipeline_folder()
    return source, _mm_expert(tmp_path / "high", source / "transformer"), _mm_expert(
        tmp_path / "low", source / "transformer_2")


PREDICTOR = PredictorFile(
    hidden_size=48, ffn_dim=96, num_heads=4, num_layers=2, text_dim=32, freq_dim=32, model_type="wan2.2-t2v"
)


def test_mindspeed_mm_experts(mm_experts, tmp_path):
    source, high, low = mm_experts
    encoders = {"vae": source / "vae", "text_encoder": source / "text_encoder", "tokenizer": source / "tokenizer"}
    named = recognise(options(high_noise_ckpt=high, low_noise_ckpt=low, predictor=PREDICTOR, **encoders))
    assert (named.task, named.config.num_heads) == ("t2v-A14B", 4)
    by_folder = recognise(options(tmp_path, predictor=PREDICTOR, **encoders))
    assert by_folder.experts == named.experts
    # A whole folder with one expert replaced: what is tried out after training
    mixed = recognise(options(source, high_noise_ckpt=high, predictor=PREDICTOR))
    assert mixed.experts["high"].path.parent == high and mixed.experts["low"].path == source / "transformer_2"


def test_shapes_stand_in_for_a_missing_description(mm_experts):
    source, high, low = mm_experts
    encoders = {"vae": source / "vae", "text_encoder": source / "text_encoder"}
    config = recognise(options(high_noise_ckpt=high, low_noise_ckpt=low, **encoders)).config
    expected = WanConfig(dim=48, ffn_dim=96, num_heads=1, num_layers=2, text_dim=32, freq_dim=32)
    assert config == expected  # head dim 128 is Wan's; a tiny model has to say otherwise


@pytest.mark.parametrize("described", [True, False])
def test_first_and_last_frame_model_keeps_its_image_positions(described, tmp_path):
    import torch

    from mindspeed_wan.models.wan.param_map import parameter_table

    source = tiny_pipeline_folder(task="wan2.1-i2v")
    config = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, text_dim=32, freq_dim=32, in_channels=36,
                       image_dim=1280, pos_embed_len=514)
    (tmp_path / "release" / "mp_rank_00").mkdir(parents=True)
    weights = {param.mm: torch.zeros(param.shape, dtype=torch.bfloat16) for param in parameter_table(config)}
    torch.save({"model": weights}, tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    predictor = PredictorFile(hidden_size=128, ffn_dim=96, num_heads=1, num_layers=2, text_dim=32, freq_dim=32,
                              in_dim=36, model_type="flf2v")
    encoders = {"vae": source / "vae", "text_encoder": source / "text_encoder", "image_encoder": source}
    found = recognise(options(high_noise_ckpt=tmp_path, predictor=predictor if described else None, **encoders))
    assert (found.task, found.config) == ("i2v-14B", config)


def _card(folder: Path, expert: str) -> None:
    config = WanConfig(num_layers=2, dim=48, ffn_dim=96, num_heads=4, text_dim=32, freq_dim=32)
    (folder / "release" / "wan.json").write_text(json.dumps({"expert": expert, "config": config.to_dict()}))


def test_swapped_experts(mm_experts):
    source, high, low = mm_experts
    _card(high, "high")
    _card(low, "low")
    assert recognise(options(source, high_noise_ckpt=high, low_noise_ckpt=low)).config.num_heads == 4
    with pytest.raises(CheckpointError, match="experts are swapped"):
        recognise(options(source, high_noise_ckpt=low, low_noise_ckpt=high))


def test_equal_and_missing_experts(mm_experts):
    source, high, _ = mm_experts
    encoders = {"vae": source / "vae", "text_encoder": source / "text_encoder", "predictor": PREDICTOR}
    with pytest.raises(CheckpointError, match="same weights"):
        recognise(options(high_noise_ckpt=high, low_noise_ckpt=source / "transformer", **encoders))
    with pytest.raises(CheckpointError, match="high-noise expert does not exist"):
        recognise(options(high_noise_ckpt=high / "no", low_noise_ckpt=high, **encoders))
    with pytest.raises(ConfigError, match="come without VAE"):
        recognise(options(high_noise_ckpt=high, low_noise_ckpt=high, predictor=PREDICTOR))
    with pytest.raises(ConfigError, match="no weights are named"):
        recognise(options())


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _remove_low(root: Path) -> None:
    shutil.rmtree(root / "transformer_2")


def _wide_vae(root: Path) -> None:
    _edit(root / "vae" / "config.json", z_dim=48)


def _five_b(root: Path) -> None:
    _edit(root / "transformer" / "config.json", in_channels=48)


def _other_pipeline(root: Path) -> None:
    _edit(root / "model_index.json", _class_name="FluxPipeline")


def _other_text(root: Path) -> None:
    _edit(root / "text_encoder" / "config.json", d_model=64)


def _other_low(root: Path) -> None:
    _edit(root / "transformer_2" / "config.json", ffn_dim=128)


def _null_low(root: Path) -> None:
    _edit(root / "model_index.json", transformer_2=[None, None])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_low, "the expert transformer_2/ .low noise. is missing"),
        (_null_low, "low-noise expert transformer_2 is missing"),
        (_wide_vae, "48 latent channels"),
        (_five_b, "TI2V-5B"),
        (_other_pipeline, "FluxPipeline"),
        (_other_text, "64 channels, the DiT reads 32"),
        (_other_low, "ffn_dim differ"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    root = tiny_pipeline_folder(tmp_path)
    damage(root)
    with pytest.raises(WanError, match=message):
        recognise(options(root))


def test_the_wrong_vae_in_an_original_folder(tmp_path):
    root = tiny_original_folder(tmp_path)
    (root / "Wan2.1_VAE.pth").rename(root / "Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError, match="48 latent channels"):
        recognise(options(root))


def test_folders_that_are_none(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds notes.txt"):
        recognise(options(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        recognise(options(tmp_path / "nothing"))


def test_identity_follows_the_files(tmp_path):
    root = tiny_pipeline_folder(tmp_path)
    before = recognise(options(root)).identity
    assert recognise(replace(options(root), steps=3)).identity == before
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes())
    assert recognise(options(root)).identity != before


def _carded(root: Path, **boundaries: float) -> Path:
    """Say in cards which boundary the experts of a pipeline were trained for."""
    for name, boundary in boundaries.items():
        folder = root / {"high": "transformer", "low": "transformer_2"}[name]
        config = WanConfig.from_diffusers(json.loads((folder / "config.json").read_text())).to_dict()
        (folder / "wan.json").write_text(json.dumps({"expert": name, "boundary": boundary, "config": config}))
    return root


def test_experts_of_different_boundaries_are_refused(tmp_path):
    root = _carded(tiny_pipeline_folder(tmp_path), high=0.875, low=0.9)
    with pytest.raises(CheckpointError, match=r"boundary 0\.875, the low-noise one for 0\.9"):
        recognise(options(root))


def test_the_boundary_of_the_training_wins_over_the_folder_and_another_one_is_told(tmp_path, capsys):
    root = _carded(tiny_pipeline_folder(tmp_path), high=0.8, low=0.8)
    assert recognise(options(root)).boundary == 0.8
    assert "warning" not in capsys.readouterr().out
    recognise(options(root, boundary=0.875))
    assert "trained for boundary 0.8, 0.875 is used" in capsys.readouterr().out


def test_the_boundary_of_a_diffusers_folder_is_checked_and_another_one_is_told(tmp_path, capsys):
    root = Path(shutil.copytree(tiny_pipeline_folder(), tmp_path / "mit Leerzeichen 模型"))
    card = json.loads((root / "model_index.json").read_text())
    for value in ("high", 3, 0, True):
        (root / "model_index.json").write_text(json.dumps({**card, "boundary_ratio": value}))
        with pytest.raises(CheckpointError, match="boundary_ratio is"):
            recognise(options(root))
    (root / "model_index.json").write_text(json.dumps({**card, "boundary_ratio": 0.6}))
    assert recognise(options(root)).boundary == 0.6
    assert "warning" not in capsys.readouterr().out
    recognise(options(root, boundary=0.875))
    assert "trained for boundary 0.6, 0.875 is used" in capsys.readouterr().out


def test_files_called_after_the_other_expert_are_told(tmp_path, capsys):
    root = tiny_pipeline_folder()
    high, low = (tmp_path / f"wan2.2_t2v_{name}_noise_14B_fp16.safetensors" for name in ("high", "low"))
    for target, folder in ((high, "transformer"), (low, "transformer_2")):
        shutil.copy(root / folder / "diffusion_pytorch_model.safetensors", target)
    recognise(options(root, high_noise_ckpt=high, low_noise_ckpt=low))
    assert "warning" not in capsys.readouterr().out
    recognise(options(root, high_noise_ckpt=low, low_noise_ckpt=high))
    told = capsys.readouterr().out
    assert f"{low.name} looks like the low-noise expert; it is used as the high-noise one" in told
    assert f"{high.name} looks like the high-noise expert; it is used as the low-noise one" in told
