"""What the killed, signalled and starved processes do. Everything here runs in a process forked by ``harness``."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.background import BackgroundSave
from tests.unit.checkpoint.test_dcp import CARD, Tiny

VARIANTS = 5
"""Iteration ``i`` is saved with the content of ``Tiny(i % VARIANTS + 1)``, so a loaded one can be told exactly."""


def content(iteration: int) -> Tiny:
    """Return the model that is saved as ``iteration``."""
    return Tiny(iteration % VARIANTS + 1)


def save_for_ever(root: str, background: bool) -> None:
    """Save iteration 1, 2, 3 ... until killed, keeping two."""
    tinies = [Tiny(i % VARIANTS + 1) for i in range(VARIANTS)]
    iteration = 1
    while True:
        tiny = tinies[iteration % VARIANTS]
        if background:
            record = dcp.Record(dcp.Progress(iteration=iteration, optimizer_steps=tiny.optimizer.steps), CARD, 2)
            pending = BackgroundSave(root, tiny.state(), record, None)
            for _ in range(3):  # training goes on
                torch.randn(200, 200).mm(torch.randn(200, 200))
            pending.finish()
        else:
            tiny.save(Path(root), iteration, keep_last=2)
        iteration += 1


def lose_a_rank(rank: int, store: str, root: str) -> None:
    """Save iteration 1 on two ranks, then 2 in the background; rank 1 dies after submitting its part."""
    import signal

    from mindspeed_wan.errors import run_main
    from mindspeed_wan.parallel.failures import explained

    def work() -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        group = dist.new_group(backend="gloo")
        with explained():
            for iteration in (1, 2):
                state = {f"model.part{rank}": torch.full((1000,), float(iteration))}
                record = dcp.Record(dcp.Progress(iteration=iteration), CARD)
                pending = BackgroundSave(root, state, record, group)
                if rank == 1 and iteration == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                pending.finish()

    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    run_main(work)  # type: ignore[arg-type]


def train(rank: int, world_size: int, store: str, argv: list[str], patch: str = "") -> None:
    """Run ``pretrain_sora.py`` as one rank, exit code included.

    Args:
        rank: this rank.
        world_size: of how many.
        store: file rendezvous.
        argv: the command line.
        patch: name of a function of this module to call first.
    """
    from mindspeed_wan.errors import run_main
    from mindspeed_wan.training.pretrain import main

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if patch:
        name, _, value = patch.partition(":")
        globals()[name](value, rank)
    run_main(lambda: main(argv))


# ---- what goes wrong -----------------------------------------------------------------------------------------


def bad_numbers(spec: str, rank: int) -> None:
    """Make the loss of some steps bad on the last rank alone: ``nan@3``, ``inf@3,4,5``, ``spike@25``."""
    from mindspeed_wan.training.step import TrainStep

    kind, _, steps = spec.partition("@")
    wanted = {int(step) for step in steps.split(",")}
    factor = {"nan": float("nan"), "inf": float("inf"), "spike": 1e4}[kind]
    real, seen = TrainStep.accumulate, [0]
    losses = TrainStep.losses

    def accumulate(self: Any, *args: Any, **options: Any) -> Any:
        seen[0] += 1
        return real(self, *args, **options)

    def bad_losses(self: Any, batch: Any) -> Any:
        loss, sigma = losses(self, batch)
        last = rank == (dist.get_world_size() - 1 if dist.is_initialized() else 0)
        return (loss * factor if seen[0] in wanted and last else loss), sigma

    TrainStep.accumulate, TrainStep.losses = accumulate, bad_losses  # type: ignore[method-assign]


def full_disk(size: str, rank: int) -> None:
    """Let every write beyond ``size`` bytes of a file fail from the first save on."""
    import resource

    from mindspeed_wan.training.saving import Saver

    real = Saver.save

    def save(self: Any, *args: Any, **options: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        real(self, *args, **options)

    Saver.save = save  # type: ignore[method-assign]


def full_disk_for_adapters(nothing: str, rank: int) -> None:
    """Let the adapter's file be the one that does not fit any more."""
    from mindspeed_wan.training import adapters
    from tests.faults.saves import file_size_limit

    real = adapters.write_lora

    def write(*args: Any, **options: Any) -> Any:
        with file_size_limit(5000):
            return real(*args, **options)

    adapters.write_lora = write


def no_network(record: str, rank: int) -> None:
    """Refuse every connection but those of this machine, and note each attempt in the file ``record``."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            with open(record, "a", encoding="utf-8") as stream:
                stream.write(f"{address}\n")
            raise OSError("the network is blocked")
        return real(self, address)

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (None, "", "localhost", "127.0.0.1", socket.gethostname()):
            with open(record, "a", encoding="utf-8") as stream:
                stream.write(f"{host}\n")
            raise socket.gaierror("the network is blocked")
        return known(host, *args, **options)

    known = socket.getaddrinfo
    socket.socket.connect = connect  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = resolve
    os.environ.pop("HF_HUB_OFFLINE", None)  # what the command sets by itself is what counts


def generate(record: str, argv: list[str]) -> None:
    """Run ``inference_sora.py`` without a network."""
    from mindspeed_wan.errors import run_main
    from mindspeed_wan.inference.generate import main

    no_network(record, 0)
    run_main(lambda: main(argv))


def convert(argv: list[str], record: str = "") -> None:
    """Run ``mm-convert``; without a network when ``record`` is given."""
    from mindspeed_wan.errors import run_main
    from mindspeed_wan_converters.cli import run

    if record:
        no_network(record, 0)
    run_main(lambda: run(argv))


def hold_target(target: str, ready: str) -> None:
    """Be a conversion that never ends."""
    import time

    from mindspeed_wan.checkpoint.lock import locked_target

    with locked_target(target):
        Path(ready).touch()
        time.sleep(600)


def hold_folder(folder: str, ready: str) -> None:
    """Be a job that never ends."""
    import time

    from mindspeed_wan.checkpoint.lock import FolderLock

    FolderLock(folder).acquire()
    Path(ready).touch()
    time.sleep(600)
