"""Both experts of a tiny world in one job: ranks of the fork pool with a store of their own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch

from mindspeed_wan.errors import EXIT_OK, WanError
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, checkpoint_tensors, metrics, train_rank

EXACT = ("iteration", "consumed_samples", "loss", "grad_norm", "lr", "sigma", "skipped")
"""What two runs must agree on in every row of ``metrics.jsonl``; the rest is time and memory."""


def both_flags(world: World) -> list[str]:
    """Return the flags that make a command line of ``World.flags`` train both experts."""
    return ["--expert", "both", "--mm-model", str(world.files / "model_{expert}.json"), "--load", str(world.model)]


def joint_rank(rank: int, world_size: int, port: int, argv: list[str], log: str | None = None) -> tuple[int, str]:
    """Train as one rank of a joint job; returns (exit code, message). What it prints goes to ``log``, if given."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with contextlib.ExitStack() as stack:
        if log is not None:
            file = stack.enter_context(open(f"{log}.{rank}", "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        try:
            return train_rank(rank, world_size, argv), ""
        except WanError as error:
            from mindspeed_wan.parallel.groups import destroy

            destroy()
            return error.exit_code, str(error)


def run_joint(world_size: int, argv: list[str], function: Any = joint_rank, *args: Any) -> list[Any]:
    """Run ``function(rank, world_size, port, argv, ...)`` on every rank of a joint job and return their results."""
    return run_ranks(function, world_size, free_port(), argv, *args, init=False)


def finished(results: list[tuple[int, str]]) -> bool:
    """True when every rank of ``joint_rank`` ended well."""
    return all(code == EXIT_OK for code, _ in results)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_same_run(found: Path, wanted: Path) -> None:
    """Two runs have the same history, the same evaluations and, bit for bit, the same checkpoints."""
    rows = [[{name: row[name] for name in EXACT} for row in metrics(folder)] for folder in (found, wanted)]
    assert rows[0] == rows[1]
    evaluations = [_lines(folder / "validation.jsonl") for folder in (found, wanted)]
    assert evaluations[0] == evaluations[1]
    folders = sorted(path.name for path in wanted.glob("iter_*"))
    assert sorted(path.name for path in found.glob("iter_*")) == folders
    for name in folders:
        tensors, reference = checkpoint_tensors(found / name), checkpoint_tensors(wanted / name)
        assert tensors.keys() == reference.keys()
        assert not [key for key in reference if not torch.equal(tensors[key], reference[key])]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
