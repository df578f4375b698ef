"""Pipeline stages as the planner sees them: what each one holds, how many micro-batches it has under way, the bubble.

Which blocks a stage runs is ``PipelinePlan``'s even split, the trainer's own. The order of passes is that of
Megatron-Core's schedules: one forward, one backward (1F1B), or interleaved with virtual chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.config import IMAGE_CONTEXT_LENGTH
from mindspeed_wan.parallel.pipeline import PipelinePlan
from mindspeed_wan.planning.job import Job, UnitSizes

PER_STAGE = 4
"""Micro-batches per stage of a step whose global batch is not given: the bubble is below a fifth then."""
TIME_ROWS = 7
"""Rows of modulation and time behind the tokens (``models.wan.stages``, which needs torch)."""
FSDP2_REASON = ("FSDP2 with pipeline stages: a stage runs many micro-batches per step, and FSDP2 would gather its"
                " parameters anew for each")


@dataclass(frozen=True)
class Stage:
    """One stage: its number, and the blocks of each of its virtual chunks. The first embeds, the last projects."""

    number: int
    chunks: tuple[int, ...]
    first: bool
    last: bool

    @property
    def blocks(self) -> int:
        """Blocks of all chunks."""
        return sum(self.chunks)

    def recomputed(self, first: int) -> tuple[int, ...]:
        """Return the recomputed blocks of each chunk, of which the ``first`` so many of the stage are."""
        found, left = [], first
        for size in self.chunks:
            found.append(min(size, left))
            left -= found[-1]
        return tuple(found)


def stages(job: Job) -> list[Stage]:
    """Return the stages of ``job``.

    Raises:
        ConfigError: more chunks than blocks.
    """
    dims = job.dims
    plan = PipelinePlan.even(job.model.num_layers, dims.pipeline, dims.virtual)
    return [Stage(number, tuple(row[number] for row in plan.layers), number == 0, number == dims.pipeline - 1)
            for number in range(dims.pipeline)]


def check_micro_batches(job: Job) -> None:
    """Raise ``ConfigError`` where the interleaved schedule cannot run a step's micro-batches, as the trainer does."""
    dims, count = job.dims, job.accumulation
    if dims.virtual > 1 and count % dims.pipeline:
        raise ConfigError(f"{count} micro-batches per step are not a multiple of {dims.pipeline} pipeline stages,"
                          " which virtual chunks need",
                          fix=f"make the global batch a multiple of {job.micro_batch * dims.data * dims.pipeline}")


def held(sizes: UnitSizes, stage: Stage) -> int:
    """Return what one stage holds of ``sizes``; over all stages it adds up to ``sizes.whole``."""
    return stage.blocks * sizes.block + (sizes.outside if stage.first else 0) + (sizes.head if stage.last else 0)


def on_a_rank(job: Job, sizes: UnitSizes) -> int:
    """Return what the rank that holds most of ``sizes`` has of it."""
    if job.dims.pipeline == 1:
        return sizes.shard
    return max(held(sizes, stage) for stage in stages(job))


def most_trained(job: Job) -> int:
    """Return the trained parameters of the rank that has most of them."""
    return on_a_rank(job, job.trained)


def bubble(stages: int, virtual: int, micro_batches: int) -> float:
    """Return the share of a step in which a stage stands still: (p - 1) / (m v + p - 1)."""
    return (stages - 1) / (micro_batches * virtual + stages - 1)


@lru_cache(maxsize=4096)
def under_way(stages: int, virtual: int, micro_batches: int, number: int) -> tuple[tuple[int, ...], ...]:
    """Return how many micro-batches of each chunk wait for their backward pass on a stage, at its fullest moments.

    Without chunks the first stage has ``stages`` of them, each later one fewer. Interleaved, a stage runs
    2 (p - 1 - number) + (v - 1) p chunks forward, then one forward and one backward in turn; groups of p micro-batches
    pass chunk after chunk, and back in reverse order.
    """
    total = micro_batches * virtual
    if virtual == 1:
        return ((min(stages - number, total),),)
    warm_up = min(2 * (stages - 1 - number) + (virtual - 1) * stages, total)
    alive = [0] * virtual
    for forward in range(warm_up):
        alive[forward // stages % virtual] += 1
    seen = {tuple(alive)}
    # The pattern repeats after every group of micro-batches has passed every chunk.
    for backward in range(min(total - warm_up, 2 * stages * virtual)):
        alive[(warm_up + backward) // stages % virtual] += 1
        seen.add(tuple(alive))
        alive[virtual - 1 - backward // stages % virtual] -= 1
    return tuple(sorted(seen))


def wire_bytes(job: Job) -> float:
    """Return what travels between two chunks for one micro-batch, or for one pass of a generation."""
    return (job.local_tokens / job.sequence_parts + extra_rows(job)) * job.model.dim * job.residual


def extra_rows(job: Job) -> float:
    """Return the rows behind the tokens, of all clips of a micro-batch; modulation and time are fp32.

    A generation sends no text: every stage computed its own keys and values of the prompt beforehand.
    """
    time = TIME_ROWS * 4 // job.residual
    if not job.training:
        return float(job.micro_batch * time)
    image = 0
    if job.model.has_image_embedder:
        image = IMAGE_CONTEXT_LENGTH if job.model.pos_embed_len is None else job.model.pos_embed_len
    return float(job.micro_batch * (job.model.text_len + image + time))
