"""A training step over pipeline stages, by Megatron-Core's schedules: 1F1B, or interleaved with virtual chunks.

Every stage reads the same micro-batches (they come from a counter, not from a neighbour) and makes of them what it
needs: the first chunk the noisy latent, the last one the target. Between stages travels one tensor per micro-batch,
``models.wan.stages``' wire, and on the way back its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.stages import Grid, Inputs, Wire, run_chunk, wire_of
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.parallel.pipeline import Chunk
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.objective import Noised
from mindspeed_wan.training.step import Accumulated, TrainStep, model_inputs


@dataclass(frozen=True)
class Work:
    """One micro-batch: its features, noised."""

    features: Features
    noised: Noised


class PipelineStep(TrainStep):
    """``TrainStep`` whose model is this rank's stage. Takes the arguments of ``TrainStep``, and

    Args:
        platform: says where Megatron's buffers live.
    """

    def __init__(self, *args: Any, platform: Platform, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.model, WanDiT)
        self._schedule = Schedule(self.model, self.groups, platform)
        self.loss_ranks = self.groups.dims.stage_ranks

    def accumulate(self, features: Iterator[Features], *, stop: bool) -> Accumulated:
        """Run every micro-batch of one global batch forward and backward through the stages."""
        work = [self._work(next(features)) for _ in range(self.accumulation)]
        totals, sigmas = torch.zeros(2, device=self.device), []
        for loss, sigma in self._schedule.run(work, scale=1.0 / self.accumulation):
            totals += torch.stack((loss.mean(), sigma.mean()))
            sigmas.append(sigma)
        return self.agree(totals / self.accumulation, sigmas, stop=stop)

    def evaluate(self, batches: Sequence[tuple[Features, Noised]]) -> Tensor:
        """Return the loss of each of this data rank's samples; zeros where the last chunk is not."""
        outcome = self._schedule.run([Work(*batch) for batch in batches], forward_only=True)
        if not outcome:
            return torch.zeros(sum(len(noised.sigma) for _, noised in batches), device=self.device)
        return torch.cat([losses for losses, _ in outcome])

    def _work(self, features: Features) -> Work:
        return Work(features, self.objective.add_noise(features.latents, features.keys))


class Schedule:
    """Megatron's schedule over the chunks of one stage. Collective over the stages in every call.

    Args:
        model: this rank's stage.
        groups: the layout; its groups are parallel_state's.
        platform: where Megatron's buffers live.
    """

    def __init__(self, model: WanDiT, groups: ParallelGroups, platform: Platform) -> None:
        self._model, self._groups, self._platform = model, groups, platform
        self._config = _schedule_config(model, groups, platform)
        self._chunks = [_ChunkModule(model, chunk, self._config, number) for number, chunk in enumerate(model.chunks)]

    def run(
        self, work: Sequence[Work], *, scale: float = 1.0, forward_only: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Run micro-batches of one shape, and their backward passes of ``scale`` times each one's mean loss.

        Returns:
            (loss [B], sigma [B]) of each micro-batch, in order, on the stage of the last chunk; nothing elsewhere.
        """
        from megatron.core.pipeline_parallel import schedules

        model, dims = self._model, self._groups.dims
        grid = model.grid(model_inputs(work[0].noised.x, work[0].features))
        wire = wire_of(model, grid, work[0].noised.x.shape[0])
        for chunk in self._chunks:
            chunk.begin(grid, wire, scale)
        # Megatron divides the sequence by the context and tensor ranks; the wire is what one rank sends.
        length = wire.rows * dims.context * (dims.tensor if dims.sequence_parallel else 1)
        run = (schedules.forward_backward_pipelining_with_interleaving if dims.virtual > 1
               else schedules.forward_backward_pipelining_without_interleaving)
        self._config.pipeline_dtype = wire.dtype
        with self._platform.megatron_schedule():
            outcome: list[tuple[Tensor, Tensor]] = run(
                forward_step_func=_forward_step, data_iterator=[iter(work) for _ in self._chunks], model=self._chunks,
                num_microbatches=len(work), seq_length=length, micro_batch_size=wire.batch, forward_only=forward_only,
            )
        return outcome


class _ChunkModule(nn.Module):
    """A chunk as Megatron's schedules want it: a module with a config that is handed its input beforehand."""

    def __init__(self, model: WanDiT, chunk: Chunk, config: Any, number: int) -> None:
        super().__init__()
        from megatron.core.enums import ModelType

        self.config, self.vp_stage, self.model_type = config, number, ModelType.encoder_or_decoder
        self.model, self.chunk = model, chunk
        self._received: Tensor | None = None

    def begin(self, grid: Grid, wire: Wire, scale: float) -> None:
        """Say what the micro-batches of the next run look like."""
        self.grid, self.wire, self.scale = grid, wire, scale

    def set_input_tensor(self, tensors: Sequence[Tensor | None]) -> None:
        """Take what the chunk before sent (``None`` for the first)."""
        self._received = tensors[0]

    def forward(self, work: Work) -> Tensor:
        """Return the wire to send on, or the velocity."""
        source: Inputs | Tensor
        if self._received is None:
            features, noised = work.features, work.noised
            source = Inputs(model_inputs(noised.x, features), noised.timestep, features.text, features.image_embeds)
        else:
            source, self._received = self._received, None
        return run_chunk(self.model, self.chunk, self.wire, self.grid, source)


def _forward_step(data: Iterator[Work], chunk: _ChunkModule) -> tuple[Tensor, Any]:
    """Megatron's ``forward_step_func``: the chunk's output, and what turns the last chunk's into a loss."""
    work = next(data)

    def loss_of(velocity: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        losses = work.noised.losses(velocity)
        # With calculate_per_token_loss Megatron, of whatever version, leaves the first value as it is.
        return losses.mean() * chunk.scale, torch.ones((), dtype=torch.int), (losses.detach(), work.noised.sigma)

    return chunk(work), loss_of


def _schedule_config(model: WanDiT, groups: ParallelGroups, platform: Platform) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    dims, config = groups.dims, model.config
    on_cpu = platform.device_type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron speaks of kernels and graphs that are not used here
        return TransformerConfig(
            num_layers=dims.pipeline * dims.virtual,  # our own plan says who has which
            hidden_size=config.dim,
            num_attention_heads=config.num_heads,
            tensor_model_parallel_size=dims.tensor,
            sequence_parallel=dims.sequence_parallel,
            context_parallel_size=dims.context,
            pipeline_model_parallel_size=dims.pipeline,
            virtual_pipeline_model_parallel_size=dims.virtual if dims.virtual > 1 else None,
            pipeline_dtype=model.residual_dtype or model.dtype,
            calculate_per_token_loss=True,
            # Interleaved, sends overlap with the next chunk, and Megatron would free what is still being sent.
            deallocate_pipeline_outputs=dims.virtual == 1,
            # Between two stages, batched sends of both directions would go to one peer in no order.
            batch_p2p_comm=dims.virtual == 1,
            overlap_p2p_comm=dims.virtual > 1,
            batch_p2p_sync=not on_cpu,
            use_cpu_initialization=True,
        )
