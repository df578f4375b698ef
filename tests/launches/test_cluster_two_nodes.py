"""Two nodes x two ranks on loopback, as a Volcano job starts them: killed, requeued, bit-equal at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mindspeed_wan.cli.nodes import free_port
from tests.helpers.spawn import run_ranks
from tests.helpers.world import (
    REPOSITORY,
    World,
    checkpoint_tensors,
    losses,
    make_world,
    metrics,
    train_rank,
    with_cached_features,
)

EXAMPLES = REPOSITORY / "examples" / "wan2.2"
ITERATIONS = 16
FSDP = EXAMPLES / "A14B" / "fsdp2_config.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    online = make_world(tmp_path_factory.mktemp("online"), num_frames=5, size=(32, 48))
    return with_cached_features(online, tmp_path_factory.mktemp("world"))


class Nodes:
    """Two containers on this machine, each running the entry script under a pod's variables."""

    def __init__(self, world: World, save: Path) -> None:
        port = str(free_port())
        self.save = save
        self.pods = [self._start(world, node, port) for node in range(2)]

    def _start(self, world: World, node: int, port: str) -> subprocess.Popen[bytes]:
        scheduler = {"VC_TASK_INDEX": str(node), "VC_WORKER_HOSTS": "127.0.0.1,127.0.0.1", "VC_WORKER_NUM": "2"}
        launch = {"NNODES": "2", "NPROC_PER_NODE": "2", "DEVICE": "cpu", "MASTER_PORT": port, "TP": "2",
                  "FSDP_CONFIG": str(FSDP), "LOAD_PATH": "", "SAVE_PATH": str(self.save), "PYTHON": sys.executable,
                  "RETRY_EXIT_CODE": "138", "OMP_NUM_THREADS": "1", "LOG_FOLDER": str(self.save / "logs")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        flags = world.flags(self.save, "--save-interval", "4", iters=ITERATIONS)
        entry, script = EXAMPLES / "cluster" / "entry.sh", EXAMPLES / "A14B" / "t2v" / "pretrain_high.sh"
        return subprocess.Popen(
            ["bash", str(entry), str(script), *flags],
            env={**kept, **launch, **scheduler}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, iteration: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and all(pod.poll() is None for pod in self.pods):
            if (self.save / "metrics.jsonl").exists() and len(losses(self.save)) >= iteration:
                return
            time.sleep(0.02)
        pytest.fail("".join(pod.communicate(timeout=30)[0].decode()[-2000:] for pod in self.pods))

    def finish(self) -> list[int]:
        """Wait for both; return their exit codes."""
        outputs = [pod.communicate(timeout=180)[0].decode() for pod in self.pods]
        assert "Traceback" not in "".join(outputs), "".join(outputs)[-4000:]
        return [pod.returncode for pod in self.pods]


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job, undisturbed, on four ranks that share a machine; the flags are those the launch script makes."""
    save = tmp_path_factory.mktemp("straight")
    run_ranks(train_rank, 4, world.flags(save, "--tensor-model-parallel-size", "2", "--use-torch-fsdp2",
                                         "--fsdp2-config-path", str(FSDP), "--lr-decay-style", "constant",
                                         "--optimizer-selection", "fused_torch_adamw", iters=ITERATIONS))
    return save


def assert_same_end(straight: Path, save: Path) -> None:
    assert [row["loss"].hex() for row in metrics(save)] == [row["loss"].hex() for row in metrics(straight)]
    wanted = checkpoint_tensors(straight / f"iter_{ITERATIONS:07d}")
    found = checkpoint_tensors(save / f"iter_{ITERATIONS:07d}")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def test_evicted_job_saves_is_requeued_and_ends_with_the_same_bits(world: World, straight: Path,
                                                                   tmp_path: Path) -> None:
    """The scheduler tells one node to stop: all ranks of both save, both ask for another start."""
    job = Nodes(world, tmp_path)
    job.wait_for(2)
    job.pods[1].send_signal(signal.SIGTERM)
    assert job.finish() == [138, 138]
    saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < ITERATIONS and saved == metrics(tmp_path)[-1]["iteration"]
    assert Nodes(world, tmp_path).finish() == [0, 0]
    assert_same_end(straight, tmp_path)
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert sum("_node0" in name for name in logs) == sum("_node1" in name for name in logs) >= 1


@pytest.mark.slow
def test_a_dead_node_costs_what_was_not_saved(world: World, straight: Path, tmp_path: Path) -> None:
    """A machine vanishes: the other one notices, asks for another start, and that goes on from the last save."""
    job = Nodes(world, tmp_path)
    job.wait_for(5)
    os.killpg(job.pods[1].pid, signal.SIGKILL)
    assert job.finish() == [138, -signal.SIGKILL]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() in ("4", "8", "12")
    assert Nodes(world, tmp_path).finish() == [0, 0]
    assert_same_end(straight, tmp_path)
