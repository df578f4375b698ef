"""Learning rate and weight decay as pure functions of the samples consumed so far (nothing to save, nothing to resume).

The meanings are those of Megatron's ``OptimizerParamScheduler``, whose unit is samples: ``--lr-warmup-iters`` and
``--lr-decay-iters`` count iterations of one global batch. ``tests/unit/training/test_lr_schedule.py`` compares both
classes over every style. The class is our own because Megatron's needs an optimizer to write into, starts a 2.7 s
import, and is not installable on macOS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mindspeed_wan.errors import ConfigError

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
AnnealStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]
IncreaseStyle = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, decay and weight-decay increase; every ``*_samples`` field counts samples
    (fractional when a flag gives a fraction).

    ``wsd_samples`` is the length of the final anneal of the WSD style (warm-up, stable, decay), which ends at
    ``decay_samples``.
    """

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    warmup_samples: float = 0
    decay_samples: float
    decay_style: DecayStyle = "linear"
    wsd_samples: float = 0
    wsd_style: AnnealStyle = "exponential"
    start_weight_decay: float = 0.01
    end_weight_decay: float = 0.01
    weight_decay_style: IncreaseStyle = "constant"
    weight_decay_samples: float | None = None

    def __post_init__(self) -> None:
        """Refuse what Megatron asserts on, with the flags' names."""
        if not 0.0 <= self.min_lr <= self.max_lr:
            raise ConfigError(f"--min-lr {self.min_lr} must lie in [0, --lr {self.max_lr}]")
        if self.init_lr > self.max_lr:
            raise ConfigError(f"--lr-warmup-init {self.init_lr} is above --lr {self.max_lr}")
        if self.decay_samples <= 0:
            raise ConfigError("the learning rate decays over 0 samples", fix="set --train-iters or --lr-decay-iters")
        if self.warmup_samples >= self.decay_samples:
            raise ConfigError(
                f"warm-up of {self.warmup_samples} samples does not end before the decay at {self.decay_samples}",
                fix="lower --lr-warmup-iters / --lr-warmup-fraction or raise --lr-decay-iters",
            )
        if self.decay_style == "WSD" and not 0 < self.wsd_samples <= self.decay_samples:
            raise ConfigError("--lr-decay-style WSD needs --lr-wsd-decay-iters between 1 and the decay length")
        if self.weight_decay_style == "constant" and self.start_weight_decay != self.end_weight_decay:
            raise ConfigError("--start-weight-decay differs from --end-weight-decay with a constant style",
                              fix="set --weight-decay-incr-style linear or cosine")

    def learning_rate(self, consumed: int) -> float:
        """Return the rate of the iteration that starts after ``consumed`` samples."""
        if self.warmup_samples > 0 and consumed <= self.warmup_samples:
            return self.init_lr + (self.max_lr - self.init_lr) * consumed / self.warmup_samples
        if self.decay_style == "constant":
            return self.max_lr
        if consumed > self.decay_samples:
            return self.min_lr
        if self.decay_style == "inverse-square-root":
            rate = self.max_lr * math.sqrt(max(self.warmup_samples, 1)) / math.sqrt(max(consumed, 1))
            return max(self.min_lr, rate)
        return self.min_lr + self._decay_factor(consumed) * (self.max_lr - self.min_lr)

    def weight_decay(self, consumed: int) -> float:
        """Return the weight decay of the iteration that starts after ``consumed`` samples."""
        length = self.weight_decay_samples or self.decay_samples
        if self.weight_decay_style == "constant" or consumed > length:
            return self.end_weight_decay
        ratio = consumed / length
        if self.weight_decay_style == "cosine":
            ratio = 0.5 * (math.cos(math.pi * (1.0 - ratio)) + 1.0)
        return self.start_weight_decay + ratio * (self.end_weight_decay - self.start_weight_decay)

    def _decay_factor(self, consumed: int) -> float:
        if self.decay_style == "WSD":
            return self._anneal_factor(consumed)
        ratio = (consumed - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        if self.decay_style == "linear":
            return 1.0 - ratio
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)

    def _anneal_factor(self, consumed: int) -> float:
        start = self.decay_samples - self.wsd_samples
        if consumed <= start:
            return 1.0
        ratio = (consumed - start) / self.wsd_samples
        if self.wsd_style == "linear":
            return 1.0 - ratio
        if self.wsd_style == "cosine":
            return 0.5 * (math.cos(math.pi * ratio) + 1.0)
        if self.wsd_style == "minus_sqrt":
            return 1.0 - math.sqrt(ratio)
        return 2.0 * math.pow(0.5, ratio) - 1.0
