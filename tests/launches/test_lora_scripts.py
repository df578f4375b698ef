"""``finetune_lora_*.sh`` and ``predict_t2v.sh`` as users start them: defaults, variables, two ranks, a video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_wan.training.both import split
from tests.helpers.world import World, make_world, with_cached_features
from tests.launches.test_launch_shell import EXAMPLES, SETTABLE, arguments, place

__all__ = ["place"]  # a fixture


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_defaults_and_variables(task: str, expert: str, place) -> None:
    script = EXAMPLES / "A14B" / task / f"finetune_lora_{expert}.sh"
    assert len(script.read_text("utf-8").splitlines()) <= 15
    values, _ = arguments(place, script=script)
    assert (values["--lora-r"], values["--lora-alpha"], values["--lr"]) == ("32", "32", "1e-4")
    assert values["--lora-target-modules"] == "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2"
    assert values["--mm-model"].endswith(f"A14B/{task}/pretrain_model_{expert}.json")
    changed, _ = arguments(place, "--lora-dropout", "0.1", script=script, LORA_R="8", LR="2e-5")
    assert (changed["--lora-r"], changed["--lr"], changed["--lora-dropout"]) == ("8", "2e-5", "0.1")


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_both_experts(task: str, place) -> None:
    for name in ("transformer", "transformer_2"):
        (place / "weights here" / name).mkdir()
    values, _ = arguments(place, script=EXAMPLES / "A14B" / task / "finetune_lora_both.sh")
    words = [part for item in values.items() for part in item if isinstance(part, str)]
    high, low = (dict(zip(line[::2], line[1::2])) for line in split([w for w in words if w != "--bf16"]))
    assert high["--expert"] == "high" and low["--expert"] == "low"
    assert low["--mm-model"].endswith(f"A14B/{task}/pretrain_model_low.json")
    assert low["--load"].endswith("weights here/transformer_2") and high["--save"].endswith("saved here/high")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("world"))


def start(script: Path, folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in SETTABLE}
    return subprocess.run(
        ["bash", str(script), *flags], cwd=folder, capture_output=True, text=True, timeout=280, check=False,
        env={**clean, "PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **variables})


def test_from_the_launchers_two_ranks_train_both_adapters_and_a_video_is_made(world: World, tmp_path: Path) -> None:
    save = tmp_path / "runs"
    trained = start(
        EXAMPLES / "A14B" / "t2v" / "finetune_lora_both.sh", tmp_path, "--lora-r", "4", NPROC_PER_NODE="2", TP="2",
        SP="1", FSDP_CONFIG="", MM_MODEL=str(world.files / "model_{expert}.json"), TRAIN_ITERS="2", NUM_WORKERS="0",
        MM_DATA=str(world.files / "data.json"), LOAD_PATH=str(world.model), SAVE_PATH=str(save))
    assert trained.returncode == 0, trained.stderr + trained.stdout[-2000:]
    adapters = [save / f"adapter_{expert}.safetensors" for expert in ("high", "low")]
    assert all(file.is_file() for file in adapters)
    made = start(
        EXAMPLES / "A14B" / "inp" / "predict_t2v.sh", tmp_path, "--task", "t2v-A14B", "--size", "96*64",
        "--frame_num", "5", "--sample_steps", "4", "--dtype", "fp32", CKPT_DIR=str(world.model),
        LORA_HIGH=str(adapters[0]), LORA_LOW=str(adapters[1]), GPU_MEMORY_MODE="sequential_cpu_offload",
        SAVE_FILE=str(tmp_path / "video.mp4"))
    assert made.returncode == 0, made.stderr + made.stdout[-2000:]
    record = json.loads((tmp_path / "video.json").read_text("utf-8"))
    assert (tmp_path / "video.mp4").is_file() and record["memory"] == "block"
    assert [weight for *_, weight in record["settings"]["lora"]["high"]] == [0.55]
    refused = start(EXAMPLES / "A14B" / "inp" / "predict_t2v.sh", tmp_path, "--task", "t2v-A14B", LORA_LOW="",
                    LORA_HIGH="", CKPT_DIR=str(world.model), GPU_MEMORY_MODE="model_cpu_offload_and_qfloat")
    assert refused.returncode == 2 and "did you mean 'model_cpu_offload_and_qfloat8'" in refused.stderr
