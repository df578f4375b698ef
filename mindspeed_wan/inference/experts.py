"""The experts of a model on this rank, and who is on the device when.

``Experts.use(name)`` returns a DiT that is ready to run. How it got ready is the memory mode's business:

- ``resident``: every expert has its own model on the device.
- ``sequential``: one model on the device; page-locked copies of the experts on the host are copied into it at the
  switch. The low expert's files are read in the background while the high expert's first video runs.
- ``block``: models on the host; a block's weights come to the device just before it runs (``block_stream``).

Each rank reads only its own slices of the files, in every mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from mindspeed_wan.checkpoint.sources import check_names_and_shapes, open_weights
from mindspeed_wan.checkpoint.stored import local_box, read_quantized
from mindspeed_wan.checkpoint.weights import checked, read_weights
from mindspeed_wan.errors import ResourceError
from mindspeed_wan.inference.runtime import Runtime
from mindspeed_wan.inference.sources import ModelFolder
from mindspeed_wan.models.quantization import (
    Change,
    QuantizedView,
    check_device,
    quantize_layers,
    scale_bits,
    weight_views,
)
from mindspeed_wan.models.quantization_spec import SCALE_SUFFIX, QuantizationSpec
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.dtensor import local


@dataclass(frozen=True)
class InferenceFsdp2:
    """FSDP2 for a model that only runs forward: one unit per block, the next one gathered ahead."""

    sub_modules_to_wrap: tuple[str, ...] = ("blocks.{*}",)
    ignored_modules: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    num_to_forward_prefetch: int = 1
    num_to_backward_prefetch: int = 0
    offload_to_cpu: bool = False
    pin_memory: bool = True


class Experts(Protocol):
    """Gives the DiT of an expert, ready to run on the device."""

    def use(self, name: str) -> WanDiT:
        """Return the expert's model; the one returned before may no longer be valid."""

    def loaded(self) -> None:
        """Wait for reading that goes on in the background."""

    def exchange(self, adapters: Adapters | None) -> None:
        """Take the adapters off and put others on."""


class Adapters(Protocol):
    """Low-rank updates of each expert (``inference.adapters.ExpertAdapters``)."""

    merge: bool

    def change(self, expert: str) -> Change | None:
        """Return what merging adds to the expert's weights while they are read (before they are rounded to 8 bits)."""

    def attach(self, model: WanDiT, expert: str) -> None:
        """Put the expert's adapters on the model, or merge them into its weights."""

    def detach(self, model: WanDiT) -> None:
        """Take off what ``attach`` put on."""


def open_experts(
    folder: ModelFolder, runtime: Runtime, *, dtype: torch.dtype, memory: str, compile_blocks: bool = False,
    adapters: Adapters | None = None, quantization: QuantizationSpec | None = None,
) -> Experts:
    """Load the experts of ``folder`` in a memory mode (``resident``, ``sequential`` or ``block``). Collective.

    Args:
        dtype: of the weights; the residual stream is fp32 as in the official model.
        compile_blocks: ``torch.compile`` each block.
        adapters: attached to each expert once its weights are in the model.
        quantization: hold the blocks' linear layers in 8 bits; they are rounded as they are read, one at a time.

    Raises:
        CheckpointError: on every rank of the replica, when weights do not fit.
        ConfigError: quantisation the device cannot do.
    """
    if quantization is not None:
        check_device(quantization.mode, runtime.device)
    for found in folder.experts.values():
        runtime.agree(lambda found=found: checked(found))  # type: ignore[misc]

    sharding: Any = InferenceFsdp2() if runtime.layout.dit_fsdp else None

    def build(device: torch.device) -> WanDiT:
        model = build_wan(
            folder.config, groups=runtime.groups, platform=runtime.platform, param_dtype=dtype,
            residual_dtype=torch.float32, fsdp2=sharding,
            compile_blocks=compile_blocks, device=device,
            modify=None if quantization is None else partial(_quantize, spec=quantization),
        )
        return model.requires_grad_(False).eval()

    def load(name: str, model: WanDiT) -> WanDiT:
        change = adapters.change(name) if adapters is not None and quantization is not None else None
        views = weight_views(model, runtime.groups, change=change)
        runtime.agree(lambda: read_weights(folder.experts[name], views, folder.config))
        return model

    def adapted(name: str, model: WanDiT) -> WanDiT:
        load(name, model)
        if adapters is not None:
            adapters.attach(model, name)
        return model

    names = tuple(folder.experts)
    if memory == "block":
        from mindspeed_wan.inference.block_stream import StreamedExperts

        return StreamedExperts({name: adapted(name, build(torch.device("cpu"))) for name in names}, runtime,
                               adapters)
    if memory == "sequential" and len(names) > 1:
        merged = adapters is not None and adapters.merge
        return SwappedExperts(folder, build(runtime.device), runtime, load=adapted if merged else load,
                              ahead=not merged, adapters=None if merged else adapters)
    return ResidentExperts({name: adapted(name, build(runtime.device)) for name in names}, adapters)


