"""From a configuration to a DiT on ranks with weights in it. No rank ever holds the whole expert.

The model is built on the meta device (shapes only), cut by tensor parallelism and FSDP2, and only then given memory;
weights are read (``checkpoint.weights``), or drawn, one local shard at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.quantization import QuantizedView, weight_views
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.layers import Layers, LocalLayers, MegatronLayers
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.parallelize import parallelize
from mindspeed_wan.models.wan.views import local_slices
from mindspeed_wan.parallel.attention import make_attention
from mindspeed_wan.parallel.fsdp2 import Fsdp2Config
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.pipeline import PipelinePlan
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.parallel.tokens import TokenSharding
from mindspeed_wan.platforms.base import Platform

DRAW_ELEMENTS = 1 << 20
"""Random weights are drawn in runs of whole rows of about this many elements, each from a generator of its own."""


def build_wan(
    config: WanConfig,
    *,
    groups: ParallelGroups | None = None,
    platform: Platform,
    param_dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    fsdp2: Fsdp2Config | None = None,
    recompute: RecomputePlan | None = None,
    compile_blocks: bool = False,
    modify: Callable[[WanDiT], None] | None = None,
    device: torch.device | None = None,
    pipeline: PipelinePlan | None = None,
    ulysses_chunks: int = 1,
) -> WanDiT:
    """Build a DiT on this rank; its parameters are allocated but *not* initialised: load or draw weights next.

    Args:
        groups: the layout; ``None`` is one rank.
        param_dtype: dtype of the stored parameters (fp32 masters under FSDP2's mixed precision, bf16 for inference).
        residual_dtype: see ``WanDiT``.
        fsdp2: shard with FSDP2 as this file section says; its ``recompute_modules`` apply when ``recompute`` is None.
        modify: called with the model on the meta device before it is sharded (LoRA adds its adapters here).
        device: where parameters live; default the platform's device (the host with FSDP2's CPU offload).
        ulysses_chunks: groups of heads whose exchange overlaps attention.
        pipeline: which blocks each stage holds; default an even split over the stages of ``groups``.

    Raises:
        ConfigError: sizes of the model and of the layout do not fit.
    """
    groups = groups or ParallelGroups()
    groups.dims.validate(num_heads=config.num_heads, ffn_dim=config.ffn_dim)
    dims = groups.dims
    if dims.pipeline > 1:
        pipeline = pipeline or PipelinePlan.even(config.num_layers, dims.pipeline, dims.virtual)
        if fsdp2 is not None:
            raise ConfigError("FSDP2 does not combine with pipeline stages", fix="use one of the two")
    sequence_group = groups.tp if groups.dims.sequence_parallel else None
    with torch.device("meta"):
        model = WanDiT(
            config,
            layers=_layers(config, groups, param_dtype),
            tokens=TokenSharding(groups.cp, sequence_group),
            attend=make_attention(groups, ulysses_chunks),
            residual_dtype=residual_dtype,
            compute_dtype=None if pipeline is None else param_dtype,  # a later stage has no embedding to ask
            chunks=None if pipeline is None else pipeline.chunks(groups.pp_rank),
        ).to(param_dtype)
        if modify is not None:
            modify(model)
    patterns = tuple(getattr(fsdp2, "recompute_modules", ()))
    if recompute is None and patterns:
        recompute = RecomputePlan(patterns=patterns)
    parallelize(
        model, groups=groups, platform=platform, recompute=recompute, compile_blocks=compile_blocks, fsdp2=fsdp2
    )
    if device is None:
        on_host = fsdp2 is not None and fsdp2.offload_to_cpu
        device = torch.device("cpu") if on_host else platform.device()
    return model.to_empty(device=device)


def _layers(config: WanConfig, groups: ParallelGroups, param_dtype: torch.dtype) -> Layers:
    if groups.tp is None:
        return LocalLayers()
    return MegatronLayers(
        config, groups.tp, sequence_parallel=groups.dims.sequence_parallel, param_dtype=param_dtype
    )


@torch.no_grad()
def init_weights(model: WanDiT, seed: int, groups: ParallelGroups | None = None) -> None:
    """Draw the official initial weights. They depend on (seed, name) only, never on the layout.

    As in Wan's ``init_weights``: linears Xavier-uniform, text and time embedding normal(0.02), modulation
    normal(1/sqrt(D)), norms 1, biases 0, output projection 0 (an untrained model predicts zero).
    """
    for name, view in weight_views(model, groups).items():
        if isinstance(view, QuantizedView):
            rows = torch.empty(view.rows.stop - view.rows.start, view.shape[1])
            _init_shard(rows, name, tuple(view.shape), (view.rows, slice(0, view.shape[1])), seed)
            view.fill(rows)
            continue
        local, index = local_slices(view)
        if local.numel():
            _init_shard(local, name, tuple(view.shape), index, seed)


def _init_shard(local: Tensor, name: str, shape: tuple[int, ...], index: tuple[slice, ...], seed: int) -> None:
    draw = _distribution(name, shape)
    if isinstance(draw, float):
        local.fill_(draw)
        return
    rows, row_elements = index[0], math.prod(shape[1:])
    step = max(1, DRAW_ELEMENTS // row_elements)
    for first in range(rows.start // step * step, rows.stop, step):
        count = min(step, shape[0] - first)
        run = draw((count, *shape[1:]), _generator(seed, name, first))
        low, high = max(rows.start, first), min(rows.stop, first + count)
        local[low - rows.start : high - rows.start].copy_(run[(slice(low - first, high - first), *index[1:])])


def _generator(seed: int, name: str, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _distribution(name: str, shape: tuple[int, ...]) -> float | Draw:
    """Return a constant, or a function that draws a run of rows."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("bias", "emb_pos") or name.startswith("head.head."):
        return 0.0
    if len(shape) == 1:
        return 1.0  # norm weights
    if leaf == "modulation":
        return _normal(shape[-1] ** -0.5)
    if name.startswith(("text_embedding.", "time_embedding.")):
        return _normal(0.02)
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
    return lambda size, generator: torch.rand(size, generator=generator).mul_(2 * bound).sub_(bound)


def _normal(std: float) -> Draw:
    return lambda size, generator: torch.randn(size, generator=generator).mul_(std)
