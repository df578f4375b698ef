"""VideoX-Fun's commands: what is written resolves to the run they describe, and their traps are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.cli.videox import understand
from mindspeed_wan.config.load import load_files
from mindspeed_wan.errors import ConfigError


def command(folder: Path, *more: str, script: str = "train_lora.py", boundary: str = "low", channels: int = 36,
            mode: str = "inpaint") -> list[str]:
    """Return the command of VideoX-Fun's README, for a folder that is there."""
    model = folder / "Wan2.2-Fun-A14B-InP"
    for name in ("high_noise_model", "low_noise_model"):
        (model / name).mkdir(parents=True, exist_ok=True)
        sizes = {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "in_dim": channels, "out_dim": 16}
        (model / name / "config.json").write_text(json.dumps(sizes))
    rows = [{"file_path": f"{i}.mp4", "text": "a clip", "type": "video"} for i in range(12)]
    (folder / "metadata.json").write_text(json.dumps(rows))
    return ["accelerate", "launch", "--mixed_precision=bf16", "--num_processes=4", f"scripts/wan2.2_fun/{script}",
            "--config_path=config/wan2.2/wan_civitai_i2v.yaml", f"--pretrained_model_name_or_path={model}",
            f"--train_data_dir={folder}", f"--train_data_meta={folder}/metadata.json", "--image_sample_size=1024",
            "--video_sample_size=256", "--token_sample_size=512", "--video_sample_stride=2",
            "--video_sample_n_frames=81", "--train_batch_size=1", "--video_repeat=1",
            "--gradient_accumulation_steps=1", "--dataloader_num_workers=8", "--num_train_epochs=100",
            "--checkpointing_steps=50", "--learning_rate=1e-04", "--seed=42", f"--output_dir={folder}/out",
            "--gradient_checkpointing", "--mixed_precision=bf16", "--adam_weight_decay=3e-2", "--adam_epsilon=1e-10",
            "--vae_mini_batch=1", "--max_grad_norm=0.05", "--random_hw_adapt", "--training_with_video_token_length",
            "--enable_bucket", "--uniform_sampling", f"--boundary_type={boundary}", f"--train_mode={mode}",
            "--low_vram", *more]


PEFT = ("--rank=64", "--network_alpha=32", "--target_name=q,k,v,ffn.0,ffn.2", "--use_peft_lora")


def test_the_readmes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "config"
    assert dispatch(["import", "videox-fun", "--out", str(out), "--", *command(tmp_path, *PEFT)]) == 0
    told = capsys.readouterr().out
    assert "LoRA of rank 64 of the low-noise expert" in told and "lose alpha" in told and "--vae_mini_batch" in told
    config = load_files(out / "model.json", out / "data.json", out / "fsdp2.yaml")
    assert (config.diffusion.expert, config.diffusion.boundary, config.diffusion.shift) == ("low", 0.9, 5.0)
    assert config.model.task == "i2v" and config.model.wan.dim == 48
    assert json.loads((out / "model.json").read_text())["ae"]["i2v_processor"]["conditioning"]["mode"] == "masks"
    assert (config.data.num_frames, config.data.frame_interval) == (81, 2)
    script = (out / "train.sh").read_text()
    for part in ("low_noise_model", "--lora-r 64 --lora-alpha 32.0 --lora-target-modules q,k,v,ffn.0,ffn.2",
                 "--lora-format kohya2", 'CLIP_GRAD:-0.05', 'SEED:-42', "--adam-eps 1e-10", 'TRAIN_ITERS:-300'):
        assert part in script, part


def test_full_training_of_t2v(tmp_path: Path) -> None:
    job = understand(command(tmp_path, script="train.py", boundary="high", channels=16, mode="normal"))
    assert job.lora is None and job.conditioning is None and job.task == "t2v"
    assert (job.expert.expert, job.expert.boundary, job.diffusion["shift"]) == ("high", 0.875, 12.0)


@pytest.mark.parametrize(("more", "options", "text"), [
    (("--rnk=4",), {}, "--rank"),
    ((), {"boundary": "full"}, "two experts"),
    ((), {"boundary": "hi"}, "names no expert"),
    ((), {"channels": 16}, "16 input channels"),
    ((), {"mode": "control"}, "control is not imported"),
    ((), {"script": "train_control.py"}, "train_control.py is not imported"),
    (("--trainable_modules", "attn"), {}, "attn is not imported"),
])
def test_what_cannot_be_imported_is_named(more: tuple[str, ...], options: dict[str, str], text: str,
                                          tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        understand(command(tmp_path, *more, **options))  # type: ignore[arg-type]
    assert text in str(error.value)


@pytest.mark.parametrize(("words", "text"), [
    (("--video_sample_n_frames=80",), "77 frames"),
    (("--random_frame_crop",), "81 become 21"),
    (("--use_ema",), "--ema-decay"),
    (("--fix_sample_size", "480", "830"), "480x816"),
])
def test_traps_are_told(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    assert any(text in warning for warning in understand(command(tmp_path, *words)).warnings)


def test_a_boundary_that_is_ignored_there_is_told(tmp_path: Path) -> None:
    line = [word for word in command(tmp_path) if word != "--uniform_sampling"]
    assert any("whatever --boundary_type says" in warning for warning in understand(line).warnings)
