"""Every layout of a number of devices: which fit, which are fastest, and why the others are refused.

Legality is ``ParallelDims``'s own, and for a generation ``InferenceLayout``'s, so the planner never disagrees with the
programs that run what it plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions
from mindspeed_wan.planning.devices import GIB
from mindspeed_wan.planning.duration import Duration, plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import MemoryPlan, plan_memory
from mindspeed_wan.planning.stages import FSDP2_REASON, PER_STAGE, check_micro_batches, stages

MAX_TENSOR = 8
MAX_CONTEXT = 64
STAGES = (1, 2, 4, 8)
CHUNKS = (1, 2)
"""Pipeline stages and virtual chunks that are tried where none are asked for."""
USABLE = 0.95
"""Share of a device's memory a layout may fill: drivers keep some, and clips of a bucket differ in size."""


@dataclass(frozen=True)
class Layout:
    """A layout that runs, with what it needs and how long it takes."""

    job: Job
    memory: MemoryPlan
    duration: Duration

    @property
    def name(self) -> str:
        """Short name, such as ``TP2 SP CP4 (Ulysses) DP16 shard 64``."""
        return describe(self.job)

    @property
    def seconds_per_clip(self) -> float:
        """Seconds of the whole job per clip (training), or of one video (generation)."""
        return self.duration.total if not self.job.training else 1 / self.duration.clips_per_second


@dataclass(frozen=True)
class Refusal:
    """A layout that does not run, and why; ``needs`` bytes per device where memory is the reason."""

    name: str
    reason: str
    needs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is fixed and what is free; ``None`` means the planner chooses.

    Attributes:
        devices: ranks of the job.
        shard: FSDP2's sharding size; 0 is no FSDP2.
        recomputed: blocks recomputed; ``None`` takes the fewest that fit.
        pipeline: stages; ``virtual`` chunks on each (training).
        global_batch: clips per optimizer step; ``None`` is one micro-batch per data rank, with pipeline stages
            ``PER_STAGE`` per stage.
        cfg: ranks of a generation's guidance branches.
        experts: experts that a generation keeps on the device (see ``Job``); ``None`` is as many as fit.
        pipefusion: how a generation's stages cut their passes.
    """

    devices: int
    tensor: int | None = None
    context: int | None = None
    ulysses: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    sequence_parallel: bool | None = None
    shard: int | None = None
    recomputed: int | None = None
    global_batch: int | None = None
    cfg: int | None = None
    experts: int | None = None
    pipefusion: PipeFusionOptions = field(default_factory=PipeFusionOptions)


@dataclass
class Plan:
    """The outcome of a search: layouts from best to worst, and the refused ones."""

    layouts: list[Layout] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def describe(job: Job) -> str:
    """Return a short name of a job's layout."""
    dims = job.dims
    words = [f"TP{dims.tensor}" + (" SP" if dims.sequence_parallel else "")] if dims.tensor > 1 else []
    if dims.context > 1:
        kind = "Ulysses" if dims.ring == 1 else "ring" if dims.ulysses_size == 1 else f"Ulysses {dims.ulysses_size}"
        words.append(f"CP{dims.context} ({kind}{f' x ring {dims.ring}' if 'Ulysses ' in kind else ''})")
    if dims.pipeline > 1:
        words.append(f"PP{dims.pipeline}" + (f" x {dims.virtual} chunks" if dims.virtual > 1 else ""))
    if job.training:
        words.append(f"DP{dims.data}")
        words.append(f"FSDP2/{dims.shard_size}" if job.fsdp2 else "no FSDP2")
        words.append(f"recompute {job.recomputed}/{job.blocks}{' but attention' * job.keep_attention}"
                     f"{' offloaded' * job.offload}")
        words += {"device": [], "host": ["moments on the host"], "bytes": ["8-bit moments"]}[job.states]
        if job.accumulation > 1:
            words.append(f"accumulate {job.accumulation}")
    else:
        words += [f"CFG{job.cfg}"] if job.cfg > 1 else []
        words += [f"DP{dims.data // job.cfg}"] if dims.data > job.cfg else []
        words += [f"FSDP2/{dims.shard_size}"] if job.fsdp2 else []
        words += [f"PipeFusion of {job.patches}"] if job.patches > 1 else []
        words += [job.base] if job.base else []
        words.append("blocks streamed" if job.experts == 0 else "whole model" if job.experts_of_model == 1
                     else "both experts" if job.experts == 2 else "one expert at a time")
    return " ".join(words)


