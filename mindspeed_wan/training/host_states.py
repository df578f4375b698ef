"""Adam state in host memory (``--optimizer-cpu-offload``): 8 of the 16 bytes per parameter leave the device.

The moments (and fp32 masters, where parameters are not fp32) live in page-locked host memory. In a step they come to
the device some tensors at a time, are updated there by the same kernel as resident ones, and go back, while the next
ones are already coming: the result is the same bits, with or without offload, and the update costs what 16 bytes per
parameter need on the bus (A14B over 8 ranks: 29 GB, about 1.2 s of a step on PCIe 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mindspeed_wan.platforms.copies import Copy, CopyStream
from mindspeed_wan.training.optimizer import BATCH_BYTES, Moments, in_batches


class HostStates:
    """The first ``fraction`` of all state (by size, in the model's order) on the host, the rest on the device.

    Args:
        shards: name -> this rank's part of the parameter.
        fraction: in [0, 1]; 1 offloads everything (``--optimizer-offload-fraction``).
        stream: copies for the parameters' device; ``None`` makes one.
        batch_bytes: about so much state is on its way at a time, in each direction.
    """

    def __init__(self, shards: Mapping[str, Tensor], fraction: float = 1.0, stream: CopyStream | None = None,
                 batch_bytes: int = BATCH_BYTES) -> None:
        device = next((shard.device for shard in shards.values()), torch.device("cpu"))
        self._stream = stream or CopyStream(device)
        self._batch_bytes = batch_bytes
        self._on_host = _first_of(shards, fraction)
        self._states = {name: self._fresh(name, shard) for name, shard in shards.items()}

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(t.nbytes for name in self._on_host for t in self._states[name].tensors())

    def _fresh(self, name: str, shard: Tensor) -> Moments:
        if name not in self._on_host:
            return Moments.fresh(shard)
        state = Moments.fresh(shard, torch.device("cpu"))
        return Moments(*(self._host_copy(t) for t in state.tensors()))

    def _host_copy(self, tensor: Tensor) -> Tensor:
        return self._stream.host_like(tensor).copy_(tensor)

    def batches(self, names: Sequence[str], step: int) -> Iterator[dict[str, Moments]]:
        """Yield resident states, then the others in batches; one comes and one goes while one is worked on."""
        resident = {name: self._states[name] for name in names if name not in self._on_host}
        coming = [_Visit(self._stream, {name: self._states[name] for name in batch})
                  for batch in in_batches({n: sum(t.nbytes for t in self._states[n].tensors())
                                           for n in names if n in self._on_host}, self._batch_bytes)]
        if coming:
            coming[0].invite()
        if resident:
            yield resident
        leaving: _Visit | None = None
        for visit, following in zip(coming, [*coming[1:], None]):
            if following is not None:
                following.invite()
            yield visit.guests()
            if leaving is not None:
                leaving.gone()
            visit.send_home()
            leaving = visit
        if leaving is not None:
            leaving.gone()
        self._stream.synchronize()  # whoever reads the host's copy next (a save) reads this step's

    def masters(self) -> dict[str, Tensor]:
        """Return the live masters, wherever they are."""
        return {n: s.master for n, s in self._states.items() if s.master is not None}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live moments, wherever they are."""
        return {n: {"exp_avg": s.exp_avg, "exp_avg_sq": s.exp_avg_sq} for n, s in self._states.items()}

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """They are the live ones."""


class _Visit:
    """Some states on their way to the device and back."""

    def __init__(self, stream: CopyStream, homes: dict[str, Moments]) -> None:
        self._stream, self._homes = stream, homes
        self._there: dict[str, Moments] = {}
        self._copies: list[Copy] = []

    def invite(self) -> None:
        """Start copying to the device."""
        for name, home in self._homes.items():
            copies = [self._stream.start(torch.empty_like(t, device=self._stream.device), t) for t in home.tensors()]
            self._copies += copies
            self._there[name] = Moments(*(copy.target for copy in copies))

    def guests(self) -> dict[str, Moments]:
        """Return the states on the device once they have come."""
        self._wait()
        return self._there

    def send_home(self) -> None:
        """Start copying back."""
        for name, home in self._homes.items():
            pairs = zip(home.tensors(), self._there[name].tensors())
            self._copies += [self._stream.start(there, here) for there, here in pairs]

    def gone(self) -> None:
        """Free the device memory; computation queued from here on runs after the copies."""
        self._wait()
        self._there = {}

    def _wait(self) -> None:
        for copy in self._copies:
            copy.wait()
        self._copies = []


def _first_of(shards: Mapping[str, Tensor], fraction: float) -> set[str]:
    """Return the names that together make up ``fraction`` of all elements, rounded up to whole tensors."""
    wanted = fraction * sum(shard.numel() for shard in shards.values())
    chosen: set[str] = set()
    for name, shard in shards.items():
        if wanted <= 0:
            break
        chosen.add(name)
        wanted -= shard.numel()
    return chosen
