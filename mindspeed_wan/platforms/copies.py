"""Copies between a device and page-locked host memory that run beside the computation, in the order they were started.

All copies of one ``CopyStream`` go through one side stream, so a host buffer may be handed from one copy to the next
without waiting. On a CPU there is no second memory: the same calls copy at once, which is what tests run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Copy:
    """A copy under way; keeps its source alive as long as it is kept itself."""

    def __init__(self, target: Tensor, source: Tensor, stream: CopyStream) -> None:
        self.target, self._source, self._stream = target, source, stream
        self._done = stream.run(target, source)

    def wait(self) -> Tensor:
        """Make the compute stream wait for the copy; return the target. Does not stop the host."""
        self._stream.wait(self._done)
        return self.target


class CopyStream:
    """Starts copies for one device.

    Args:
        device: where the computation runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._side: Any = None if self._module is None else self._module.Stream(device)

    @property
    def compute_stream(self) -> Any:
        """The stream that the caller's computation is queued on."""
        return self._module.current_stream(self.device)

    def host_like(self, tensor: Tensor) -> Tensor:
        """Return uninitialised host memory in the shape of ``tensor``, page-locked where there is a device."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._module is not None)

    def host_bytes(self, size: int) -> Tensor:
        """Return ``size`` bytes of such memory."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._module is not None)

    def start(self, target: Tensor, source: Tensor) -> Copy:
        """Start ``target.copy_(source)`` after everything that the caller has queued so far."""
        return Copy(target, source, self)

    def run(self, target: Tensor, source: Tensor) -> Any:
        """Queue one copy; returns the event that ends it (``None``: it is done)."""
        if self._module is None:
            target.copy_(source)
            return None
        self._side.wait_stream(self.compute_stream)
        with self._module.stream(self._side):
            target.copy_(source, non_blocking=True)
        return self._side.record_event()

    def wait(self, event: Any) -> None:
        """Let what the caller queues next run after ``event``."""
        if event is not None:
            self.compute_stream.wait_event(event)

    def synchronize(self) -> None:
        """Stop the host until every copy is done (before host memory is read by the host)."""
        if self._side is not None:
            self._side.synchronize()