def search(job: Job, wanted: Search) -> Plan:
    """Return every layout of ``wanted.devices`` for ``job`` (whose ``dims`` do not matter), best first.

    Refused layouts that miss the least memory come first, illegal ones last.
    """
    plan, refused = Plan(), dict[Refusal, None]()
    for outcome in _attempts(job, wanted):
        if isinstance(outcome, Layout):
            plan.layouts.append(outcome)
        else:
            refused[outcome] = None
    plan.layouts.sort(key=lambda layout: (layout.seconds_per_clip, layout.memory.total))
    plan.refused = sorted(refused, key=lambda refusal: (refusal.needs is None, refusal.needs or 0))
    return plan


def _attempts(job: Job, wanted: Search) -> Iterator[Layout | Refusal]:
    for tensor in _choices(wanted.tensor, wanted.devices, MAX_TENSOR):
        for context in _choices(wanted.context, wanted.devices, 1 if wanted.pipefusion else MAX_CONTEXT):
            for ulysses in _choices(wanted.ulysses, context, context):
                for pipeline, virtual in _pipelines(job, wanted, tensor * context):
                    yield from _degrees(job, wanted, (tensor, context, ulysses), (pipeline, virtual))


def _degrees(job: Job, wanted: Search, ranks: tuple[int, int, int],
             staged: tuple[int, int]) -> Iterator[Layout | Refusal]:
    (tensor, context, ulysses), (pipeline, virtual) = ranks, staged
    name = f"TP{tensor} CP{context} Ulysses {ulysses}" + (
        f" PP{pipeline} x {virtual} chunks" if virtual > 1 else f" PP{pipeline}" if pipeline > 1 else "")
    if not job.training:
        yield from _generations(job, wanted, ranks, pipeline, name)
        return
    try:
        if pipeline > 1 and wanted.shard:
            yield Refusal(name, FSDP2_REASON)
            return
        for shard in _shards(wanted, job, tensor) if pipeline == 1 else [0]:
            dims = _dims(wanted, ranks, staged, shard)
            dims.validate(num_heads=job.model.num_heads, ffn_dim=job.model.ffn_dim)
            if pipeline > 1:
                stages(job.with_changes(dims=dims))  # every chunk gets a block
            yield from _trainings(job.with_changes(dims=dims, fsdp2=shard != 0), wanted)
    except ConfigError as error:
        yield Refusal(name, error.message)
    if pipeline > 1 and wanted.shard is None:
        yield Refusal(f"PP{pipeline} with FSDP2", FSDP2_REASON)


def _pipelines(job: Job, wanted: Search, ranks: int) -> list[tuple[int, int]]:
    """Return (stages, chunks) worth trying: what is asked for, or a few that divide devices and blocks."""
    free = wanted.devices // ranks if wanted.devices % ranks == 0 else 1
    numbers = [n for n in STAGES if free % n == 0] if wanted.pipeline is None else [wanted.pipeline]
    if not job.training:
        if wanted.pipeline is None and wanted.pipefusion:
            numbers = [n for n in numbers if n > 1] or [1]
        return [(n, 1) for n in (numbers if wanted.pipeline is not None or wanted.experts != 0 else [1])]
    chunks = CHUNKS if wanted.virtual is None else (wanted.virtual,)
    if wanted.virtual is not None and wanted.pipeline is None:
        numbers = [n for n in numbers if n > 1] or numbers if wanted.virtual > 1 else numbers
    return [(n, v) for n in numbers for v in (chunks if n > 1 or wanted.virtual is not None else (1,))]


