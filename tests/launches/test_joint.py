"""``pretrain_both.sh`` and ``EXPERT_RANKS`` as users start them: flags, refusals, a signal, going on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mindspeed_wan.errors import EXIT_DISTRIBUTED
from mindspeed_wan.training.both import EXPERTS
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


def wait_for(job: subprocess.Popen[str], save: Path, iteration: int) -> None:
    """Return once the high-noise expert has made ``iteration`` steps."""
    history, deadline = save / "high" / "metrics.jsonl", time.monotonic() + 200
    while job.poll() is None and time.monotonic() < deadline:
        if history.exists() and len(history.read_text(encoding="utf-8").splitlines()) >= iteration:
            return
        time.sleep(0.02)
    pytest.fail(job.communicate(timeout=30)[0][-3000:])


def finish(job: subprocess.Popen[str], code: int) -> str:
    output, _ = job.communicate(timeout=300)
    assert job.returncode == code, output[-3000:]
    return output


def assert_equals_two_jobs(world: World, save: Path, folder: Path, iters: int, *flags: str) -> None:
    launchers = ["--optimizer-selection", "fused_torch_adamw", "--lr-decay-style", "constant", *flags]
    for expert in ("high", "low"):
        alone = folder / expert
        run_ranks(train_rank, 1, world.flags(alone, *launchers, expert=expert, batch=2, iters=iters), init=False)
        assert_same_run(save / expert, alone)


@pytest.mark.slow
def test_stopped_by_a_signal_and_started_again_equals_two_jobs(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    save, iters = tmp_path / "runs", 30
    job = start(world, save, TRAIN_ITERS=str(iters))
    wait_for(job, save, 1)
    job.send_signal(signal.SIGTERM)
    output = finish(job, 75)
    stopped = {expert: metrics(save / expert)[-1]["iteration"] for expert in ("high", "low")}
    assert all(f"[{expert}]  saved {save / expert}" in output for expert in stopped)
    output = finish(start(world, save, TRAIN_ITERS=str(iters)), 0)
    for expert, iteration in stopped.items():
        assert f"(iteration {iteration}, " in output
        shutil.rmtree(save / expert / f"iter_{iteration:07d}")  # a job that is not stopped saves at its end only
    assert_equals_two_jobs(world, save, tmp_path, iters)


def ranks_of(job: subprocess.Popen[str]) -> dict[str, int]:
    """Return the process of every rank; the workers that read clips for it are its children."""
    return {process.environ()["RANK"]: process.pid for process in psutil.Process(job.pid).children()}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"], ids=["high", "low"])
def test_a_killed_rank_of_one_expert_costs_neither_a_bit(victim: str, tmp_path: Path) -> None:
    """kill -9 of one expert's rank: started again, both end as an undisturbed job does, and as two separate ones."""
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    iters, every = 12, ("--save-interval", "3", "--keep-last", "3")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    job = start(world, killed, *every, TRAIN_ITERS=str(iters))
    wait_for(job, killed, 5)
    os.kill(ranks_of(job)[victim], signal.SIGKILL)
    output = finish(job, EXIT_DISTRIBUTED)
    assert f"rank {victim} was killed by SIGKILL" in output
    assert not (killed / EXPERTS[int(victim)] / f"iter_{iters:07d}").exists(), "it was killed too late"
    finish(start(world, killed, *every, TRAIN_ITERS=str(iters)), 0)
    finish(start(world, straight, *every, TRAIN_ITERS=str(iters)), 0)
    whole = {f"iter_{iteration:07d}" for iteration in range(3, iters + 1, 3)}
    for folder in killed.glob("*/iter_*"):
        if folder.name not in whole:
            shutil.rmtree(folder)  # what the other expert saved when it noticed
    for expert in EXPERTS:
        assert_same_run(killed / expert, straight / expert)
    assert_equals_two_jobs(world, killed, tmp_path, iters, *every)
