"""The validation loss: the same clips, the same noise and the same spread of sigmas at every evaluation.

A training loss jumps with the sigmas it happens to draw; here sample ``j`` of ``N`` always gets the ``(j + 1/2) / N``
quantile of the expert's sigma distribution, so two evaluations differ only by the weights. Nothing random is consumed:
a run with evaluations trains bit for bit like one without.

Every sample's loss is gathered and averaged in one place in a fixed order, so the number does not depend on how the
samples were spread over data ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.objective import Noised, Objective
from mindspeed_wan.training.step import TrainStep

STREAM = "validation"
PARTS = 4
"""The loss is also reported per quarter of the samples, in order of sigma."""


@dataclass(frozen=True)
class ValidationLoss:
    """One evaluation.

    ``loss`` is the mean weighted loss over all samples; ``quartiles`` the same over the samples of each quarter of the
    expert's sigma distribution, from little to much noise (``None`` where a quarter has no sample); ``sigma_bounds``
    the sigmas that divide them, ends included.
    """

    loss: float
    quartiles: tuple[float | None, ...]
    sigma_bounds: tuple[float, ...]

    @classmethod
    def of(cls, losses: Tensor, sigma_bounds: Sequence[float]) -> ValidationLoss:
        """Average the losses [N] of samples in order of sigma; fp64 on the CPU, so every job gets the same bits."""
        losses = losses.double().cpu()
        count = len(losses)
        # Sample j has quantile (j + 1/2) / N, which lies in quarter floor(4 (j + 1/2) / N).
        quarter = torch.tensor([(2 * j + 1) * PARTS // (2 * count) for j in range(count)])
        means = [float(losses[quarter == part].mean()) if bool((quarter == part).any()) else None
                 for part in range(PARTS)]
        return cls(float(losses.mean()), tuple(means), tuple(sigma_bounds))

    def describe(self) -> str:
        """Return the mean and the quarters as one line."""
        parts = [f"{low:.3f}-{high:.3f}: {value:.4E}" for low, high, value
                 in zip(self.sigma_bounds, self.sigma_bounds[1:], self.quartiles) if value is not None]
        return f"{self.loss:.6E} (sigma {', '.join(parts)})"


class Validation:
    """Evaluates on the first ``eval_iters`` global batches of the evaluation samples, in file order.

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
    def __call__(self) -> ValidationLoss:
        """Return the loss over the evaluation samples, equal on every rank. Collective."""
        step, rounds = self._step, self._config.training.eval_iters
        count = rounds * self._batch
        losses = torch.zeros(count, device=step.device)
        features = self._features(rounds * step.accumulation)
        step.model.eval()
        for iteration in range(rounds):
            first = iteration * self._batch + step.groups.dp_rank * step.samples_per_rank
            batches = self._noised(islice(features, step.accumulation), first, count)
            losses[first : first + step.samples_per_rank] = step.evaluate(batches)
        step.model.train()
        # Each sample is known to one data rank and its tensor and context neighbours; all others hold zeros.
        losses = step.job_sum(losses) / (step.loss_ranks // step.groups.dims.data)
        bounds = self._objective.distribution.from_uniform(torch.linspace(0, 1, PARTS + 1, dtype=torch.float64))
        return ValidationLoss.of(losses, bounds.tolist())

    def _noised(self, features: Iterator[Features], first: int, count: int) -> list[tuple[Features, Noised]]:
        """Noise this rank's micro-batches of one global batch; ``first`` is the number of their first sample."""
        size, result = self._config.training.micro_batch_size, []
        for start, batch in zip(range(first, count, size), features):
            quantiles = (torch.arange(start, start + size, dtype=torch.float64) + 0.5) / count
            sigmas = self._objective.distribution.from_uniform(quantiles)
            result.append((batch, self._objective.add_noise(batch.latents, batch.keys, sigmas)))
        return result
