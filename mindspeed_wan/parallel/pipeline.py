"""Which blocks of the model each pipeline stage runs. No torch, no process group.

A stage holds one or more *chunks*: runs of neighbouring blocks. With ``stages`` stages and ``virtual`` chunks on each,
chunk ``v`` of stage ``p`` is number ``v * stages + p`` along the model (Megatron's interleaving), so a clip passes
every stage ``virtual`` times. The first chunk of all embeds, the last one of all projects to the velocity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindspeed_wan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Neighbouring blocks of the model, with its embeddings in front (``first``) or its head behind (``last``)."""

    blocks: range
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class PipelinePlan:
    """``layers[v][p]`` blocks in virtual chunk ``v`` of stage ``p``, as in MindSpeed-MM's ``pipeline_num_layers``.

    Raises:
        ConfigError: rows of different lengths, or a chunk without blocks.
    """

    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.layers or len({len(row) for row in self.layers}) != 1 or not self.layers[0]:
            raise ConfigError(f"pipeline_num_layers {self.describe()}: every row needs one number per stage",
                              fix="write [20, 20], or [[10, 10], [10, 10]] with virtual stages")
        if any(count < 1 for row in self.layers for count in row):
            raise ConfigError(f"pipeline_num_layers {self.describe()}: every stage needs at least one block")

    @classmethod
    def even(cls, num_layers: int, stages: int, virtual: int = 1) -> PipelinePlan:
        """Split ``num_layers`` blocks as evenly as they go; earlier chunks take the remainder."""
        chunks = stages * virtual
        if num_layers < chunks:
            raise ConfigError(f"{num_layers} blocks cannot be split into {stages} stages x {virtual} chunks",
                              fix=f"use at most {num_layers} chunks in all")
        counts = [num_layers // chunks + (number < num_layers % chunks) for number in range(chunks)]
        return cls(tuple(tuple(counts[v * stages:(v + 1) * stages]) for v in range(virtual)))

    @classmethod
    def of(cls, num_layers: int, stages: int, virtual: int = 1, given: Sequence[Sequence[int]] = ()) -> PipelinePlan:
        """Return the plan that the configuration asks for: ``given`` rows, or an even split.

        Raises:
            ConfigError: the rows do not fit the stages, the virtual chunks or the model.
        """
        if not given:
            return cls.even(num_layers, stages, virtual)
        plan = cls(tuple(tuple(row) for row in given))
        if (plan.virtual, plan.stages) != (virtual, stages):
            raise ConfigError(f"pipeline_num_layers {plan.describe()} is for {plan.stages} stages x {plan.virtual}"
                              f" chunks, the run has {stages} x {virtual}",
                              fix="make it fit the numbers of pipeline stages and of virtual chunks")
        if plan.num_layers != num_layers:
            raise ConfigError(f"pipeline_num_layers {plan.describe()} adds up to {plan.num_layers} blocks,"
                              f" the model has {num_layers}")
        return plan

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.layers[0])

    @property
    def virtual(self) -> int:
        """Chunks on each stage."""
        return len(self.layers)

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return sum(map(sum, self.layers))

    def chunks(self, stage: int) -> tuple[Chunk, ...]:
        """Return the chunks of ``stage`` in the order a clip meets them."""
        return tuple(chunk for number, chunk in enumerate(self._all()) if number % self.stages == stage)

    def _all(self) -> Iterator[Chunk]:
        start, counts = 0, [count for row in self.layers for count in row]
        for number, count in enumerate(counts):
            yield Chunk(blocks=range(start, start + count), first=number == 0, last=number == len(counts) - 1)
            start += count

    def describe(self) -> str:
        """Return the numbers as ``pipeline_num_layers`` spells them."""
        rows = [list(row) for row in self.layers]
        return str(rows[0] if len(rows) == 1 else rows)
