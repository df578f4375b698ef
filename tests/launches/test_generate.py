"""``inference.sh`` and ``inference_sora.py`` as users run them: both dialects, resume, one message for a mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest

from tests.helpers.tiny import tiny_pipeline_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "wan2.2" / "A14B" / "t2v" / "inference.sh"
SMALL = ["--size", "96*64", "--frame_num", "9", "--sample_steps", "4", "--dtype", "fp32"]


def run(command: list[str], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **variables}
    environment.pop("SAVE_PATH", None)
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def launch(tmp_path: Path, *flags: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return run(["bash", str(SCRIPT), *flags], tmp_path, NPROC_PER_NODE=str(ranks))


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_two_ranks_make_a_list_of_prompts_and_resume_it(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left\n\ntwo blue squares\n")
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_pipeline_folder()), *SMALL, "--prompt_file", str(prompts),
             "--save_path", "out", "--save_frames", "--save_latents", "out/z.safetensors", "--ulysses_size", "2",
             "--vae_parallel", "--dit_fsdp"]
    first = launch(tmp_path, *flags, ranks=2)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    assert [frame_count(out / f"video_{i}.mp4") for i in range(2)] == [9, 9]
    for name in ("index.html", "video_0.png", "video_1.json", "z_0.safetensors", "video_0/00008.png"):
        assert (out / name).exists(), name
    record = json.loads((out / "video_1.json").read_text())
    assert record["prompt"] == "two blue squares" and record["layout"]["ulysses"] == 2
    assert {"load", "high", "low", "decode", "write"} <= set(record["seconds"]) and record["peak_memory_gib"] > 0

    kept = (out / "video_0.mp4").stat().st_mtime_ns
    (out / "video_1.json").unlink()  # as if the run had been killed before the second video was whole
    second = launch(tmp_path, *flags, ranks=2)
    assert second.returncode == 0 and "1 of 2 were finished earlier" in second.stdout
    assert (out / "video_0.mp4").stat().st_mtime_ns == kept and (out / "video_1.json").exists()
    third = launch(tmp_path, *flags, "--base_seed", "9", ranks=2)
    assert third.returncode == 0 and "finished earlier" not in third.stdout


def test_mindspeed_mm_dialect(tmp_path):
    root = tiny_pipeline_folder()
    (tmp_path / "p.txt").write_text("a red circle\n")
    text = {
        "pipeline_class": "WanPipeline", "prompt": "p.txt", "save_path": "out", "dtype": "fp32", "device": "cpu",
        "pipeline_config": {"input_size": [9, 64, 96], "cpu_offload": True},
        "ae": {"from_pretrained": str(root / "vae")}, "tokenizer": {"from_pretrained": str(root / "tokenizer")},
        "text_encoder": {"from_pretrained": str(root / "text_encoder"), "dtype": "fp32"},
        "low_noise_predictor": str(root / "transformer_2"),
        "diffusion": {"num_inference_steps": 4, "guidance_scale": [4.0, 3.0], "flow_shift": 3.0},
    }
    (tmp_path / "inference_model.json").write_text("// a comment\n" + json.dumps(text))
    done = launch(tmp_path, "--mm-model", "inference_model.json", "--load", str(root / "transformer"), "--lr", "5e-6",
                  "--train-iters", "5010", "--finetune")
    assert done.returncode == 0, done.stderr
    assert "memory: sequential" in done.stdout and "diffusers grid, shift 3" in done.stdout
    record = json.loads((tmp_path / "out" / "video_0.json").read_text())
    assert record["settings"]["guidance"] == [3.0, 4.0] and frame_count(tmp_path / "out" / "video_0.mp4") == 9


@pytest.mark.parametrize(
    ("flags", "ranks", "code", "words"),
    [
        (["--size", "100*64"], 1, 2, "the nearest is 96"),
        (["--frame_num", "10"], 1, 2, "the nearest is 9"),
        (["--sampel_steps", "4"], 1, 2, "did you mean 'sample_steps'"),
        (["--ulysses_size", "3"], 2, 2, "does not factor"),
        (["--prompt_file", "empty.txt"], 1, 2, "empty"),
        (["--task", "i2v-A14B", "--image", "image.png"], 1, 2, "the weights are t2v-A14B"),
        (["--ckpt_dir", "nowhere", "--ulysses_size", "2"], 2, 4, "no such folder"),
        (["--ckpt_dir", "wrong_vae"], 1, 4, "48 latent channels"),
        (["--save_path", "image.png/out"], 1, 3, "cannot write"),
        (["--device", "npu"], 1, 3, "npu"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path, flags, ranks, code, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "image.png").write_bytes(b"x")
    if "wrong_vae" in flags:
        root = tiny_pipeline_folder(tmp_path).rename(tmp_path / "wrong_vae")
        config = root / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "z_dim": 48}))
    base = ["--ckpt_dir", str(tiny_pipeline_folder()), *SMALL, "--prompt", "x", "--save_path", "out"]
    done = launch(tmp_path, *base, *flags, ranks=ranks)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_split(tmp_path):
    """Ulysses 3 divides the world of 3, but not the four heads of the tiny model."""
    done = launch(tmp_path, "--ckpt_dir", str(tiny_pipeline_folder()), *SMALL, "--prompt", "x", "--ulysses_size", "3",
                  ranks=3)
    assert done.returncode == 2 and "4 attention heads" in done.stderr and "1, 2, 4" in done.stderr


def test_damaged_weights_are_named_on_every_rank(tmp_path):
    root = tiny_pipeline_folder(tmp_path)
    file = root / "transformer_2" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    done = launch(tmp_path, "--ckpt_dir", str(root), *SMALL, "--prompt", "x", "--ulysses_size", "2", ranks=2)
    assert done.returncode == 4 and str(file.name) in done.stderr and "Traceback" not in done.stderr


def test_direct_call_and_help(tmp_path):
    shutil.copytree(tiny_pipeline_folder(), tmp_path / "w")
    program = [sys.executable, str(ROOT / "inference_sora.py")]
    shown = run([*program, "--help"], tmp_path)
    assert shown.returncode == 0 and "--sample_guide_scale" in shown.stdout
    flags = ["--ckpt_dir", "w", *SMALL, "--prompt", "x", "--save_file", "o.mp4", "--base_seed", "-1"]
    done = run([*program, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert frame_count(tmp_path / "o.mp4") == 9


def test_image_to_video_from_lists(tmp_path):
    """The I2V script with MindSpeed-MM's file: one image for each prompt, last images too."""
    from PIL import Image

    root = tiny_pipeline_folder(task="i2v")
    for index in range(2):
        Image.effect_noise((120, 80), 60).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "images.txt").write_text("0.png\n1.png\n")
    text = {
        "prompt": ["a cat", "a dog"], "image": "images.txt", "last_image": ["1.png", "0.png"], "save_path": "out",
        "dtype": "fp32", "pipeline_config": {"input_size": [5, 32, 48]}, "ae": {"from_pretrained": str(root / "vae")},
        "tokenizer": {"from_pretrained": str(root / "tokenizer")}, "predictor": {"model_type": "wan2.2-i2v"},
        "text_encoder": {"from_pretrained": str(root / "text_encoder")},
        "low_noise_predictor": str(root / "transformer_2"), "diffusion": {"num_inference_steps": 2, "flow_shift": 5.0},
    }
    (tmp_path / "m.json").write_text(json.dumps(text))
    script = SCRIPT.parents[1] / "i2v" / "inference.sh"
    flags = ["--mm-model", "m.json", "--load", str(root / "transformer")]
    done = run(["bash", str(script), *flags], tmp_path, NPROC_PER_NODE="2")  # one video on each rank
    assert done.returncode == 0, done.stderr
    assert [frame_count(tmp_path / "out" / f"video_{index}.mp4") for index in range(2)] == [5, 5]
    shutil.copy(tmp_path / "0.png", tmp_path / "only.png")
    lonely = run(["bash", str(script), *flags, "--image", "0.png", "1.png", "only.png"], tmp_path)
    assert lonely.returncode == 2 and "3 images for 2 prompts" in lonely.stderr
