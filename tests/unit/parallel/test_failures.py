"""Errors of torch that mean a lost rank or a full memory; everything else passes through."""

import pytest
import torch
import torch.distributed as dist

from mindspeed_wan.errors import DataError, ParallelError, ResourceError
from mindspeed_wan.parallel.failures import explained


@pytest.fixture
def in_a_job(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 3)


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:48540: Connection reset by peer",
        "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete",
        "NCCL communicator was aborted on rank 3.",
        "HCCL function error: HcclAllreduce",
    ],
)
def test_a_lost_rank(in_a_job, capsys, message):
    with pytest.raises(ParallelError, match="waited in vain") as error, explained():
        raise RuntimeError(message)
    assert (
        error.value.exit_code == 6 and "pair.cc" not in str(error.value) and "run the same command" in str(error.value)
    )
    assert "[rank 3] stopped here:" in capsys.readouterr().err


def test_a_backend_error_of_torch(in_a_job):
    with pytest.raises(ParallelError), explained():
        raise dist.DistBackendError("unhandled system error")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory(error):
    with pytest.raises(ResourceError, match="out of memory") as raised, explained():
        raise error
    assert raised.value.exit_code == 3 and "mindspeed-wan plan" in str(raised.value)


@pytest.mark.parametrize("words", ["is killed by signal: Killed. ", "exited unexpectedly with exit code 1."])
def test_a_data_worker_that_died_during_a_step(in_a_job, words):
    with pytest.raises(ResourceError, match="a data worker died: DataLoader worker") as raised, explained():
        raise RuntimeError(f"DataLoader worker (pid 658) {words}\nIt is out of shared memory")
    assert raised.value.exit_code == 3 and "--num-workers" in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("timed out"), DataError("timeout")])
def test_other_errors_pass_unchanged(in_a_job, error):
    with pytest.raises(type(error)) as raised, explained():
        raise error
    assert raised.value is error


def test_a_timeout_outside_a_job_is_not_a_lost_rank():
    with pytest.raises(RuntimeError, match="timed out"), explained():
        raise RuntimeError("the download timed out")
