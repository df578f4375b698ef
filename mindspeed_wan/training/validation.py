"""The validation loss: the same clips, the same noise and the same spread of sigmas at every evaluation.

A training loss jumps with the sigmas it happens to draw; here sample ``j`` of ``N`` always gets the ``(j + 1/2) / N``
quantile of the expert's sigma distribution, so two evaluations differ only by the weights. Nothing random is consumed:
a run with evaluations trains bit for bit like one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.objective import Objective
from mindspeed_wan.training.step import TrainStep

STREAM = "validation"


class Validation:
    """Evaluates on the first ``eval_iters`` global batches of the data set, in file order.

    Args:
        config: the resolved configuration.
        step: model, groups and batch sizes.
        features: returns the first so many evaluation micro-batches of this rank.
    """

    def __init__(self, config: RunConfig, step: TrainStep, features: Callable[[int], Iterator[Features]]) -> None:
        self._config, self._step, self._features = config, step, features
        self._objective = Objective(config.diffusion, config.training.seed, stream=STREAM)
        self._batch = config.global_batch(step.groups.dims.world_size)

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the mean weighted loss over the evaluation samples. Collective."""
        step, size = self._step, self._config.training.micro_batch_size
        rounds = self._config.training.eval_iters
        step.model.eval()
        total = torch.zeros((), device=step.device)
        features = self._features(rounds * step.accumulation)
        for iteration in range(rounds):
            batches = []
            for part, batch in enumerate(islice(features, step.accumulation)):
                first = iteration * self._batch + step.groups.dp_rank * step.samples_per_rank + part * size
                quantiles = (torch.arange(first, first + size, dtype=torch.float64) + 0.5) / (rounds * self._batch)
                batches.append((batch, self._objective.add_noise(batch.latents, batch.keys,
                                                                 self._objective.distribution.from_uniform(quantiles))))
            total += step.evaluate(batches)
        step.model.train()
        return float(step.job_mean(total / (rounds * step.samples_per_rank)))
