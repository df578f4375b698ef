"""Exponential moving average of the weights, kept in fp32 on each rank's shard.

The average is of the masters, so it does not stall where bf16 cannot represent ``(1 - decay) * change``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """``average = decay * average + (1 - decay) * weight`` after each optimizer step.

    Args:
        weights: name -> fp32 local shard (``AdamW.masters()``); copied.
        decay: in [0, 1); effective decay of early steps is ``min(decay, (1 + n) / (10 + n))`` so that the average
            forgets the starting point (the warm-up of Polyak averaging that TensorFlow's EMA made common).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Take ``weights`` as the average (after weights alone were loaded)."""
        self.updates = 0
        for name, average in self.averages.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards ``weights``."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [weights[n] for n in self.averages], 1.0 - decay)
