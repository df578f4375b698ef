"""How many ranks each kind of parallelism gets, and which combinations exist. No torch, no process group.

world = tensor x context x pipeline x data, in Megatron's rank order (tensor fastest, then context, data, pipeline).
Parameters are sharded by FSDP2 over ``shard`` of the data x context ranks and replicated over the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of one layout.

    Args:
        world_size: all ranks of the job.
        tensor: ranks that share each weight matrix.
        sequence_parallel: shard activations between tensor-parallel regions over the tensor ranks.
        context: ranks that share the tokens of one video.
        ulysses: the part of ``context`` that exchanges heads; the rest is a ring. ``None`` means all of it.
        pipeline: stages, each with a part of the blocks.
        virtual: chunks of blocks on each stage; above 1 the schedule interleaves them.
        shard: FSDP2's sharding degree; ``None`` means all of data x context.

    Raises:
        ConfigError: the sizes do not factor.
    """

    world_size: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    ulysses: int | None = None
    pipeline: int = 1
    virtual: int = 1
    shard: int | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "tensor", "context", "ulysses", "pipeline", "virtual", "shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", fix="use 1 or more")
        if self.virtual > 1 and self.pipeline == 1:
            raise ConfigError(
                f"{self.virtual} virtual pipeline chunks without pipeline stages", fix="use 2 or more stages"
            )
        model_ranks = self.tensor * self.context * self.pipeline
        if self.world_size % model_ranks:
            raise ConfigError(
                f"{self.world_size} ranks do not factor into tensor {self.tensor} x context {self.context}"
                f" x pipeline {self.pipeline} = {model_ranks} times a data-parallel degree",
                fix=f"start a multiple of {model_ranks} ranks, or lower tensor, context or pipeline",
            )
        if self.context % self.ulysses_size:
            raise ConfigError(
                f"ulysses degree {self.ulysses} does not divide context {self.context}",
                fix=f"choose one of {_divisors(self.context)}",
            )
        if (self.data * self.context) % self.shard_size:
            raise ConfigError(
                f"sharding size {self.shard} does not divide data {self.data} x context {self.context}"
                f" = {self.data * self.context}",
                fix=f"choose one of {_divisors(self.data * self.context)}, or auto",
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "sequence parallel needs tensor parallel", fix="set tensor-model-parallel-size 2 or more, or drop it"
            )

    @property
    def data(self) -> int:
        """Ranks that work on different videos."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage; they are neighbours, because the stage is the slowest axis."""
        return self.world_size // self.pipeline

    @property
    def ulysses_size(self) -> int:
        """Ranks over which attention heads are exchanged."""
        return self.context if self.ulysses is None else self.ulysses

    @property
    def ring(self) -> int:
        """Ranks around which keys and values travel."""
        return self.context // self.ulysses_size

    @property
    def shard_size(self) -> int:
        """Ranks that hold one copy of the parameters together."""
        return self.data * self.context if self.shard is None else self.shard

    @property
    def replicas(self) -> int:
        """Copies of the sharded parameters (above 1: hybrid sharding)."""
        return self.data * self.context // self.shard_size

    def validate(self, *, num_heads: int, ffn_dim: int) -> None:
        """Raise ``ConfigError`` if a model with these sizes cannot be cut this way; the message lists what can."""
        head_ranks = self.tensor * self.ulysses_size
        if num_heads % head_ranks:
            raise ConfigError(
                f"tensor {self.tensor} x ulysses {self.ulysses_size} = {head_ranks} does not divide"
                f" {num_heads} attention heads",
                fix=f"tensor x ulysses may be {_divisors(num_heads)}; other context ranks can form a ring"
                " (--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp N)",
            )
        if ffn_dim % self.tensor:
            legal = [d for d in _divisors(ffn_dim) if num_heads % d == 0]
            raise ConfigError(
                f"tensor {self.tensor} does not divide the feed-forward size {ffn_dim}", fix=f"choose one of {legal}"
            )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
