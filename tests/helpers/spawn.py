"""Run a function on N gloo ranks inside an ordinary test.

A fork server imports torch and megatron.core once (about 5 s) and forks the ranks of every case from that clean
process, so a case costs well under a second instead of the 8 s of a torchrun launch, and no thread or process group
of the test process is ever inherited.

    def every_rank_sees_the_sum(rank: int, world_size: int, offset: float) -> float:
        value = torch.tensor(rank + offset)
        dist.all_reduce(value)
        return value.item()

    def test_sum() -> None:
        assert run_ranks(every_rank_sees_the_sum, 2, 1.0) == [3.0, 3.0]

The function must be importable (module level, no lambda). If a rank raises, dies or hangs, ``run_ranks`` fails the
test with each such rank's number and traceback; of a rank that died, with the end of what it wrote to stderr (the
abort's own message and every thread's stack).
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

GRACE_SECONDS = 3.0
"""How long the other ranks may go on after the first one failed (they usually wait for it in a collective)."""

STDERR_TAIL = 6000
"""Characters of a dead rank's stderr that are shown."""

_PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
            "megatron.core.parallel_state", "megatron.core.tensor_parallel",
            # what ranks with online encoders would otherwise import one by one (2.4 CPU seconds each)
            "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5"]


class RankError(AssertionError):
    """At least one rank of a distributed test failed; the message holds every failed rank's traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0, init: bool = True
) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` ranks and return their results in rank order.

    Args:
        function: a module-level function; arguments and result must pickle (tensors do).
        world_size: number of ranks.
        timeout: seconds until the ranks are killed and the case fails.
        init: create the gloo process group (file rendezvous) before the call, destroy it after.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = str(Path(folder) / "rendezvous")
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, daemon=True,
                                      args=(function, rank, world_size, args, sender),
                                      kwargs={"store": store, "init": init, "timeout": timeout})
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            outcomes = _collect(processes, pipes, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank} of {world_size}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failures:
        raise RankError("\n".join(failures))
    return [pickle.loads(payload) for _, payload in outcomes]


def _collect(
    processes: list[Any], pipes: list[connection.Connection], timeout: float, folder: Path
) -> list[tuple[bool, Any]]:
    """Wait for each rank's (ok, pickled result | traceback); a failed rank shortens the wait for the others."""
    outcomes: list[tuple[bool, Any] | None] = [None] * len(processes)
    deadline = time.monotonic() + timeout
    while any(outcome is None for outcome in outcomes):
        waiting = [pipe for pipe, outcome in zip(pipes, outcomes) if outcome is None]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                outcomes[rank] = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join(5)
                outcomes[rank] = (False, f"died with exit code {processes[rank].exitcode}\n"
                                  + _stderr_file(folder, rank).read_text(errors="replace")[-STDERR_TAIL:])
            if not outcomes[rank][0]:  # type: ignore[index]
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return [outcome or (False, "was still running (waiting for a failed rank, or past the timeout)")
            for outcome in outcomes]


def _stderr_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stderr"


def _keep_stderr(path: Path) -> None:
    """Send this process's stderr, the one of C++ code too, to ``path``: an abort in gloo's thread speaks only there."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable(all_threads=True)


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], sender: Any,
    *, store: str, init: bool, timeout: float,
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
                      LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", MINDSPEED_WAN_DEVICE="cpu")
    _keep_stderr(_stderr_file(Path(store).parent, rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if init:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
                                    timeout=timedelta(seconds=timeout))
        result = pickle.dumps(function(rank, world_size, *args))
        if init and dist.is_initialized():
            dist.barrier()
        outcome: tuple[bool, Any] = (True, result)
    except BaseException as error:
        outcome = (False, "".join(traceback.format_exception(type(error), error, error.__traceback__)))
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    if outcome[0] and init and dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0 if outcome[0] else 1)  # gloo's threads of a failed group must not keep the rank alive
