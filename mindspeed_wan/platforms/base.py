"""What a platform answers: which torch device and backend, how much memory, how fast at best."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.platforms import rank

if TYPE_CHECKING:
    import torch


class Platform(ABC):
    """One kind of hardware. Made by ``get_platform``; ``activate`` prepares the process for it."""

    name: str
    """``npu``, ``cuda`` or ``cpu``."""
    device_type: str
    """The device string of torch."""
    backend: str
    """The backend of ``torch.distributed``."""

    def __init__(self) -> None:
        self.active = False

    @abstractmethod
    def problem(self) -> str | None:
        """Return why this platform cannot be used in this process, or ``None`` if it can."""

    @abstractmethod
    def problem_fix(self) -> str:
        """Return what makes the platform usable where ``problem`` reports something."""

    def device(self, local_rank: int | None = None) -> torch.device:
        """Return the device of a rank on this node (default: of this process)."""
        import torch

        return torch.device(self.device_type, self.local_rank() if local_rank is None else local_rank)

    @staticmethod
    def local_rank() -> int:
        """Return this process's index on its node, 0 outside a launcher."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def activate(self) -> Platform:
        """Prepare this process: choose its device and kernels. Idempotent; the same object is returned."""
        if not self.active:
            self._activate()
            rank.answer_stack_requests()
            self.active = True
        return self

    def deactivate(self) -> None:
        """Undo ``activate`` as far as a process can (for tests)."""
        if self.active:
            self._deactivate()
            self.active = False

    @abstractmethod
    def _activate(self) -> None: ...

    def _deactivate(self) -> None:
        from mindspeed_wan.platforms import ops

        ops.use("torch")
        ops.use_attention("auto")

    def _use_chosen_kernels(self) -> None:
        """Use PyTorch's own norms and rotations, or those that ``MINDSPEED_WAN_KERNELS`` names."""
        from mindspeed_wan.platforms import ops
        from mindspeed_wan.platforms.compiler import check_compiler

        name = os.environ.get(ops.KERNELS_VARIABLE) or "torch"
        if name not in ("torch", "inductor"):
            raise ConfigError(f"{ops.KERNELS_VARIABLE}={name} is not known on {self.name}", fix="use torch or inductor")
        if name == "inductor":
            check_compiler(self, f"{ops.KERNELS_VARIABLE}=inductor")
        ops.use(name)

    def megatron_schedule(self) -> AbstractContextManager[None]:
        """Return the context in which Megatron's pipeline schedules run here."""
        return nullcontext()

    @abstractmethod
    def device_name(self) -> str:
        """Return the model name of the hardware."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give cached, unused device memory back."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Return the largest memory held since the last ``reset_peak_memory`` (CPU: of the process)."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new measurement of ``peak_memory_bytes`` (where the system allows it)."""

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Return the memory that could be allocated now."""

    @abstractmethod
    def total_memory_bytes(self) -> int:
        """Return the memory of the device (CPU: what this process may use, container limits included)."""

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the dense matrix peak in FLOP/s for ``dtype``, or ``None`` where it is not known."""

    @property
    @abstractmethod
    def supports_bf16(self) -> bool:
        """True if bf16 matrix products run at full speed or at least natively."""
