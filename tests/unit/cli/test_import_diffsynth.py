"""DiffSynth's commands: what is written resolves to the run they describe, and their traps are named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mindspeed_wan.cli.diffsynth import understand
from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.config.load import load_files
from mindspeed_wan.errors import ConfigError

MODEL = "Wan-AI/Wan2.2-I2V-A14B"
HIGH, LOW = (f"{MODEL}:{name}_noise_model/diffusion_pytorch_model*.safetensors" for name in ("high", "low"))
ENCODERS = f"{MODEL}:models_t5_umt5-xxl-enc-bf16.pth,{MODEL}:Wan2.1_VAE.pth"


def command(folder: Path, *more: str, models: str = f"{HIGH},{LOW},{ENCODERS}", lora: bool = True) -> list[str]:
    (folder / "metadata.csv").write_text("video,prompt\n" + "".join(f"{i}.mp4,clip {i}\n" for i in range(10)))
    method = ["--lora_base_model", "dit", "--lora_target_modules", "q,k,v,o,ffn.0,ffn.2", "--lora_rank", "16"]
    return ["accelerate", "launch", "--num_processes", "4", "examples/wanvideo/model_training/train.py",
            "--dataset_base_path", str(folder), "--dataset_metadata_path", str(folder / "metadata.csv"),
            "--height", "480", "--width", "832", "--num_frames", "60", "--dataset_repeat", "100",
            "--model_id_with_origin_paths", models, "--learning_rate", "1e-4", "--num_epochs", "2",
            "--remove_prefix_in_ckpt", "pipe.dit.", "--output_path", str(folder / "out"),
            "--extra_inputs", "input_image", *(method if lora else ["--trainable_models", "dit"]), *more]


def test_the_low_noise_command_that_trains_the_high_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "config"
    line = command(tmp_path, "--min_timestep_boundary", "0.358", "--max_timestep_boundary", "1")
    assert dispatch(["import", "diffsynth", "--out", str(out), "--", *line]) == 0
    told = capsys.readouterr().out
    assert "trains the HIGH-noise expert's weights" in told and "on LOW-noise timesteps" in told
    assert "--num_frames 60 is not 4k+1; 57 frames" in told
    config = load_files(out / "model.json", out / "data.json", out / "fsdp2.yaml")
    assert (config.diffusion.expert, config.diffusion.boundary, config.model.task) == ("low", 0.9, "i2v")
    assert (config.data.num_frames, config.data.max_height, config.data.max_width) == (57, 480, 832)
    assert config.diffusion.weighting == "mm" and not config.diffusion.normalize_weighting
    script = (out / "train.sh").read_text()
    assert "low_noise_model" in script and "high_noise_model" not in script
    assert 'TRAIN_ITERS="${TRAIN_ITERS:-500}"' in script and 'NPROC_PER_NODE="${NPROC_PER_NODE:-4}"' in script
    assert "--lora-r 16 --lora-alpha 16" in script and '/common/launch.sh" pretrain' in script
    assert subprocess.run(["bash", "-n", str(out / "train.sh")], check=False).returncode == 0


def test_full_fine_tuning_of_one_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "config"
    line = command(tmp_path, "--max_timestep_boundary", "0.358", models=f"{HIGH},{ENCODERS}", lora=False)
    assert dispatch(["import", "diffsynth", "--out", str(out), "--", *line]) == 0
    told = capsys.readouterr().out
    assert "full fine-tuning of the high-noise expert" in told and "expert's weights" not in told
    assert "--lora" not in (out / "train.sh").read_text()


def test_the_launcher_reaches_the_ranks(tmp_path: Path) -> None:
    out, printer = tmp_path / "config", tmp_path / "rank.py"
    printer.write_text("import sys; print(*sys.argv[1:])\n")
    dispatch(["import", "diffsynth", "--out", str(out), "--", *command(tmp_path, "--max_timestep_boundary", "0.358")])
    weights = tmp_path / "weights"
    weights.mkdir()
    result = subprocess.run(
        ["bash", str(out / "train.sh"), "--seed", "3"], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "DEVICE": "cpu", "NPROC_PER_NODE": "1", "LAUNCH_SCRIPT": str(printer),
             "LOAD_PATH": str(weights)})
    assert result.returncode == 0, result.stderr
    for part in (f"--load {weights}", "--lora-target-modules q,k,v,o,ffn.0,ffn.2", "--clip-grad 0", "--seed 3"):
        assert part in result.stdout


def test_dit2_and_paths_as_json(tmp_path: Path) -> None:
    paths = '[["/w/high_noise_model/diffusion_pytorch_model-1.safetensors"], ' \
            '["/w/low_noise_model/diffusion_pytorch_model-1.safetensors"], "/w/Wan2.1_VAE.pth"]'
    line = command(tmp_path, "--min_timestep_boundary", "0.358", "--model_paths", paths, "--lora_base_model", "dit2",
                   models="")
    job = understand(line)
    assert job.weights == Path("/w/low_noise_model") and job.vae == Path("/w/Wan2.1_VAE.pth")
    assert not any("expert's weights" in warning for warning in job.warnings)


def test_what_the_command_does_otherwise_is_told(tmp_path: Path) -> None:
    def warnings(*more: str, models: str = f"{HIGH},{ENCODERS}") -> str:
        line = command(tmp_path, "--max_timestep_boundary", "0.358", *more, models=models)
        return "\n".join(understand(line).warnings)

    assert "sigma" not in warnings() and "no image" not in warnings()
    t2v = f"{HIGH},{ENCODERS}".replace("I2V", "T2V")
    told = warnings("--extra_inputs", "", models=t2v)
    assert "parts the experts at sigma 0.9; T2V A14B changes from one to the other at 0.875, which is 0.417" in told
    assert "no image" in warnings("--extra_inputs", "")
    line = [word for word in command(tmp_path, "--max_timestep_boundary", "0.358") if word not in ("--height", "480")]
    assert any("only count together" in warning for warning in understand(line).warnings)


def test_processes_of_several_machines(tmp_path: Path) -> None:
    file, out = tmp_path / "accelerate.yaml", tmp_path / "config"
    file.write_text("num_machines: 2\nnum_processes: 16\nmachine_rank: 0\n")
    line = command(tmp_path, "--max_timestep_boundary", "0.358")
    assert (understand(line).processes, understand(line).machines) == (4, 1)
    line[2:4] = ["--config_file", str(file)]
    dispatch(["import", "diffsynth", "--out", str(out), "--", *line])
    script = (out / "train.sh").read_text()
    assert 'NPROC_PER_NODE="${NPROC_PER_NODE:-8}"' in script and 'NNODES="${NNODES:-2}"' in script
    assert 'TRAIN_ITERS="${TRAIN_ITERS:-126}"' in script  # 10 clips 100 times over 16 processes, twice


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_adapter_fused_into_the_base_is_merged_first(goes_on: bool, tmp_path: Path) -> None:
    out, calls, printer = tmp_path / "a config", tmp_path / "calls", tmp_path / "rank.py"
    printer.write_text("import sys; print(*sys.argv[1:], sep='|')\n")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "mindspeed-wan"
    tool.write_text(f'#!/bin/bash\necho "$@" >> {calls}\nmkdir "${{@: -1}}"\n')
    tool.chmod(0o755)
    checkpoint = ["--lora_checkpoint", "go on.safetensors"] if goes_on else []
    more = ["--preset_lora_path", "my style.safetensors", *checkpoint]
    line = command(tmp_path, "--max_timestep_boundary", "0.358", *more, "--data_file_keys", "video,depth")
    assert any("depth" in warning for warning in understand(line).warnings)
    dispatch(["import", "diffsynth", "--out", str(out), "--", *line])
    for _ in range(2):
        result = subprocess.run(
            ["bash", str(out / "train.sh")], capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "DEVICE": "cpu", "NPROC_PER_NODE": "1", "LAUNCH_SCRIPT": str(printer),
                 "PATH": f"{tool.parent}:{os.environ['PATH']}"})
        assert result.returncode == 0, result.stderr
        assert f"--load{'-base-model' if goes_on else ''}|{out}/base" in result.stdout
    (merged,) = calls.read_text().splitlines()
    assert merged.startswith("lora merge --base") and merged.endswith(f"--out {out}/base")
    assert "high_noise_model" in merged
    assert f"--lora {Path.cwd()}/my style.safetensors --model i2v-A14B" in merged


@pytest.mark.parametrize(("more", "text"), [
    ((), "which expert"),
    (("--max_timestep_boundary", "0.358", "--preset_lora_path", "x", "--preset_lora_model", "dit2"), "dit2"),
    (("--max_timestep_boundary", "0.358", "--audio_processor_path", "x"), "another model"),
    (("--max_timestep_boundary", "0.358", "--lora_rnk", "4"), "--lora_rnk"),
    (("--max_timestep_boundary", "0.358", "--extra_inputs", "vace_video"), "vace_video"),
    (("--max_timestep_boundary", "0.358", "--task", "sft:data_process"), "sft:data_process"),
    (("--max_timestep_boundary", "0.358", "--gradient_accumulation_steps", "0"), "accumulation steps: 0"),
    (("--max_timestep_boundary", "0.358", "--num_frames", "0"), "--num_frames 0"),
    (("--max_timestep_boundary", "0.358", "--lora_rank", "0"), "LoRA rank: 0"),
    (("--max_timestep_boundary", "0.358", "--lora_target_modules", "q,kk"), "'kk' matches no module"),
    *((("--max_timestep_boundary", "0.358", "--model_paths", text), "no JSON list of models")
      for text in ("[[]]", "[1]", '"one"', "{", "[]")),
])
def test_what_cannot_be_imported_is_named(more: tuple[str, ...], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        understand(command(tmp_path, *more))
