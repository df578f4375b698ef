"""Experts whose blocks live on the host: a block's weights come to the device just before the block runs.

Two sets of buffers take turns, so the next block's weights travel while the current block computes. For A14B at 720p
a block computes for about a quarter of a second and its 0.7 GB (bf16) travel in 30 ms: nearly free. Everything outside
the blocks stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mindspeed_wan.inference.adapters import move_factors
from mindspeed_wan.inference.experts import Adapters, ResidentExperts, page_locked
from mindspeed_wan.inference.runtime import Runtime
from mindspeed_wan.lora.apply import is_factor
from mindspeed_wan.models.wan.model import WanDiT

_METHODS = ("forward", "project_text")
"""What a block does with its weights: run, and compute a prompt's keys and values."""


class StreamedExperts(ResidentExperts):
    """Every expert's blocks on the host; they share the device buffers."""

    def __init__(self, models: dict[str, WanDiT], runtime: Runtime, adapters: Adapters | None = None) -> None:
        super().__init__(models, adapters)
        self._device = runtime.device
        first = next(iter(models.values()))
        self._stream = BlockStream(first.blocks, runtime.device)
        for model in models.values():
            self._place(model, runtime)

    def exchange(self, adapters: Adapters | None) -> None:
        """Take the adapters off and put others on."""
        super().exchange(adapters)
        for model in self.models.values():
            move_factors(model, self._device)

    def _place(self, model: WanDiT, runtime: Runtime) -> None:
        """Move what is outside the blocks to the device, page-lock the blocks and hook them up."""
        in_blocks = {id(parameter) for parameter in model.blocks.parameters()}
        for parameter in model.parameters():
            if id(parameter) in in_blocks:
                parameter.data = page_locked(parameter.data, runtime)
            else:
                parameter.data = parameter.data.to(runtime.device)
        move_factors(model, runtime.device)
        self._stream.attach(model.blocks)


_Key = tuple[str, torch.dtype]
"""A parameter's name in its block and its dtype: blocks in high precision and blocks in 8 bits have other buffers."""


class BlockStream:
    """Two sets of device buffers in the shape of a block, filled in turn.

    Args:
        blocks: a model's blocks; parameters of one name have one shape, and few dtypes.
        device: where they run.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        shapes: dict[_Key, torch.Tensor] = {}
        for block in blocks:
            for name, parameter in block.named_parameters():
                if not is_factor(name):
                    shapes.setdefault((name, parameter.dtype), parameter)
        self._buffers = [
            {key: nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
             for key, parameter in shapes.items()}
            for _ in range(2)
        ]
        self._holds: list[nn.Module | None] = [None, None]
        self._homes: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._module = torch.get_device_module(device) if device.type != "cpu" else None
        self._copies: Any = self._module.Stream(device) if self._module else None
        self._arrived: list[Any] = [None, None]
        # The buffers' memory may have been in use by computation that is still queued.
        self._used: list[Any] = [self._module.current_stream(device).record_event() if self._module else None] * 2
        self._turn = 0

    def attach(self, blocks: nn.ModuleList) -> None:
        """Run each block's methods with its weights on the device."""
        members = list(blocks)
        for index, block in enumerate(members):
            following = members[(index + 1) % len(members)]
            for method in _METHODS:
                setattr(block, method, self._wrapped(block, following, getattr(block, method)))

    def _wrapped(self, block: nn.Module, following: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        places = _places(block)
        self._homes[block] = {name: getattr(owner, leaf) for name, (owner, leaf) in places.items()}

        def hold(parameters: dict[str, nn.Parameter]) -> None:
            # Replaced, not re-pointed through .data: that is refused between some kinds of device.
            for name, (owner, leaf) in places.items():
                setattr(owner, leaf, parameters[name])

        def run(*args: Any, **kwargs: Any) -> Any:
            buffers = self._fetch(block)
            self._fetch(following, after=buffers)
            before = {name: getattr(owner, leaf) for name, (owner, leaf) in places.items()}
            hold({name: self._buffers[buffers][name, home.dtype] for name, home in self._homes[block].items()})
            try:
                return method(*args, **kwargs)
            finally:
                hold(before)  # one method may call the other
                if self._module:
                    self._used[buffers] = self._module.current_stream(self.device).record_event()

        return run

    def _fetch(self, block: nn.Module, after: int | None = None) -> int:
        """Return the buffers that hold ``block``'s weights, copying them there first if they are elsewhere.

        With ``after`` the copy is ahead of time: it goes to the other buffers, and nobody waits for it yet.
        """
        if block in self._holds:
            place = self._holds.index(block)
        else:
            place = self._turn if after is None else 1 - after
            self._copy(block, place)
            self._holds[place], self._turn = block, 1 - place
        if after is None and self._module and self._arrived[place] is not None:
            self._module.current_stream(self.device).wait_event(self._arrived[place])
        return place

    def _copy(self, block: nn.Module, place: int) -> None:
        sources = self._homes[block]
        if self._module is None:
            for name, value in sources.items():
                self._buffers[place][name, value.dtype].copy_(value)
            return
        with self._module.stream(self._copies):
            self._copies.wait_event(self._used[place])
            for name, value in sources.items():
                self._buffers[place][name, value.dtype].copy_(value, non_blocking=True)
            self._arrived[place] = self._copies.record_event()


def _places(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where each parameter hangs: its owner and its name there."""
    found = {}
    for name, _ in block.named_parameters():
        if is_factor(name):
            continue  # adapters are small and stay on the device
        path, _, leaf = name.rpartition(".")
        found[name] = (block.get_submodule(path), leaf)
    return found
