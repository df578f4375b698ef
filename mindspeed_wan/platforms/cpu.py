"""CPU with gloo: a complete platform, and the one every test runs on."""

from __future__ import annotations

import contextlib
import os
import platform as host
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.platforms.base import Platform

if TYPE_CHECKING:
    import torch


class CpuPlatform(Platform):
    """Any machine that runs PyTorch."""

    name = "cpu"
    device_type = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        super().__init__()
        self._current_device: Callable[[], int] | None = None

    def problem(self) -> str | None:
        """The CPU is always usable."""
        return None

    def problem_fix(self) -> str:
        """Nothing to fix."""
        return ""

    def device(self, local_rank: int | None = None) -> torch.device:
        """All ranks share the one CPU device."""
        import torch

        return torch.device("cpu")

    def _activate(self) -> None:
        import torch

        self._use_chosen_kernels()
        # Megatron allocates communication buffers on `torch.cuda.current_device()` (sequence parallel, gathers). This
        # is the only patch it needs to run on the CPU; it is installed here, not at import, and undone by deactivate.
        self._current_device = torch.cuda.current_device
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    def _deactivate(self) -> None:
        import torch

        super()._deactivate()
        if self._current_device is not None:
            torch.cuda.current_device = self._current_device

    def megatron_schedule(self) -> AbstractContextManager[None]:
        """Megatron's schedules count tokens in a tensor on ``device="cuda"``; here that is the CPU."""
        return _cuda_is_cpu()

    def device_name(self) -> str:
        """Return the processor's model name."""
        cpuinfo = _read("/proc/cpuinfo")
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        name = match.group(1).strip() if match else host.processor() or host.machine()
        return f"{name} ({available_cores()} cores)"

    def synchronize(self) -> None:
        """CPU operations have finished when they return."""

    def empty_cache(self) -> None:
        """The allocator of the CPU keeps no cache."""

    def peak_memory_bytes(self) -> int:
        """Return the peak resident size of this process."""
        match = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        """Reset the kernel's high-water mark of this process, where the kernel lets us."""
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak then covers the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def free_memory_bytes(self) -> int:
        """Return what the machine, or the container's limit, leaves free."""
        free = _meminfo("MemAvailable") or self.total_memory_bytes()
        limit, used = _cgroup_memory()
        return free if limit is None else max(0, min(free, limit - used))

    def total_memory_bytes(self) -> int:
        """Return the machine's memory or the container's limit, whichever is smaller."""
        total = _meminfo("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit, _ = _cgroup_memory()
        return total if limit is None else min(total, limit)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Not known: it depends on clocks, vector units and how many cores the ranks share."""
        return None

    @property
    def supports_bf16(self) -> bool:
        """PyTorch computes bf16 on every CPU."""
        return True


@contextlib.contextmanager
def _cuda_is_cpu() -> Iterator[None]:
    """Make ``torch.zeros(..., device="cuda")`` and ``tensor.cuda()``, as Megatron writes them, stay on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    class CudaIsCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is torch.Tensor.cuda:
                return args[0]
            if kwargs.get("device") == "cuda":
                kwargs = {**kwargs, "device": "cpu"}
            return function(*args, **kwargs)

    with CudaIsCpu():
        yield


def available_cores() -> int:
    """Return the cores this process may run on (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _meminfo(key: str) -> int | None:
    match = re.search(rf"^{key}:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _cgroup_memory() -> tuple[int | None, int]:
    """Return the container's (limit, use) in bytes; limit ``None`` where there is none (cgroup v2, then v1)."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit_file).strip(), _read(used_file).strip()
        if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
            return int(limit), int(used)
    return None, 0