def _quantize(model: WanDiT, spec: QuantizationSpec) -> None:
    quantize_layers(model, spec)


class ResidentExperts:
    """Every expert has a model on the device."""

    def __init__(self, models: dict[str, WanDiT], adapters: Adapters | None = None) -> None:
        self.models, self._adapters = models, adapters

    def use(self, name: str) -> WanDiT:
        """Return the expert's model."""
        return self.models[name]

    def loaded(self) -> None:
        """Nothing is read in the background."""

    def exchange(self, adapters: Adapters | None) -> None:
        """Take the adapters off and put others on."""
        for name, model in self.models.items():
            if self._adapters is not None:
                self._adapters.detach(model)
            if adapters is not None:
                adapters.attach(model, name)
        self._adapters = adapters


class SwappedExperts:
    """One model on the device, whose parameters take the values of the expert in use.

    The parameters' storage never moves, so nothing is reallocated and FSDP2's shards work the same way.

    Args:
        slot: the model on the device, without weights yet.
        load: reads (and modifies) an expert's weights in a model.
        ahead: read the later experts in the background, straight to the host; else one by one through the slot.
        adapters: put on the slot for the expert that is in it.
    """

    def __init__(
        self, folder: ModelFolder, slot: WanDiT, runtime: Runtime, *, load: Callable[[str, WanDiT], WanDiT],
        ahead: bool, adapters: Adapters | None = None,
    ) -> None:
        self._folder, self._slot, self._runtime, self._adapters = folder, slot, runtime, adapters
        self._parameters = dict(slot.named_parameters())
        self._views = weight_views(slot, runtime.groups)
        self._hosts: dict[str, dict[str, torch.Tensor]] = {}
        first, *rest = folder.experts
        self._reader: _Background | None = _Background(partial(self._read_all, rest if ahead else []))
        for name in (first,) if ahead else (*rest, first):
            load(name, slot)
            self._hosts[name] = {
                key: page_locked(local(parameter).detach().to("cpu", copy=True), runtime)
                for key, parameter in self._parameters.items()
            }
        self._active = first
        if adapters is not None:
            adapters.attach(slot, first)

    def use(self, name: str) -> WanDiT:
        """Return the model with the expert's weights in it."""
        if name != self._active:
            self.loaded()
            if self._adapters is not None:
                self._adapters.detach(self._slot)
            with torch.no_grad():
                for key, parameter in self._parameters.items():
                    local(parameter).copy_(self._hosts[name][key], non_blocking=True)
            self._active = name
            if self._adapters is not None:
                self._adapters.attach(self._slot, name)
        return self._slot

    def loaded(self) -> None:
        """Wait until every expert is on the host; raises what reading raised."""
        if self._reader is not None:
            self._runtime.agree(self._reader.result)
            self._reader = None

    def exchange(self, adapters: Adapters | None) -> None:
        """Take the adapters off and put others on."""
        if self._adapters is not None:
            self._adapters.detach(self._slot)
        if adapters is not None:
            adapters.attach(self._slot, self._active)
        self._adapters = adapters

    def _read_all(self, names: list[str]) -> None:
        for name in names:
            self._read(name)

    def _read(self, name: str) -> None:
        """Read this rank's slices of an expert to the host, cut as the slot's parameters are."""
        views = self._views
        host: dict[str, torch.Tensor] = {}
        with open_weights(self._folder.experts[name], self._folder.config) as files:
            config = self._folder.config
            check_names_and_shapes(files, {param.mm: param.shape for param in parameter_table(config)}, config)
            for key, view in views.items():
                if isinstance(view, QuantizedView):
                    codes, scales = read_quantized(files, key, view) or _nothing(view)
                    host[key] = page_locked(codes.view(torch.int8), self._runtime)
                    host[key + SCALE_SUFFIX] = page_locked(scale_bits(scales), self._runtime)
                    continue
                box, shard = local_box(view), local(view)
                value = torch.empty(shard.shape, dtype=shard.dtype)
                if box is not None:
                    value.copy_(files.read(key, box))
                host[key] = page_locked(value, self._runtime)
        self._hosts[name] = host


class _Background:
    """A function in a thread; ``result`` waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as failure:  # handed to the thread that asks for the result
            self._failure = failure

    def result(self) -> None:
        """Wait for the end."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def _nothing(view: QuantizedView) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank holds of a weight whose rows are all elsewhere (uneven FSDP2 shards)."""
    return torch.empty(local(view.codes).shape, dtype=torch.int8), torch.empty(local(view.scales).shape)


def page_locked(tensor: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Return the tensor in page-locked memory, from which copies to the device run at full speed and asynchronously.

    Raises:
        ResourceError: the host has no memory left for it.
    """
    if runtime.platform.device_type == "cpu":
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        raise ResourceError(f"the host cannot hold a page-locked copy of an expert: {error}",
                            fix="use --memory resident with more ranks, or --dit_fsdp") from None
