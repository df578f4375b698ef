"""The validation loss: the same clips, the same noise and the same spread of sigmas at every evaluation.

A training loss jumps with the sigmas it happens to draw; here sample ``j`` of ``N`` always gets the ``(j + 1/2) / N``
quantile of the expert's sigma distribution, so two evaluations differ only by the weights. Nothing random is consumed:
a run with evaluations trains bit for bit like one without.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.data.loader import MicroBatch, Schedule, build_loader
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.training.encoders import Encoders
from mindspeed_wan.training.objective import Objective
from mindspeed_wan.training.source import BatchSource
from mindspeed_wan.training.step import TrainStep, predict

STREAM = "validation"


class Validation:
    """Evaluates on the first ``eval_iters`` global batches of the data set, in file order.

    Args:
        config: the resolved configuration.
        step: model, groups and batch sizes.
        source: the run's data.
        encoders: the run's encoders.
    """

    def __init__(self, config: RunConfig, step: TrainStep, source: BatchSource, encoders: Encoders) -> None:
        self._config, self._step, self._source, self._encoders = config, step, source, encoders
        self._objective = Objective(config.diffusion, config.training.seed, stream=STREAM)
        self._batch = config.global_batch(step.groups.dims.world_size)

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the mean weighted loss over the evaluation samples. Collective."""
        step, size = self._step, self._config.training.micro_batch_size
        rounds = self._config.training.eval_iters
        step.model.eval()
        total = torch.zeros((), device=step.device)
        batches = islice(self._batches(), rounds * step.accumulation)
        for number, features in enumerate(self._encoders.stream(batches)):
            iteration, part = divmod(number, step.accumulation)
            first = iteration * self._batch + step.groups.dp_rank * step.samples_per_rank + part * size
            quantiles = (torch.arange(first, first + size, dtype=torch.float64) + 0.5) / (rounds * self._batch)
            noised = self._objective.add_noise(features.latents, features.keys,
                                               self._objective.distribution.from_uniform(quantiles))
            total += noised.losses(predict(step.model, noised.x, noised.timestep, features)).sum()
        step.model.train()
        total /= rounds * step.samples_per_rank
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return float(total)

    def _batches(self) -> Iterator[MicroBatch]:
        """A fresh pass over the data in file order; deterministic, so it can run in this very process."""
        training, data = self._config.training, self._source.data
        sampler = GlobalBatchSampler(len(data.dataset), training.seed, shuffle=False, shapes=data.dataset.shapes)
        groups = self._step.groups
        schedule = Schedule(global_batch_size=self._batch, micro_batch_size=training.micro_batch_size,
                            rank=groups.dp_rank, ranks=groups.dims.data)
        return build_loader(data.dataset, sampler, schedule)