def _choices(fixed: int | None, total: int, limit: int) -> list[int]:
    """Return the fixed degree, or every divisor of ``total`` that is a power of two or takes part in 40 heads."""
    if fixed is not None:
        return [fixed]
    return [n for n in range(1, min(total, limit) + 1) if total % n == 0 and (n & (n - 1) == 0 or n % 5 == 0)]


def _shards(wanted: Search, job: Job, tensor: int) -> list[int | None]:
    """Sharding sizes worth trying: all of data x context, one node's worth, none (0)."""
    if wanted.shard is not None:
        return [wanted.shard]
    ranks = wanted.devices // tensor
    node = max(1, job.device.per_node // tensor)
    one_node = [node] if ranks > node and ranks % node == 0 else []
    return [None, *one_node, 0] if ranks > 1 else [0]


def _dims(wanted: Search, ranks: tuple[int, int, int], staged: tuple[int, int],
          shard: int | None) -> ParallelDims:
    tensor, context, ulysses = ranks
    sequence = wanted.sequence_parallel if wanted.sequence_parallel is not None else tensor > 1
    return ParallelDims(world_size=wanted.devices, tensor=tensor, sequence_parallel=sequence, context=context,
                        ulysses=ulysses, pipeline=staged[0], virtual=staged[1],
                        shard=shard or (None if shard is None else 1))


def _trainings(job: Job, wanted: Search) -> Iterator[Layout | Refusal]:
    """Yield the layout, or why it is refused: batch, memory."""
    dims = job.dims
    if wanted.global_batch is not None:
        per_pass = job.micro_batch * dims.data
        if wanted.global_batch % per_pass:
            yield Refusal(describe(job), f"global batch {wanted.global_batch} is not a multiple of {job.micro_batch}"
                          f" clips x {dims.data} data ranks")
            return
        job = job.with_changes(accumulation=wanted.global_batch // per_pass)
    elif dims.pipeline > 1:
        job = job.with_changes(accumulation=PER_STAGE * dims.pipeline)
    check_micro_batches(job)
    yield _fit_recompute(job, wanted.recomputed)


def _fit_recompute(job: Job, wanted: int | None) -> Layout | Refusal:
    """Recompute as few blocks as fit, with or without attention: the faster way."""
    fixed = None if wanted is None else min(wanted, job.blocks)  # it counts the blocks of each stage
    found = [layout for keep in (False, True)
             if (layout := _fewest(job.with_changes(keep_attention=keep), fixed)) is not None]
    if not found:
        return _too_large(job.with_changes(recomputed=job.blocks if fixed is None else fixed))
    return min(found, key=lambda layout: (layout.duration.step, layout.memory.total))


def _fewest(job: Job, fixed: int | None) -> Layout | None:
    """Return the layout with the fewest recomputed blocks that fits; memory falls with each."""
    low, high = (0, job.blocks) if fixed is None else (fixed, fixed)
    if not _fits(plan_memory(job.with_changes(recomputed=high)), job):
        return None
    while low < high:
        middle = (low + high) // 2
        if _fits(plan_memory(job.with_changes(recomputed=middle)), job):
            high = middle
        else:
            low = middle + 1
    best = job.with_changes(recomputed=low, keep_attention=job.keep_attention and low > 0)
    return Layout(best, plan_memory(best), plan_duration(best))


def _generations(job: Job, wanted: Search, ranks: tuple[int, int, int], pipeline: int,
                 name: str) -> Iterator[Layout | Refusal]:
    """Yield the layouts of these degrees, or what the generation program says about them."""
    tensor, context, ulysses = ranks
    for cfg, shard in _sharings(job, wanted, tensor * context, context, pipeline):
        layout = InferenceLayout(
            world_size=wanted.devices, tensor=tensor, ulysses=ulysses, ring=max(1, context // ulysses), cfg=cfg,
            pipeline=pipeline, dit_fsdp=shard > 0)
        problems = _generation_problems(job, wanted, layout, (context, shard))
        if problems:
            yield from (Refusal(name + f" CFG{cfg}" * (cfg > 1), problem) for problem in problems)
            continue
        try:
            # No sequence parallelism: no activations are kept that it would divide.
            dims = ParallelDims(world_size=wanted.devices, tensor=tensor, context=context, ulysses=ulysses,
                                pipeline=pipeline, shard=shard or 1)
            dims.validate(num_heads=job.model.num_heads, ffn_dim=job.model.ffn_dim)
            one = job.with_changes(dims=dims, fsdp2=shard > 0, cfg=cfg)
            stages(one)  # every stage gets a block
        except ConfigError as error:
            yield Refusal(name, error.message)
            continue
        if wanted.pipefusion:
            patches = min(wanted.pipefusion.count(layout), one.tokens)
            one = one.with_changes(patches=patches, warmup=wanted.pipefusion.warmup)
        yield _most_on_device(one, wanted.experts, layout)


def _sharings(job: Job, wanted: Search, ranks: int, context: int, pipeline: int) -> list[tuple[int, int]]:
    """Return (ranks of the guidance branches, FSDP2's sharding size) worth trying: what is asked for, or what fits."""
    numbers = range(1, job.guidance + 1) if wanted.cfg is None else (wanted.cfg,)
    sizes = {cfg: ranks * cfg * pipeline for cfg in numbers}
    fitting = [cfg for cfg, size in sizes.items()
               if wanted.devices % size == 0 and (pipeline == 1 or wanted.devices == size)]
    if not fitting and (pipeline == 1 or wanted.pipeline is not None):
        fitting = [numbers[0]]  # the refusal says why
    found = []
    for cfg in fitting:
        every = cfg * context
        free = (every, 0) if every > 1 and pipeline == 1 and wanted.experts != 0 else (0,)
        found += [(cfg, shard) for shard in (free if wanted.shard is None else (wanted.shard,))]
    return found


def _generation_problems(job: Job, wanted: Search, layout: InferenceLayout, asked: tuple[int, int]) -> list[str]:
    """Return what the generation program says about a layout for ``asked`` (context ranks, sharding size)."""
    context, shard = asked
    if context % layout.ulysses:
        return [f"ulysses degree {layout.ulysses} does not divide context {context}"]
    found = layout.streaming_problems() if wanted.experts == 0 else []
    found += wanted.pipefusion.problems(layout, caches=False, compiles=False)
    found += layout.problems(job.model.num_heads)
    if shard not in (0, layout.cfg * context):
        found.append(f"a generation shards over the {layout.cfg * context} ranks (CFG x context) of a video")
    return found


def _most_on_device(job: Job, wanted: int | None, layout: InferenceLayout) -> Layout | Refusal:
    """Keep all experts on the device, else one, else two blocks: as the ``--memory auto`` of a generation does."""
    least = 1 if layout.streaming_problems() else 0
    for experts in range(job.experts_of_model, least - 1, -1) if wanted is None else [wanted]:
        job = job.with_changes(experts=min(experts, job.experts_of_model))
        memory = plan_memory(job)
        if _fits(memory, job):
            return Layout(job, memory, plan_duration(job))
    return _too_large(job)


def _fits(memory: MemoryPlan, job: Job) -> bool:
    return memory.total <= USABLE * job.device.memory


def _too_large(job: Job) -> Refusal:
    memory = plan_memory(job)
    peak = memory.peak
    name, size = max(peak.parts.items(), key=lambda part: part[1])
    reason = (f"needs {memory.total / GIB:.1f} GiB, the {job.device.name} has {USABLE * job.device.memory / GIB:.1f} to"
              f" fill ({peak.name}; largest part: {name}, {size / GIB:.1f} GiB)")
    return Refusal(describe(job), reason, memory.total)
