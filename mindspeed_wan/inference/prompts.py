"""Prompts to text states: where UMT5 runs, how it is sharded, and when its memory is given back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_wan.inference.runtime import DTYPES, Runtime
from mindspeed_wan.inference.sources import ModelFolder
from mindspeed_wan.models.quantization import check_device, quantize_linears, weight_bytes
from mindspeed_wan.models.quantization_spec import QuantizationSpec
from mindspeed_wan.models.text_encoder import TextEncoder

_ROOM = 1.2
"""Free device memory asked for, in multiples of the encoder's weights."""


class PromptEncoder:
    """Text states of prompts, remembered on the host.

    Without ``t5_fsdp`` only the replica's first rank holds UMT5 and sends the states to the others: they are the same
    on every rank, and eight ranks do not read 11 GB each.

    Args:
        device: ``device``, ``cpu``, or ``auto``: on the device while encoding if it fits there.
        quantization: hold the linear layers in 8 bits.
    """

    def __init__(
        self, folder: ModelFolder, runtime: Runtime, *, dtype: str, device: str, max_length: int, clean: bool,
        quantization: QuantizationSpec | None = None,
    ) -> None:
        self._folder, self._runtime = folder, runtime
        self._dtype, self._device = DTYPES[dtype], device
        self._max_length, self._clean, self._quantization = max_length, clean, quantization
        self._encoder: TextEncoder | None = None
        self._known: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the states [L_i, text_dim] of each prompt on the runtime's device. Collective over the replica."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        if missing:
            states = self._sharded(missing) if self._is_sharded else self._runtime.lead(lambda: self._whole(missing))
            self._known.update(zip(missing, states))
        return [self._known[prompt].to(self._runtime.device) for prompt in prompts]

    def release(self) -> None:
        """Drop the encoder's weights; states that are known stay. A later new prompt loads it again."""
        self._encoder = None
        self._runtime.platform.empty_cache()

    @property
    def _is_sharded(self) -> bool:
        return self._runtime.layout.t5_fsdp and self._runtime.replica_group is not None

    def _whole(self, prompts: list[str]) -> list[Tensor]:
        encoder = self._load("cpu")
        device = self._runtime.device if self._fits(encoder) else torch.device("cpu")
        if self._quantization is not None:
            check_device(self._quantization.mode, device)
        encoder.to(device)
        states = self._run(encoder, prompts)
        if self._device == "auto" and device.type != "cpu":
            encoder.to("cpu")
            self._runtime.platform.empty_cache()
        return states

    def _sharded(self, prompts: list[str]) -> list[Tensor]:
        if self._encoder is None:
            encoder = self._runtime.agree(lambda: self._load("cpu"))
            _shard(encoder, self._runtime)
        assert self._encoder is not None
        return self._run(self._encoder, prompts)

    def _run(self, encoder: TextEncoder, prompts: list[str]) -> list[Tensor]:
        return [state.cpu() for state in encoder.encode(prompts, self._max_length, clean=self._clean)]

    def _load(self, device: str) -> TextEncoder:
        if self._encoder is None:
            self._encoder = TextEncoder.from_pretrained(
                self._folder.text_encoder, self._dtype, device, tokenizer=self._folder.tokenizer
            )
            if self._quantization is not None:
                quantize_linears(self._encoder.model, self._quantization)
        return self._encoder

    def _fits(self, encoder: TextEncoder) -> bool:
        if self._device != "auto" or self._runtime.platform.device_type == "cpu":
            return self._device != "cpu"
        return self._runtime.platform.free_memory_bytes() > _ROOM * weight_bytes(encoder.model)


def _shard(encoder: TextEncoder, runtime: Runtime) -> None:
    """Shard UMT5's blocks with FSDP2 over the replica; each rank keeps its rows, the files being memory-mapped."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(runtime.replica_group, runtime.platform.device_type)
    for block in encoder.model.encoder.block:
        fully_shard(block, mesh=mesh)
    fully_shard(encoder.model, mesh=mesh)
