"""One optimizer step: accumulate micro-batches, agree on the outcome, finish the gradients, move the weights.

The loss is the mean over the global batch of ``weight_i x error_i``. Each rank divides the sum over its own samples by
their number, micro-batch by micro-batch, and gradients are averaged over data x context ranks, so the result does not
depend on how the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_wan.parallel.grads import finish_grads
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.guard import BadStepError
from mindspeed_wan.training.objective import Noised, Objective
from mindspeed_wan.training.optimizer import AdamW

SIGMA_BINS = 20
"""Bins of [0, 1] in which a report counts sigmas."""


@dataclass(frozen=True)
class Accumulated:
    """What all ranks know after the backward passes: means over the global batch, and whether anybody must stop.

    ``sigma_counts``: how many of its samples had a sigma in each of ``SIGMA_BINS`` equal bins of [0, 1].
    """

    loss: float
    sigma: float
    stop: bool
    sigma_counts: tuple[int, ...] = ()


class TrainStep:
    """Forward, backward and update of one expert.

    Args:
        model: the (sharded) DiT.
        objective: sigma, noise and weights.
        groups: this layout.
        accumulation: micro-batches per step and rank.
        micro_batch_size: samples in each.
        device: where the reduction's tensor lives.
        clip_norm: gradients are clipped to this global norm; 0 does not clip.
    """

    def __init__(self, model: nn.Module, objective: Objective, groups: ParallelGroups, *, accumulation: int,
                 micro_batch_size: int, device: torch.device, clip_norm: float) -> None:
        self.model, self.objective, self.groups = model, objective, groups
        self.accumulation, self.device, self.clip_norm = accumulation, device, clip_norm
        self.samples_per_rank = accumulation * micro_batch_size
        self.loss_ranks = groups.dims.world_size
        """Ranks that know a loss; the others count as zero."""

    def accumulate(self, features: Iterator[Features], *, stop: bool) -> Accumulated:
        """Run forward and backward over one global batch and reduce what has to be agreed on.

        Args:
            features: yields this rank's micro-batches in order.
            stop: this rank wants to stop after the step.
        """
        totals, sigmas = torch.zeros(2, device=self.device), []
        for _ in range(self.accumulation):
            # All micro-batches of a step have one size on every rank (it differs from step to step when tokens are
            # balanced over shapes), so the mean of their means is the mean over the global batch.
            losses, sigma = self.losses(next(features))
            (losses.mean() / self.accumulation).backward()
            totals += torch.stack((losses.detach().mean(), sigma.mean()))
            sigmas.append(sigma)
        return self.agree(totals / self.accumulation, sigmas, stop=stop)

    def agree(self, means: Tensor, sigmas: Sequence[Tensor], *, stop: bool) -> Accumulated:
        """Average this rank's mean (loss, sigma) over the job, and ask whether anybody wants to stop. Collective.

        ``sigmas`` are those of its samples; ranks that know no loss give none.
        """
        counts = sum((_binned(sigma) for sigma in sigmas), means.new_zeros(SIGMA_BINS))
        values = torch.cat((means, means.new_tensor([float(stop)]), counts))
        loss, sigma, stops, *mean_counts = self.job_mean(values).tolist()
        return Accumulated(loss, sigma, stops > 0, tuple(round(count * self.groups.dims.data) for count in mean_counts))

    def job_mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` over the ranks that know a loss. Collective.

        Tensor and context ranks repeat their data rank's numbers, so this is the mean over the batch.
        """
        return self.job_sum(values) / self.loss_ranks

    def job_sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all ranks of the job. Collective."""
        if self.groups.dims.world_size > 1:
            dist.all_reduce(values)
        return values

    def evaluate(self, batches: Sequence[tuple[Features, Noised]]) -> Tensor:
        """Return the weighted loss of each sample of these micro-batches [samples], without gradients.

        Ranks that know no loss return zeros.
        """
        return torch.cat([noised.losses(predict(self.model, noised.x, noised.timestep, features))
                          for features, noised in batches])

    def losses(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Return (weighted loss [B], sigma [B]) of one micro-batch, with the graph attached to the loss."""
        noised = self.objective.add_noise(batch.latents, batch.keys)
        return noised.losses(predict(self.model, noised.x, noised.timestep, batch)), noised.sigma

    def update(self, optimizer: AdamW, accumulated: Accumulated, *, iteration: int, learning_rate: float,
               weight_decay: float, loss_limit: float = math.inf) -> float:
        """Finish and clip the gradients, move the weights, return the gradient norm before clipping.

        Raises:
            BadStepError: on every rank, before any weight moved, when the loss or the gradient is not finite or the
                loss is above ``loss_limit``.
        """
        # Both values come from reductions over all ranks: every rank sees the same and stops in the same place.
        if not math.isfinite(accumulated.loss):
            raise BadStepError(f"the loss of iteration {iteration} is {accumulated.loss}")
        if accumulated.loss > loss_limit:
            raise BadStepError(f"the loss of iteration {iteration} is {accumulated.loss:.4g}, above {loss_limit:.4g}")
        norm = finish_grads(self.model, self.groups, self.clip_norm)
        if not math.isfinite(norm):
            raise BadStepError(f"the gradient norm of iteration {iteration} is {norm}", norm=norm)
        optimizer.step(learning_rate, weight_decay)
        optimizer.zero_grad()
        return norm


def _binned(sigma: Tensor) -> Tensor:
    """Return how many of these sigmas lie in each bin, [SIGMA_BINS] fp32; one-hot, as its kernels are deterministic."""
    bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
    return nn.functional.one_hot(bins, SIGMA_BINS).sum(dim=0).float()


def predict(model: nn.Module, x: Tensor, timestep: Tensor, batch: Features) -> Tensor:
    """Return the model's velocity for noisy latents ``x`` [B, C, f, h, w] under the batch's conditions."""
    return model(model_inputs(x, batch), timestep, batch.text, batch.image_embeds)


def model_inputs(x: Tensor, batch: Features) -> Tensor:
    """Return noisy latents with the channels of what is known behind them."""
    return x if batch.condition is None else torch.cat((x, batch.condition.to(x.dtype)), dim=1)
