"""One job as the planner sees it: what runs, on what, cut how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from mindspeed_wan.lora.spec import DEFAULT_TARGETS, match_targets
from mindspeed_wan.models.quantization_spec import QuantizationSpec
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Param, parameter_table
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import Device

States = Literal["device", "host", "bytes"]
"""Where Adam's moments are: fp32 on the device or in host memory, or 8 bits each on the device."""
Kernels = Literal["cpu", "cuda", "npu"]
"""Whose norms, rotation and attention run (``platforms/ops.py``): they save different things for the backward pass."""

EightBits = Literal["fp8", "int8"]
"""How the linear layers of a frozen base are held."""

ELEMENT = {"fp32": 4, "bf16": 2}
"""Bytes of one number."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training or generation job.

    Attributes:
        latent: latent frames, height and width of a clip.
        dims: ranks; for generation ``dims.data`` is the videos and guidance branches that run at the same time.
        fsdp2: parameters are gathered block by block (bf16 training always is, over one rank if need be).
        recomputed: blocks that keep their input only, counted from the first.
        keep_attention: they keep the results of attention too, which then does not run again.
        offload: the inputs of recomputed blocks are in host memory between the passes.
        states: where the moments are.
        lora_rank: adapters of this rank on the default targets are trained, nothing else; 0 trains all weights.
        base: the linear layers of a frozen base, or of a generation's experts, are held in 8 bits; ``None`` is the
            compute type.
        encoders: VAE and text encoder run in the job (not with cached features).
        guidance: forward passes per step of a generation (2 with classifier-free guidance).
        cfg: guidance branches that run on ranks of their own (1 or 2).
        experts: experts that a generation keeps on the device; 0: their blocks come from the host one by one.
        experts_of_model: 2, or 1 for Wan2.1.
        patches: PipeFusion's pieces of the tokens after ``warmup`` whole steps of each expert; 1 is not PipeFusion.
    """

    model: WanConfig
    latent: tuple[int, int, int]
    device: Device
    dims: ParallelDims = field(default_factory=ParallelDims)
    training: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    fp32_residual: bool = False
    fsdp2: bool = True
    recomputed: int = 0
    keep_attention: bool = False
    offload: bool = False
    states: States = "device"
    fused_optimizer: bool = True
    micro_batch: int = 1
    accumulation: int = 1
    lora_rank: int = 0
    base: EightBits | None = None
    ema: bool = False
    encoders: bool = True
    text_encoder_on_host: bool = True
    kernels: Kernels = "cuda"
    guidance: int = 2
    cfg: int = 1
    experts: int = 1
    experts_of_model: int = 2
    steps: int = 40
    patches: int = 1
    warmup: int = 2

    def with_changes(self, **changes: Any) -> Job:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    @property
    def element(self) -> int:
        """Bytes of a number in the matrix products."""
        return ELEMENT[self.precision]

    @property
    def residual(self) -> int:
        """Bytes of a number in the residual stream."""
        return 4 if self.fp32_residual else self.element

    @property
    def wrapped(self) -> bool:
        """FSDP2 hooks are around the blocks; pipeline stages hold bf16 parameters themselves."""
        return self.fsdp2 or (self.training and self.precision == "bf16" and self.dims.pipeline == 1)

    @property
    def blocks(self) -> int:
        """Blocks on one rank: of the largest pipeline stage (an even split, the first stages take the remainder)."""
        return sum(-(-(self.model.num_layers - chunk * self.dims.pipeline) // self.chunks)
                   for chunk in range(self.dims.virtual))

    @property
    def chunks(self) -> int:
        """Runs of blocks along the model: virtual chunks of all stages."""
        return self.dims.pipeline * self.dims.virtual

    @property
    def tokens(self) -> int:
        """Tokens of one clip."""
        return self.model.num_tokens(self.latent)

    @property
    def local_tokens(self) -> int:
        """Tokens on one context rank, padding included, all clips of a micro-batch."""
        parts = self.dims.context * self.sequence_parts
        return -(-self.tokens // parts) * self.sequence_parts * self.micro_batch

    @property
    def sequence_parts(self) -> int:
        """Tensor ranks that share the tokens between tensor-parallel regions."""
        return self.dims.tensor if self.dims.sequence_parallel else 1

    @property
    def branches(self) -> int:
        """Guidance branches that one rank of a generation runs, one after the other."""
        return self.guidance // self.cfg

    @property
    def whole_steps(self) -> int:
        """Denoising steps whose passes are not cut into PipeFusion's patches."""
        return self.steps if self.patches == 1 else min(self.steps, self.warmup * self.experts_of_model)

    @property
    def takes_turns(self) -> bool:
        """A generation's experts are exchanged through host memory."""
        return self.experts == 1 < self.experts_of_model

    @property
    def clips_per_step(self) -> int:
        """Clips of one optimizer step (global batch)."""
        return self.micro_batch * self.accumulation * self.dims.data

    @cached_property
    def sizes(self) -> UnitSizes:
        """Element counts of the parameters on one rank."""
        return unit_sizes(self.model, self.dims.tensor, self.dims.shard_size if self.fsdp2 else 1)

    @cached_property
    def trained(self) -> UnitSizes:
        """Element counts of what is trained."""
        if not self.lora_rank:
            return self.sizes
        return lora_sizes(self.model, self.lora_rank, self.dims.tensor, self.dims.shard_size if self.fsdp2 else 1)

    @cached_property
    def base_bytes(self) -> UnitSizes:
        """Bytes of a base on one rank, as it is stored and gathered: in the compute type, or 8 bits."""
        return frozen_bytes(self.model, self.dims.tensor, self.dims.shard_size if self.fsdp2 else 1, self.element,
                            self.base)


@dataclass(frozen=True)
class UnitSizes:
    """Parameters on one rank (the first, which has the largest shards), elements: whole units, and their shards.

    ``block`` is one block after tensor parallelism, ``outside`` everything but blocks and head; ``shard`` is what the
    rank keeps of the whole model, ``whole`` what it would keep without FSDP2.
    """

    block: int
    outside: int
    head: int
    shard: int
    whole: int


def _local_shape(param: Param, tensor: int) -> tuple[int, ...]:
    shape = list(param.shape)
    if param.tp_axis is not None:
        shape[param.tp_axis] //= tensor
    return tuple(shape)


@lru_cache(maxsize=256)
def unit_sizes(model: WanConfig, tensor: int, shard: int) -> UnitSizes:
    """Return what one rank holds; FSDP2 cuts dim 0 into equal parts, rounded up."""
    block = outside = head = kept = 0
    for param in parameter_table(model.with_changes(num_layers=1)):
        shape = _local_shape(param, tensor)
        count, mine = math.prod(shape), -(-shape[0] // shard) * math.prod(shape[1:])
        if param.block is not None:
            block, kept = block + count, kept + model.num_layers * mine
        elif param.mm.startswith("head."):
            head, kept = head + count, kept + mine
        else:
            outside, kept = outside + count, kept + mine
    return UnitSizes(block, outside, head, kept, model.num_layers * block + outside + head)


@lru_cache(maxsize=64)
def lora_sizes(model: WanConfig, rank: int, tensor: int, shard: int) -> UnitSizes:
    """Return the adapters' elements: A [r, in] and B [out, r] per target; the side on the cut axis is cut too."""
    one_block = model.with_changes(num_layers=1)
    block = kept = 0
    for module in match_targets(DEFAULT_TARGETS, one_block).values():
        rows = module.out_features // (tensor if module.tp_axis == 0 else 1)
        columns = module.in_features // (tensor if module.tp_axis == 1 else 1)
        block += rank * (rows + columns)
        kept += -(-rank // shard) * columns + -(-rows // shard) * rank
    return UnitSizes(block, 0, 0, kept * model.num_layers, block * model.num_layers)


@lru_cache(maxsize=256)
def frozen_bytes(model: WanConfig, tensor: int, shard: int, element: int, base: EightBits | None) -> UnitSizes:
    """Return the bytes of the frozen base: ``element`` per value, but 1 for the linear layers of blocks where ``base``
    is given, and a fp32 scale per row of these; row-parallel ranks hold all scales."""
    sizes = unit_sizes(model, tensor, shard)
    found = {name: element * getattr(sizes, name) for name in ("block", "outside", "head", "shard", "whole")}
    layers = model.num_layers
    eight = [] if base is None else QuantizationSpec(f"{base}_weight_only").layers(
        model.with_changes(num_layers=1)).values()
    for param in eight:
        rows, columns = _local_shape(param, tensor)
        scales = 4 * rows
        saved = (element - 1) * columns
        found["block"] += scales - saved * rows
        found["whole"] += layers * (scales - saved * rows)
        found["shard"] += layers * -(-rows // shard) * (4 - saved)
    return UnitSizes(**found)
