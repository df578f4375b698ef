"""The launcher with real gloo ranks: a killed, a suspended and a busy rank; restarts that come back."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

JOB = """
import os, signal, sys, time
import torch, torch.distributed as dist
from mindspeed_wan.errors import run_main
from mindspeed_wan.parallel.failures import explained
from mindspeed_wan.parallel.groups import init_distributed
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.platforms.rank import beat

def fails(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "suspend":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "busy":
        time.sleep(100)

def main():
    with explained():
        init_distributed(get_platform("cpu").activate(), timeout_minutes=0.05)
        rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        total = torch.zeros(())
        for step in range(10):
            total += 1
            dist.all_reduce(total)
            beat(step)
            if step == 4 and rank == 1 and attempt == 0:
                fails(sys.argv[1])
        print("rank", rank, "finished in attempt", attempt, "with", total.item())
        dist.barrier()
        dist.destroy_process_group()

run_main(main)
"""


def run(tmp_path, how, *options):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment.update(PYTHONPATH=os.getcwd(), OMP_NUM_THREADS="1")
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "mindspeed_wan.cli.launch", "--nproc-per-node", "2", *options, str(path), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result, time.monotonic() - begun


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "rank 1 was killed by SIGKILL"),
        ("suspend", "suspended (SIGSTOP): rank 1"),
        ("busy", "still busy when the others gave up: rank 1"),
    ],
)
def test_a_rank_that_fell_out_is_named_within_the_timeout(tmp_path, how, message):
    result, seconds = run(tmp_path, how)
    assert result.returncode == 6
    assert message in result.stderr and result.stderr.count("error: ") == 1
    assert "all_reduce" in result.stderr, "the waiting rank shows where it waits"
    assert ("in fails" in result.stderr) == (how == "busy"), "a rank that can still answer shows its stack"
    assert seconds < 60


def test_a_killed_rank_comes_back(tmp_path):
    result, _ = run(tmp_path, "kill", "--max-restarts", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished in attempt 1 with") == 2 and "restart 1 of 2" in result.stderr


@pytest.mark.slow
def test_twenty_killed_ranks_come_back(tmp_path):
    results = [run(tmp_path, "kill", "--max-restarts", "2") for _ in range(20)]
    assert [result.returncode for result, _ in results] == [0] * 20
    assert max(seconds for _, seconds in results) < 60
