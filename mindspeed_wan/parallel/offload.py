"""Inputs of recomputed blocks kept in host memory between the forward and the backward pass.

Recomputation leaves one tensor per block on the device, its input ``x [L, B, D]``; over 40 blocks of A14B at 720p that
is 29 GiB in bf16. Here each goes to page-locked host memory while its block computes, and comes back one block ahead
of the backward pass, on a stream of its own:

    forward    start copying x_i to the host | block i computes | x_(i-1) has arrived there and is freed on the device
    backward   wait for x_i | start fetching x_(i-1) | block i computes again, and its gradients

So at most two inputs are on the device at any moment: the one in use and the one that travels. The bits do not change.
At 720p a block of A14B computes for about a quarter of a second and its 0.77 GB need 30 ms on PCIe 4, so the copies
hide; where they do not, the computation waits for them rather than use more memory.

Tensors are caught by ``torch.autograd.graph.saved_tensors_hooks`` around ``torch.utils.checkpoint``, which is all that
recomputation needs to know.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mindspeed_wan.platforms.copies import Copy, CopyStream


class InputOffload:
    """The host memory, the copy stream and the order of one model's recomputed blocks.

    Args:
        stream: copies for the model's device; ``None`` makes one for the device of the first input.

    Several forward passes may be open at the same time (pipeline stages). Which input is fetched next is a guess from
    the order of the forward pass; a wrong guess costs a copy, never a wrong value.
    """

    def __init__(self, stream: CopyStream | None = None) -> None:
        self._stream = stream
        self._host = HostBuffers()
        self._newest: weakref.ref[ParkedInput] | None = None
        self._fetched: ParkedInput | None = None
        self.parked = 0
        """Inputs taken so far (for tests and for the check that torch's checkpoint still hands its inputs over)."""

    def around(self, x: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Return the context in which ``checkpoint`` saves its inputs: ``x`` is parked, all others stay as they are.

        Rotary tables, modulation and text are shared by all blocks, so they are on the device only once anyway.
        """
        address, shape = x.data_ptr(), x.shape

        def pack(tensor: Tensor) -> Tensor | ParkedInput:
            is_x = tensor.numel() > 0 and tensor.data_ptr() == address and tensor.shape == shape
            return self.park(tensor) if is_x else tensor

        def unpack(packed: Tensor | ParkedInput) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.fetch(packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def park(self, x: Tensor) -> ParkedInput:
        """Start moving ``x`` to the host, and free the device memory of the input before it."""
        if self._stream is None:
            self._stream = CopyStream(x.device)
        before = self._newest() if self._newest is not None else None
        if before is not None:
            before.leave_device()
        memory = self._host.take(x.nbytes, self._stream)
        buffer = memory[: x.nbytes].view(x.dtype).view(x.shape)
        parked = ParkedInput(x.detach(), buffer, self._stream, before)
        # The memory goes back when autograd drops the graph. A later copy into it is queued behind any copy out of it.
        weakref.finalize(parked, self._host.give, memory).atexit = False
        self._newest = weakref.ref(parked)
        self.parked += 1
        return parked

    def fetch(self, parked: ParkedInput) -> Tensor:
        """Return a parked input on the device, and start fetching the one before it."""
        x = parked.take()
        if self._fetched is not None and self._fetched is not parked:
            self._fetched.leave_device()  # a wrong guess: its memory is wanted for the right one
        self._fetched = parked.before
        if self._fetched is not None:
            self._fetched.start_return()
        return x

    def on_device(self) -> int:
        """Return how many parked inputs of the newest forward pass are on the device."""
        count, entry = 0, self._newest() if self._newest is not None else None
        while entry is not None:
            count += entry.is_on_device
            entry = entry.before
        return count


class HostBuffers:
    """Page-locked memory for reuse: locking pages takes far longer than copying into them."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, stream: CopyStream) -> Tensor:
        """Return at least ``size`` bytes; where only smaller buffers are free, a new one replaces one of them."""
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        chosen = min(fitting or self._free, key=lambda buffer: buffer.nbytes, default=None)
        if chosen is not None:
            self._free = [buffer for buffer in self._free if buffer is not chosen]
        return chosen if chosen is not None and fitting else stream.host_bytes(size)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free.append(buffer)


class ParkedInput:
    """One block's input: on the device, on the host, or on the way."""

    def __init__(self, x: Tensor, buffer: Tensor, stream: CopyStream, before: ParkedInput | None) -> None:
        self._device: Tensor | None = x
        self._buffer, self._stream = buffer, stream
        self._leaving: Copy | None = stream.start(buffer, x)
        self._coming: Copy | None = None
        self._used = False
        # A weak link: the chain of a whole run would keep every host buffer alive.
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> ParkedInput | None:
        """The input parked before this one, if its backward pass is still to come."""
        entry = self._before() if self._before is not None else None
        return entry if entry is not None and not entry._used else None

    @property
    def is_on_device(self) -> bool:
        """True while device memory is held."""
        return self._device is not None or self._coming is not None

    def leave_device(self) -> None:
        """Drop the device memory; what is queued from here on, and may get that memory, waits for copies under way."""
        for copy in (self._leaving, self._coming):
            if copy is not None:
                copy.wait()
        self._device = self._leaving = self._coming = None

    def start_return(self) -> None:
        """Start copying to the device; nothing if it is there."""
        if not self.is_on_device:
            target = torch.empty_like(self._buffer, device=self._stream.device)
            self._coming = self._stream.start(target, self._buffer)

    def take(self) -> Tensor:
        """Return the values on the device and let go of them; the host keeps its copy (a graph may run twice)."""
        self.start_return()
        x = self._device if self._coming is None else self._coming.wait()
        assert x is not None  # start_return saw to it
        self.leave_device()
        self._used = True
        return x
