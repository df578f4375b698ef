"""``pretrain_both.sh`` and ``EXPERT_RANKS`` as users start them: flags, refusals, a signal, going on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.joint import assert_same_run
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, make_world, metrics, train_rank
from tests.launches.test_launch_shell import EXAMPLES, SETTABLE, arguments, place

__all__ = ["place"]  # a fixture


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_variables_become_flags(task: str, place) -> None:
    for name in ("transformer", "transformer_2"):
        (place / "weights here" / name).mkdir()
    script = EXAMPLES / "A14B" / task / "pretrain_both.sh"
    assert len(script.read_text("utf-8").splitlines()) <= 15
    ranks = {"NPROC_PER_NODE": "4", "TP": "2", "GRAD_ACC_STEP": "3"}
    values, _ = arguments(place, script=script, **ranks)
    assert (values["--expert"], values["--expert-ranks"], values["--global-batch-size"]) == ("both", "even", "3")
    assert values["--mm-model"].endswith(f"A14B/{task}/pretrain_model_{{expert}}.json")
    values, _ = arguments(place, script=script, **ranks, EXPERT_RANKS="")
    assert "--expert-ranks" not in values and values["--global-batch-size"] == "6"
    values, _ = arguments(place, script=EXAMPLES / "A14B" / task / "finetune_lora_both.sh", NPROC_PER_NODE="4",
                          EXPERT_RANKS="3,1")
    assert (values["--expert-ranks"], values["--global-batch-size"]) == ("3,1", "3")


def start(world: World, save: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in SETTABLE}
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "A14B" / "t2v" / "pretrain_both.sh"), *flags], cwd=save.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**clean, "PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2",
             "FSDP_CONFIG": "", "MM_MODEL": str(world.files / "model_{expert}.json"), "LR": "1e-3", "SEED": "7",
             "MM_DATA": str(world.files / "data.json"), "LOAD_PATH": str(world.model), "SAVE_PATH": str(save),
             "NUM_WORKERS": "1", "GRAD_ACC_STEP": "2", **variables})


@pytest.mark.slow
def test_stopped_by_a_signal_and_started_again_equals_two_jobs(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    save, iters = tmp_path / "runs", 30
    job = start(world, save, TRAIN_ITERS=str(iters))
    deadline = time.monotonic() + 200
    history = save / "high" / "metrics.jsonl"
    while job.poll() is None and time.monotonic() < deadline and not (history.exists() and history.stat().st_size):
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 75, output[-3000:]
    stopped = {expert: metrics(save / expert)[-1]["iteration"] for expert in ("high", "low")}
    assert all(f"[{expert}]  saved {save / expert}" in output for expert in stopped)
    output, _ = (again := start(world, save, TRAIN_ITERS=str(iters))).communicate(timeout=300)
    assert again.returncode == 0, output[-3000:]
    for expert, iteration in stopped.items():
        assert f"(iteration {iteration}, " in output
        alone = tmp_path / expert
        launchers = ["--optimizer-selection", "fused_torch_adamw", "--lr-decay-style", "constant"]
        run_ranks(train_rank, 1, world.flags(alone, *launchers, expert=expert, batch=2, iters=iters), init=False)
        shutil.rmtree(save / expert / f"iter_{iteration:07d}")  # the job that was not stopped saved at its end only
        assert_same_run(save / expert, alone)
