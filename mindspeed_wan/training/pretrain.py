"""``pretrain_sora.py``: from a command line to a trained expert."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindspeed_wan.config import flags
from mindspeed_wan.errors import EXIT_OK
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.platforms.base import Platform

if TYPE_CHECKING:
    from mindspeed_wan.config.schema import RunConfig
    from mindspeed_wan.training.loop import Run

_NOISE = (
    (UserWarning, "torch.distributed.fsdp"),
    (UserWarning, "torch.distributed.checkpoint"),
    (UserWarning, "megatron.core"),
    (FutureWarning, "torch.distributed"),
    (DeprecationWarning, "torch.jit"),
    (DeprecationWarning, "megatron.core"),
)
"""Warnings about the insides of libraries; a user can do nothing about them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train one expert and return the exit code.

    The command line is checked before torch is imported, so a wrong flag is reported at once.

    Raises:
        WanError: see the exit codes in ``mindspeed_wan.errors``.
    """
    config = flags.parse(list(sys.argv[1:] if argv is None else argv))
    for category, module in _NOISE:
        warnings.filterwarnings("ignore", category=category, module=module.replace(".", r"\."))
    platform = get_platform(config.training.device)
    if config.training.dry_run:
        from mindspeed_wan.training.dry_run import check

        print(check(config))
        return EXIT_OK
    from mindspeed_wan.parallel.failures import explained

    with explained():
        return _train(config, platform)


def _train(config: RunConfig, platform: Platform) -> int:
    from mindspeed_wan.parallel.agreement import barrier, is_first
    from mindspeed_wan.parallel.groups import destroy, init_distributed
    from mindspeed_wan.training.loop import train
    from mindspeed_wan.training.setup import prepare
    from mindspeed_wan.training.stop import StopRequest

    platform.activate()
    init_distributed(platform, config.parallel.distributed_timeout_minutes)
    # A signal that comes while weights are read is remembered too: the run then stops, saved, after one step.
    with StopRequest(config.training.exit_duration_minutes) as stop:
        run = prepare(config, platform)
        if is_first():
            announce(run, platform)
        try:
            train(run, stop)
        finally:
            if run.writer is not None:
                run.writer.close()
            if run.saver is not None:
                run.saver.close()
    barrier()
    destroy()
    return EXIT_OK


def announce(run: Run, platform: Platform) -> None:
    """Print what is about to be trained, once."""
    from mindspeed_wan.config.describe import describe

    world_size = run.step.groups.dims.world_size
    print(f"training on {world_size} x {platform.device_name()} ({platform.name}, {platform.backend})")
    print(describe(run.config, world_size))
    print("\n".join(run.source.description), flush=True)
