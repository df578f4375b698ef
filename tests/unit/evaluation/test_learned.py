"""Scores by networks from local folders: against the libraries, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_wan.cli import eval as command
from mindspeed_wan.errors import CheckpointError, ConfigError, DataError
from mindspeed_wan.evaluation import learned
from mindspeed_wan.models.conditioning import clip_pixels
from mindspeed_wan.models.score_models import ClipScorer, VideoFeatures, windows

SIDE = 32


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = CLIPTextConfig(**sizes, **ends, vocab_size=len(vocabulary), max_position_embeddings=16, projection_dim=8)
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8, projection_dim=8)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
              ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def videomae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import VideoMAEConfig, VideoMAEModel

    folder = tmp_path_factory.mktemp("videomae")
    torch.manual_seed(1)
    VideoMAEModel(VideoMAEConfig(image_size=SIDE, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=16,
                                 num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
                  ).save_pretrained(folder, safe_serialization=True)
    return folder


def _video(seed: int, num_frames: int = 5, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)


def test_clip_scores_are_the_models_own_cosines(clip_folder: Path) -> None:
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel

    frames, prompt = _video(0), "a fox"
    similarity, consistency = learned.clip_scores(ClipScorer(clip_folder), frames, prompt)
    model = CLIPModel.from_pretrained(str(clip_folder)).eval()
    tokens = AutoTokenizer.from_pretrained(str(clip_folder))([prompt], return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=clip_pixels([Image.fromarray(f) for f in frames], "diffusers", SIDE))
    cosines = out.logits_per_image[:, 0] / model.logit_scale.exp().item()
    assert similarity == pytest.approx(float(cosines.mean()), abs=1e-5)
    neighbours = torch.nn.functional.cosine_similarity(out.image_embeds[1:], out.image_embeds[:-1])
    assert consistency == pytest.approx(float(neighbours.mean()), abs=1e-5)
    assert learned.clip_scores(ClipScorer(clip_folder), frames[:1], None) == (None, 1.0)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    one = torch.randn(60, 6, generator=generator)
    two = torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 0.5
    cov = [np.cov(rows.numpy().astype(np.float64), rowvar=False) for rows in (one, two)]
    mean = [rows.numpy().astype(np.float64).mean(axis=0) for rows in (one, two)]
    wanted = ((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * sqrtm(cov[0] @ cov[1]).real)
    assert learned.frechet_distance(one, two) == pytest.approx(wanted, rel=1e-6)
    few = torch.randn(3, 40, generator=generator)  # singular covariances
    assert learned.frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert learned.frechet_distance(few, few + 2) == pytest.approx(4 * 40, rel=1e-4)
    with pytest.raises(DataError, match="at least two"):
        learned.frechet_distance(one[:1], two)


def test_video_features_are_one_row_a_window(videomae_folder: Path, clip_folder: Path) -> None:
    extract = VideoFeatures(videomae_folder)
    assert extract(_video(0, 9)).shape == (2, 16) and extract(_video(0, 3)).shape == (1, 16)
    assert not torch.equal(extract(_video(0, 4)), extract(_video(0, 4)[::-1]))  # it sees time
    assert VideoFeatures(clip_folder)(_video(0)).shape == (5, 8)
    assert [w.tolist() for w in windows(3, 4)] == [[0, 1, 1, 2]]


def test_what_could_run_code_or_is_incomplete_is_refused(clip_folder: Path, videomae_folder: Path, tmp_path: Path
                                                         ) -> None:
    script = tmp_path / "i3d.pt"
    script.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is not a folder") as caught:
        VideoFeatures(script)
    assert "TorchScript" in str(caught.value)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(videomae_folder / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="only pytorch_model.bin"):
        VideoFeatures(pickled)
    with pytest.raises(CheckpointError, match="not a CLIP model"):
        ClipScorer(videomae_folder)
    lacking = tmp_path / "lacking"
    shutil.copytree(clip_folder, lacking)
    from safetensors.torch import load_file, save_file

    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        ClipScorer(lacking)


def _run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in argv]))


def _write_videos(folder: Path, seed: int) -> None:
    from mindspeed_wan.data.video_writer import write_mp4

    for number, name in enumerate(("a", "b")):
        frames = np.zeros((6, 48, 64, 3), np.uint8)
        for at, frame in enumerate(frames):
            frame[10:30, 4 * at + 5 : 4 * at + 20] = (200, 40 * seed, 80 * number)
        write_mp4(folder / f"{name}.mp4", frames, fps=8)
        (folder / f"{name}.json").write_text(json.dumps({"prompt": f"a {name} fox"}))


def test_the_command_with_and_without_references(clip_folder: Path, videomae_folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("reference", "one", "two")):
        _write_videos(tmp_path / name, seed)
    models = [f"--model={name}={tmp_path / name}" for name in ("one", "two")]
    assert _run(*models, "--clip", clip_folder, "--out", tmp_path / "alone") == 0
    one, _ = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert one["psnr_db"] is None and one["score"] is None and -1 <= one["text_similarity"] <= 1
    page = (tmp_path / "alone" / "comparison.html").read_text()
    assert page.count("<svg") == 4 and "a b fox" in page and page.count("<video") == 4
    assert _run("--reference", tmp_path / "reference", *models, "--features", videomae_folder,
                "--out", tmp_path / "against") == 0
    rows = json.loads((tmp_path / "against" / "summary.json").read_text())
    assert rows[0]["frechet_distance"] < rows[1]["frechet_distance"]  # "one" has colours nearer to the reference's
    assert (tmp_path / "against" / "comparison.html").read_text().count("<svg") == 4


def test_prompts_that_no_clip_has_are_refused(tmp_path: Path) -> None:
    _write_videos(tmp_path / "one", 1)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("clip,prompt\nc,a fox\n")
    with pytest.raises(DataError, match="prompts are of other clips: c"):
        _run("--model", f"one={tmp_path / 'one'}", "--prompts", prompts)
    for row, message in (("a", "header's 2 values"), ("a,a fox, running", "header's 2 values"), (",a fox", "no clip")):
        prompts.write_text(f"clip,prompt\n{row}\n")
        with pytest.raises(DataError, match=f"prompts.csv:2: .*{message}"):
            _run("--model", f"one={tmp_path / 'one'}", "--prompts", prompts)


@pytest.mark.parametrize(("words", "message"), [
    (("--model", "m=x", "--features", "dir"), "--features needs --reference"),
    ((), "nothing to measure"),
])
def test_options_that_would_be_ignored_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(*words)
