"""The layers that differ between one device and tensor parallelism. The model is written against ``Layers`` only.

``LocalLayers`` is torch.nn. ``MegatronLayers`` is Megatron-Core's Column/RowParallelLinear with our own mappings
around them: one all-gather (sequence parallel) or one backward all-reduce serves q, k and v together, where Megatron's
column layers would each do their own, and none of them loses the gradient of a non-contiguous tensor.

Tokens between two tensor-parallel regions are ``[L, B, D]`` on every tensor rank, or ``[L/tp, B, D]`` under sequence
parallelism; inside a region a rank has all L tokens and 1/tp of the heads or hidden channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.parallel.mappings import copy_to_group, gather_for_tensor_region, sum_over_group
from mindspeed_wan.platforms import ops


class HeadNorm(nn.Module):
    """RMSNorm of q or k over the channels of *all* heads; this rank holds the weights of its own heads."""

    def __init__(self, dim: int, eps: float, tensor_size: int = 1) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim // tensor_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[L, B, dim]`` held whole."""
        return ops.rms_norm(x, self.weight, self.eps)


class Layers(Protocol):
    """Makes the linear layers and norms of a block, and moves activations into and out of their reach."""

    tensor_size: int
    """Ranks that share each weight."""
    sequence_parallel: bool
    """Tokens between regions are split over the tensor ranks."""

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer with bias whose outputs are split over the tensor ranks."""
        ...

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer with bias that takes what ``column`` layers give and sums over the tensor ranks."""
        ...

    def head_norm(self, dim: int, eps: float) -> HeadNorm:
        """Return the norm of q or k."""
        ...

    def normalize(self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Apply each norm to its input, with one collective for all of them."""
        ...

    def normalize_and_turn(
        self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """Apply each norm to its input and the rotary embedding to the result: ``[L, B, N * d] -> [L, B, N, d]``."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Hand tokens to ``column`` layers."""
        ...

    def share(self, x: Tensor) -> Tensor:
        """Hand a tensor that all tensor ranks hold whole (text) to ``column`` layers."""
        ...

    def share_with_tokens(self, x: Tensor) -> Tensor:
        """Hand a tensor that all tensor ranks hold whole (modulation) to element-wise maths on tokens."""
        ...


class LocalLayers:
    """One device: everything is whole."""

    tensor_size = 1
    sequence_parallel = False

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """Return ``nn.Linear``."""
        return nn.Linear(in_features, out_features)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """Return ``nn.Linear``."""
        return nn.Linear(in_features, out_features)

    def head_norm(self, dim: int, eps: float) -> HeadNorm:
        """Return the norm of q or k."""
        return HeadNorm(dim, eps)

    def normalize(self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Apply each norm to its input."""
        return [norm(x) for norm, x in zip(norms, inputs)]

    def normalize_and_turn(
        self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """Apply norm and rotation in one operation."""
        return [ops.rms_norm_rotary(x, norm.weight, norm.eps, cos, sin) for norm, x in zip(norms, inputs)]

    def enter(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def share(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def share_with_tokens(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class MegatronLayers:
    """Megatron-Core's tensor-parallel layers on the group of parallel_state.

    Args:
        config: sizes of the model.
        group: tensor-parallel group (more than one rank).
        sequence_parallel: keep tokens split over ``group`` between regions.
        param_dtype: dtype the parameters are created in.
    """

    def __init__(
        self, config: WanConfig, group: dist.ProcessGroup, *, sequence_parallel: bool, param_dtype: torch.dtype
    ) -> None:
        self.group = group
        self.tensor_size = group.size()
        self.sequence_parallel = sequence_parallel
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron speaks of kernels and graphs that are not used here
            # Column layers get tokens that `enter` has already assembled: sequence parallelism is off for them.
            self._column_config = self._megatron_config(config, param_dtype, sequence_parallel=False)
            self._row_config = self._megatron_config(config, param_dtype, sequence_parallel=sequence_parallel)

    def _megatron_config(self, config: WanConfig, param_dtype: torch.dtype, *, sequence_parallel: bool) -> Any:
        from megatron.core.transformer.transformer_config import TransformerConfig

        return TransformerConfig(
            num_layers=config.num_layers,
            hidden_size=config.dim,
            ffn_hidden_size=config.ffn_dim,
            num_attention_heads=config.num_heads,
            tensor_model_parallel_size=self.tensor_size,
            sequence_parallel=sequence_parallel,
            params_dtype=param_dtype,
            use_cpu_initialization=True,  # create parameters on the ambient device (meta), not on cuda
            perform_initialization=False,  # weights are loaded, or drawn by the provider
        )

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """Return a ColumnParallelLinear; ``enter`` or ``share`` does its communication."""
        column, _ = _megatron_linears()
        return column(in_features, out_features, config=self._column_config, init_method=_no_init,
                      disable_grad_reduce=True)  # fmt: skip

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """Return a RowParallelLinear (all-reduce, or reduce-scatter along the tokens)."""
        _, row = _megatron_linears()
        return row(in_features, out_features, config=self._row_config, init_method=_no_init, bias=True,
                   input_is_parallel=True, skip_bias_add=False)  # fmt: skip

    def head_norm(self, dim: int, eps: float) -> HeadNorm:
        """Return the norm with the weights of this rank's heads."""
        return HeadNorm(dim, eps, self.tensor_size)

    def normalize(self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Normalise over all heads: the sums of squares (one fp32 per token and input) are added over the ranks."""
        squares = [x.float().square().sum(-1, keepdim=True) for x in inputs]
        totals = sum_over_group(torch.cat(squares), self.group).split([s.shape[0] for s in squares])
        return [
            (x.float() * torch.rsqrt(total / norm.dim + norm.eps) * norm.weight.float()).to(x.dtype)
            for norm, x, total in zip(norms, inputs, totals)
        ]

    def normalize_and_turn(
        self, norms: Sequence[HeadNorm], inputs: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """Normalise over all heads, then turn this rank's."""
        heads = (x.unflatten(-1, (-1, cos.shape[-1])) for x in self.normalize(norms, inputs))
        return [ops.rotary(x, cos, sin) for x in heads]

    def enter(self, x: Tensor) -> Tensor:
        """``[L/tp, B, D] -> [L, B, D]`` (backward: reduce-scatter), or identity (backward: all-reduce)."""
        return gather_for_tensor_region(x, self.group) if self.sequence_parallel else copy_to_group(x, self.group)

    def share(self, x: Tensor) -> Tensor:
        """Identity; backward: all-reduce, because each rank's heads see only their part of the gradient."""
        return copy_to_group(x, self.group)

    def share_with_tokens(self, x: Tensor) -> Tensor:
        """Identity; backward: all-reduce under sequence parallelism, where each rank sees only its tokens."""
        return copy_to_group(x, self.group) if self.sequence_parallel else x


def _no_init(weight: Tensor) -> None:
    """Megatron asks for an initialisation even when it is told not to perform one."""


@lru_cache(maxsize=1)
def _megatron_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return Megatron's linears as ordinary modules: one tensor out, and no ``_extra_state`` in the state dict.

    Made on first use: importing Megatron costs seconds, and a laptop need not have it.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class ColumnLinear(ColumnParallelLinear):
        get_extra_state = nn.Module.get_extra_state

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class RowLinear(RowParallelLinear):
        get_extra_state = nn.Module.get_extra_state

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return ColumnLinear, RowLinear
