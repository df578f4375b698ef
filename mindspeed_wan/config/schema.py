"""The resolved configuration of a training run.

``RunConfig`` is what the rest of the package reads: every value has one name, one unit and one meaning, whichever
spelling it came in (MindSpeed-MM JSON, FSDP2 YAML, Megatron flags; see ``load`` and ``flags``). Sections are frozen
and refuse unknown keys. Checks that need two sections live in ``rules``.

No torch here, and no import from ``models``: ``WanSection`` mirrors ``models.wan.config.WanConfig`` field by field
(a test compares them), so ``WanConfig.from_dict(config.model.wan.to_dict())`` builds the model's own configuration.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from mindspeed_wan.config.base import Section
from mindspeed_wan.config.sections_model import (
    ConditioningSection,
    DataSection,
    DiffusionSection,
    ImageEncoderSection,
    ModelSection,
    TextEncoderSection,
    VaeSection,
    WanSection,
)
from mindspeed_wan.config.sections_run import (
    CheckpointSection,
    Fsdp2Section,
    LoggingSection,
    LoraSection,
    OptimizerSection,
    ParallelSection,
    RecomputeSection,
    TrainingSection,
    ValidationSection,
)

__all__ = [
    "CheckpointSection",
    "ConditioningSection",
    "DataSection",
    "DiffusionSection",
    "Fsdp2Section",
    "ImageEncoderSection",
    "LoggingSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RecomputeSection",
    "RunConfig",
    "Section",
    "TextEncoderSection",
    "TrainingSection",
    "VaeSection",
    "ValidationSection",
    "WanSection",
]


class RunConfig(Section):
    """Everything a training run reads."""

    parallel: ParallelSection = ParallelSection()
    """Ranks."""
    model: ModelSection = ModelSection()
    """Expert and encoders."""
    diffusion: DiffusionSection = DiffusionSection()
    """Noise, expert range, loss weight."""
    data: DataSection = DataSection()
    """Clips and captions."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW and schedules."""
    training: TrainingSection = TrainingSection()
    """Batches, length, precision."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Load and save."""
    fsdp2: Fsdp2Section = Fsdp2Section()
    """Read when parallel.use_torch_fsdp2 is true."""
    logging: LoggingSection = LoggingSection()
    """Reports."""
    lora: LoraSection | None = None
    """Adapters; None trains all weights."""
    valid_data: DataSection | None = None
    """Clips of the validation loss; None takes the first training clips."""
    validation: ValidationSection = ValidationSection()
    """Validation videos."""
    world_size: int | None = None
    """Ranks the layout was checked for: torchrun's, or --world-size of a dry run; None when unknown."""
    notes: tuple[str, ...] = ()
    """Things the reader of the log should know once: inert flags, translated values, likely mistakes."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Which file each part came from (absolute paths)."""

    def resolved(self) -> dict[str, Any]:
        """Return the JSON-ready dict that is written beside the run; ``RunConfig(**it)`` reads it back."""
        return self.to_dict()

    @property
    def uses_fsdp2(self) -> bool:
        """FSDP2 hooks are around the blocks: asked for, or for its mixed precision (bf16 without a pipeline)."""
        return self.parallel.use_torch_fsdp2 or (self.training.precision == "bf16" and self.parallel.pipeline == 1)

    def global_batch(self, world_size: int) -> int:
        """Return the clips per optimizer step of a job with ``world_size`` ranks."""
        training = self.training
        return training.global_batch_size or training.micro_batch_size * self.parallel.data(world_size)

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the forward passes per optimizer step on each rank."""
        per_pass = self.training.micro_batch_size * self.parallel.data(world_size)
        return math.ceil(self.global_batch(world_size) / per_pass)

    def shard_size(self, world_size: int) -> int:
        """Return the ranks that share one copy of the parameters under FSDP2 (1 without it)."""
        if not self.parallel.use_torch_fsdp2 or self.fsdp2.sharding_size is None:
            return 1
        if self.fsdp2.sharding_size == "auto":
            return self.parallel.data(world_size) * self.parallel.context
        return self.fsdp2.sharding_size
