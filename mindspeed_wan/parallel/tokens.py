"""The token axis over ranks: pad and split it once after patchify, gather it once before unpatchify.

Token dim is 0. A video of L tokens is padded with zeros to a multiple of all ranks that share it, so the resolution
a user may ask for never depends on the layout. Padded keys are not attended to, padded outputs are dropped.

Gradients: every rank computes the same loss from the gathered output, and each context rank's parameter gradient
covers its own tokens only. ``gather`` scales the gradient by the context size, so that the *mean* over data and
context ranks, which FSDP2 and ``finish_grads`` take, is the gradient of the loss. Tensor ranks under sequence
parallelism get unscaled parts, which ``finish_grads`` adds up.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.parallel.groups import group_rank, group_size
from mindspeed_wan.parallel.mappings import gather_tokens


class TokenSharding:
    """Cuts the token axis over the context ranks and, under sequence parallelism, then over the tensor ranks.

    Args:
        group: context-parallel group, or ``None``.
        sequence_group: tensor-parallel group when sequence parallelism is on, else ``None``.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, sequence_group: dist.ProcessGroup | None = None
    ) -> None:
        self.group, self.sequence_group = group, sequence_group

    @property
    def parts(self) -> int:
        """Ranks that share the tokens of one video."""
        return group_size(self.group) * group_size(self.sequence_group)

    def padded(self, length: int) -> int:
        """Return ``length`` rounded up to a multiple of ``parts``."""
        return -(-length // self.parts) * self.parts

    def split(self, x: Tensor) -> Tensor:
        """Return this rank's tokens: ``[L, ...] -> [padded(L) / parts, ...]``."""
        return _slice(self.split_context(x), self.sequence_group)

    def split_context(self, x: Tensor) -> Tensor:
        """Return this context rank's tokens, whole on every tensor rank: ``[L, ...] -> [padded(L) / context, ...]``.

        Attention works on these (its heads, not its tokens, are split over tensor ranks), so rotary tables use it.
        """
        missing = self.padded(x.shape[0]) - x.shape[0]
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        return _slice(x, self.group)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Return all tokens without padding on every rank: ``[padded(L) / parts, ...] -> [L, ...]``."""
        x = gather_tokens(x, self.sequence_group)
        x = gather_tokens(x, self.group, grad_scale=float(group_size(self.group)))
        return x[:length]


def _slice(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else x.chunk(group_size(group))[group_rank(group)]
