"""``pretrain_sora.py``: from a command line to a trained expert."""

from __future__ import annotations

import os
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
    from mindspeed_wan.training.source import FeedOpener
    from mindspeed_wan.training.stop import StopRequest

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
    """Train one expert, or both (``--expert both``) one after the other or side by side, and return the exit code.

    The command line is checked before torch is imported, so a wrong flag is reported at once.

    Raises:
        WanError: see the exit codes in ``mindspeed_wan.errors``.
    """
    configs, sizes = _read(list(sys.argv[1:] if argv is None else argv))
    for category, module in _NOISE:
        warnings.filterwarnings("ignore", category=category, module=module.replace(".", r"\."))
    platform = get_platform(configs[0].training.device)
    if configs[0].training.dry_run:
        from mindspeed_wan.training.dry_run import check

        print("\n\n".join(check(config) for config in configs))
        return EXIT_OK
    from mindspeed_wan.parallel.failures import explained
    from mindspeed_wan.parallel.groups import destroy

    with explained():
        if len(configs) == 1:
            _train(configs[0], platform)
        elif sizes is not None:
            from mindspeed_wan.training.joint import train_side_by_side

            train_side_by_side(configs, sizes, platform, _run)
        else:
            _train_all(configs, platform)
    destroy()
    return EXIT_OK


def _read(argv: list[str]) -> tuple[list[RunConfig], tuple[int, int] | None]:
    """Return one configuration per expert, and the ranks of each when they train side by side."""
    if not any(word in ("both", "--expert=both") for word in argv):
        return [flags.parse(argv)], None
    from mindspeed_wan.training.both import read

    return read(argv, os.environ)


def _train_all(configs: Sequence[RunConfig], platform: Platform) -> None:
    """Train one expert after the other in the same processes."""
    import gc

    from mindspeed_wan.parallel.agreement import first_decides
    from mindspeed_wan.training.both import collect_adapters, is_done

    waiting = [config for config in configs if not is_done(config)]
    for config in waiting:
        _train(config, platform)
        gc.collect()
        platform.empty_cache()
    for path in first_decides(lambda: collect_adapters(configs)):
        print(f" adapter {path}", flush=True)


def _train(config: RunConfig, platform: Platform) -> None:
    from mindspeed_wan.parallel.agreement import barrier
    from mindspeed_wan.parallel.groups import init_distributed
    from mindspeed_wan.training.source import OwnFeed
    from mindspeed_wan.training.stop import StopRequest

    platform.activate()
    init_distributed(platform, config.parallel.distributed_timeout_minutes)
    # A signal that comes while weights are read is remembered too: the run then stops, saved, after one step.
    with StopRequest(config.training.exit_duration_minutes) as stop:
        _run(config, platform, stop, OwnFeed)
    barrier()


def _run(config: RunConfig, platform: Platform, stop: StopRequest, open_feed: FeedOpener) -> None:
    """Prepare one expert's run and train it to its end. Collective."""
    from mindspeed_wan.parallel.agreement import is_first
    from mindspeed_wan.training.loop import train
    from mindspeed_wan.training.setup import prepare

    run = prepare(config, platform, open_feed)
    if is_first():
        announce(run, platform)
    try:
        train(run, stop)
    finally:
        if run.writer is not None:
            run.writer.close()
        if run.saver is not None:
            run.saver.close()


def announce(run: Run, platform: Platform) -> None:
    """Print what is about to be trained, once."""
    from mindspeed_wan.config.describe import describe

    world_size = run.step.groups.dims.world_size
    print(f"training on {world_size} x {platform.device_name()} ({platform.name}, {platform.backend})")
    print(describe(run.config, world_size))
    print("\n".join(run.source.description), flush=True)
