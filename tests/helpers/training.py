"""A tiny expert with its optimizer in any layout, fed with synthetic features: training without data or encoders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.weights import load_model_weights
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.views import global_views
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups
from mindspeed_wan.platforms import get_platform
from mindspeed_wan.training import setup
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.optimizer import AdamW
from mindspeed_wan.training.step import TrainStep

BATCH = 4
FSDP = {"use_torch_fsdp2": True}


@dataclass
class TinyRun:
    """One rank's part of a tiny training job."""

    config: RunConfig
    groups: ParallelGroups
    model: WanDiT
    optimizer: AdamW
    ema: Ema
    step: TrainStep

    def train(self, first: int, count: int) -> list[tuple[float, float]]:
        """Run iterations ``first`` .. and return (loss, gradient norm) of each."""
        results = []
        for iteration in range(first, first + count):
            accumulated = self.step.accumulate(iter(self.features(iteration)), stop=False)
            norm = self.step.update(self.optimizer, accumulated, iteration=iteration, learning_rate=1e-3,
                                    weight_decay=0.01)
            self.ema.update(self.optimizer.masters())
            results.append((accumulated.loss, norm))
        return results

    def features(self, iteration: int) -> list[Features]:
        """Return this rank's micro-batches of one global batch."""
        generator = torch.Generator().manual_seed(iteration)
        latents = torch.randn(BATCH, 16, 3, 8, 12, generator=generator)
        text = torch.randn(BATCH, 7, self.model.config.text_dim, generator=generator)
        size, mine = self.config.training.micro_batch_size, self.step.samples_per_rank
        start = self.groups.dp_rank * mine
        return [Features(latents[i : i + size], text[i : i + size], [(k, iteration) for k in range(i, i + size)])
                for i in range(start, start + mine, size)]

    def views(self) -> dict[str, Tensor]:
        """Return the parameters' global views."""
        return global_views(self.model, self.groups)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return dcp.state_views(self.views(), self.optimizer, ema=self.ema.averages)

    def gathered(self) -> dict[str, Tensor]:
        """Return every tensor of the checkpoint, whole. Collective."""
        mine = {key: whole(tensor).clone() for key, tensor in self.state().items()}
        if self.groups.pp is None:
            return mine
        stages: list[dict[str, Tensor]] = [{} for _ in range(self.groups.pp.size())]
        dist.all_gather_object(stages, mine, group=self.groups.pp)
        return {key: tensor for stage in stages for key, tensor in stage.items()}


def whole(tensor: Tensor) -> Tensor:
    """Return the global tensor of a view."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tiny_run(world_size: int, folder: str, layout: dict[str, Any]) -> TinyRun:
    """Build a tiny job from the expert in ``folder``. Collective.

    ``layout`` holds ``RunConfig`` sections: ``parallel``, ``training``, ``fsdp2``.
    """
    platform = get_platform("cpu")
    wan = WanConfig.from_diffusers(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    config = RunConfig(
        parallel=layout.get("parallel", {}),
        model={"wan": wan.to_dict()},
        diffusion={"sigma_range": (0.875, 1.0), "expert": "high", "boundary": 0.875},
        training={"global_batch_size": BATCH, **layout.get("training", {})},
        fsdp2=layout.get("fsdp2", {}),
    )
    groups = build_groups(setup.parallel_dims(config, world_size), platform)
    model = setup.build_model(config, wan, groups, platform)
    load_model_weights(folder, global_views(model, groups), wan, expert="high")
    optimizer = AdamW(model.named_parameters())
    optimizer.parameters_to_masters()
    return TinyRun(config, groups, model, optimizer, Ema(optimizer.masters(), 0.9),
                   setup.train_step(config, model, groups, platform))
