"""What the step benchmarks share: a clock, two programs in turn, and the limits of this machine in this very run."""

from __future__ import annotations

import os
import platform as host
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.platforms.base import Platform

COPY_BYTES = 256 << 20


class Clock:
    """CPU time of all threads on a CPU, which other processes disturb least; wall time elsewhere."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.name = "cpu time" if platform.name == "cpu" else "wall time"

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the time of one call, queued device work included."""
        now = time.process_time if self.platform.name == "cpu" else time.perf_counter
        self.platform.synchronize()
        start = now()
        function()
        self.platform.synchronize()
        return now() - start


def alternate(
    first: Callable[[], object], second: Callable[[], object], repeats: int, clock: Clock
) -> tuple[float, float]:
    """Return median seconds of two functions, run in turn (they have been warmed up)."""
    times = [(clock.seconds(first), clock.seconds(second)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def peak_gib(function: Callable[[], object], platform: Platform) -> float | None:
    """Return the peak device memory of one call in GiB; ``None`` on a CPU, where one peak covers the whole process."""
    if platform.name == "cpu":
        return None
    platform.empty_cache()
    platform.reset_peak_memory()
    function()
    platform.synchronize()
    return platform.peak_memory_bytes() / 2**30


def gemm_flops(config: WanConfig, tokens: int, dtype: torch.dtype, platform: Platform) -> float:
    """Return the best FLOP/s of the model's largest matrix product: the limit of everything else."""
    a = torch.randn(tokens, config.dim, device=platform.device()).to(dtype)
    b = torch.randn(config.ffn_dim, config.dim, device=platform.device()).to(dtype)
    clock = Clock(platform)
    best = min(clock.seconds(lambda: nn.functional.linear(a, b)) for _ in range(8))
    return 2.0 * tokens * config.dim * config.ffn_dim / best


def copy_rate(platform: Platform) -> float:
    """Return the best bytes/s of a copy in device memory, read and written bytes counted: the limit of all the rest."""
    source = torch.ones(COPY_BYTES // 4, device=platform.device())
    target = torch.empty_like(source)
    clock = Clock(platform)
    return 2.0 * COPY_BYTES / min(clock.seconds(lambda: target.copy_(source)) for _ in range(5))


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """Return the relative L2 distance of the outputs (rounding apart they are the same function)."""
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


def machine(platform: Platform) -> dict[str, object]:
    """Return what a reader needs to judge the numbers."""
    import diffusers

    return {
        "device": platform.device_name(),
        "platform": platform.name,
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": host.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
