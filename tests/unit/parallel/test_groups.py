"""Joining a job: nothing for one rank, clear errors, a rendezvous that survives a restart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mindspeed_wan.errors import ConfigError, ParallelError
from mindspeed_wan.parallel import groups
from mindspeed_wan.platforms import get_platform
from tests.helpers.spawn import run_ranks


def test_one_rank_needs_no_launcher_and_no_megatron() -> None:
    code = (
        "import sys; from mindspeed_wan.platforms import get_platform; from mindspeed_wan.parallel import groups, dims;"
        "groups.init_distributed(get_platform('cpu'));"
        "g = groups.build_groups(dims.ParallelDims(), get_platform('cpu'));"
        "assert (g.tp, g.cp, g.dp, g.mesh, g.rank, g.tp_rank) == (None, None, None, None, 0, 0);"
        "groups.destroy(); sys.exit('megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_half_set_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        groups.init_distributed(get_platform("cpu"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_waits_in_vain_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ParallelError, match="rank 1 of 2 could not meet the others at 127.0.0.1"):
        groups.init_distributed(get_platform("cpu"), timeout_minutes=0.02)


def test_a_restarted_job_does_not_read_its_predecessors_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent keeps one store for all attempts, with the addresses of dead ranks in it."""
    port = _free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    seen = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = groups.rendezvous_store(0, 2, timedelta(seconds=10))
        seen.append(store.check(["address"]))
        store.set("address", "of a rank of this attempt")
    assert seen == [False, False]
    assert agent.num_keys() >= 2


def _join_from_the_environment(rank: int, world_size: int, port: int) -> float:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    groups.init_distributed(get_platform("cpu"), timeout_minutes=0.5)
    value = torch.tensor(float(rank))
    dist.all_reduce(value)
    groups.destroy()
    groups.destroy()  # safe to call twice
    return value.item()


def test_ranks_meet_through_the_environment() -> None:
    assert run_ranks(_join_from_the_environment, 2, _free_port(), init=False) == [1.0, 1.0]
