"""Every layout of a number of devices: which fit, which are fastest, and why the others are refused.

Legality is ``ParallelDims``'s own, so the planner and the trainer never disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.planning.devices import GIB
from mindspeed_wan.planning.duration import Duration, plan_duration
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.memory import MemoryPlan, plan_memory

MAX_TENSOR = 8
MAX_CONTEXT = 64
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
    """A layout that does not run, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is fixed and what is free; ``None`` means the planner chooses.

    Attributes:
        devices: ranks of the job.
        shard: FSDP2's sharding size; 0 is no FSDP2.
        recomputed: blocks recomputed; ``None`` takes the fewest that fit.
        global_batch: clips per optimizer step; ``None`` is one micro-batch per data rank.
    """

    devices: int
    tensor: int | None = None
    context: int | None = None
    ulysses: int | None = None
    sequence_parallel: bool | None = None
    shard: int | None = None
    recomputed: int | None = None
    global_batch: int | None = None
    cfg: int | None = None


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
    if job.training:
        words.append(f"DP{dims.data}")
        words.append(f"FSDP2/{dims.shard_size}" if job.fsdp2 else "no FSDP2")
        words.append(f"recompute {job.recomputed}/{job.model.num_layers}{' but attention' * job.keep_attention}"
                     f"{' offloaded' * job.offload}")
        words += {"device": [], "host": ["moments on the host"], "bytes": ["8-bit moments"]}[job.states]
        if job.accumulation > 1:
            words.append(f"accumulate {job.accumulation}")
    else:
        words += [f"CFG{job.cfg}"] if job.cfg > 1 else []
        words += ["FSDP2"] if job.fsdp2 else []
        words.append("both experts" if job.experts == 2 else "one expert at a time")
    return " ".join(words)


def search(job: Job, wanted: Search) -> Plan:
    """Return every layout of ``wanted.devices`` for ``job`` (whose ``dims`` do not matter), best first."""
    plan, seen = Plan(), set[tuple[str, str]]()
    for name, outcome in _attempts(job, wanted):
        if isinstance(outcome, Layout):
            plan.layouts.append(outcome)
        elif (name, outcome) not in seen:
            seen.add((name, outcome))
            plan.refused.append(Refusal(name, outcome))
    plan.layouts.sort(key=lambda layout: (layout.seconds_per_clip, layout.memory.total))
    return plan


def _attempts(job: Job, wanted: Search) -> Iterator[tuple[str, Layout | str]]:
    for tensor in _choices(wanted.tensor, wanted.devices, MAX_TENSOR):
        for context in _choices(wanted.context, wanted.devices, MAX_CONTEXT):
            for ulysses in _choices(wanted.ulysses, context, context):
                name = f"TP{tensor} CP{context} Ulysses {ulysses}"
                try:
                    for shard in _shards(wanted, job, tensor, context):
                        dims = _dims(job, wanted, tensor, context, ulysses, shard)
                        dims.validate(num_heads=job.model.num_heads, ffn_dim=job.model.ffn_dim)
                        yield from _variants(job, wanted, dims, fsdp2=shard != 0)
                except ConfigError as error:
                    yield name, error.message


def _choices(fixed: int | None, total: int, limit: int) -> list[int]:
    """Return the fixed degree, or every divisor of ``total`` that is a power of two or takes part in 40 heads."""
    if fixed is not None:
        return [fixed]
    return [n for n in range(1, min(total, limit) + 1) if total % n == 0 and (n & (n - 1) == 0 or n % 5 == 0)]


def _shards(wanted: Search, job: Job, tensor: int, context: int) -> list[int | None]:
    """Sharding sizes worth trying: all of data x context, one node's worth, none (0)."""
    if wanted.shard is not None:
        return [wanted.shard]
    ranks = wanted.devices // tensor
    node = max(1, job.device.per_node // tensor)
    one_node = [node] if job.training and ranks > node and ranks % node == 0 else []
    return [None, *one_node, 0] if ranks > 1 else [0]


def _dims(job: Job, wanted: Search, tensor: int, context: int, ulysses: int, shard: int | None) -> ParallelDims:
    sequence = wanted.sequence_parallel if wanted.sequence_parallel is not None else tensor > 1
    return ParallelDims(world_size=wanted.devices, tensor=tensor, sequence_parallel=sequence, context=context,
                        ulysses=ulysses, shard=shard or (None if shard is None else 1))


def _variants(job: Job, wanted: Search, dims: ParallelDims, *, fsdp2: bool) -> Iterator[tuple[str, Layout | str]]:
    """Yield the layout, or why it is refused: batch, memory."""
    one = job.with_changes(dims=dims, fsdp2=fsdp2)
    if not job.training:
        yield from _generations(one, wanted)
        return
    if wanted.global_batch is not None:
        per_pass = job.micro_batch * dims.data
        if wanted.global_batch % per_pass:
            yield describe(one), f"global batch {wanted.global_batch} is not a multiple of {job.micro_batch} clips" \
                f" x {dims.data} data ranks"
            return
        one = one.with_changes(accumulation=wanted.global_batch // per_pass)
    yield _fit_recompute(one, wanted.recomputed)


def _fit_recompute(job: Job, fixed: int | None) -> tuple[str, Layout | str]:
    """Recompute as few blocks as fit, with or without attention: the faster way."""
    found = [layout for keep in (False, True)
             if (layout := _fewest(job.with_changes(keep_attention=keep), fixed)) is not None]
    if not found:
        most = job.with_changes(recomputed=job.model.num_layers if fixed is None else fixed)
        return describe(most), _too_large(plan_memory(most), job)
    best = min(found, key=lambda layout: (layout.duration.step, layout.memory.total))
    return best.name, best


def _fewest(job: Job, fixed: int | None) -> Layout | None:
    """Return the layout with the fewest recomputed blocks that fits; memory falls with each."""
    low, high = (0, job.model.num_layers) if fixed is None else (fixed, fixed)
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


def _generations(job: Job, wanted: Search) -> Iterator[tuple[str, Layout | str]]:
    data = job.dims.data
    for cfg in [wanted.cfg] if wanted.cfg else [c for c in (1, 2) if data % c == 0]:
        if data % cfg or not 1 <= cfg <= job.guidance:
            yield describe(job), f"{data} ranks besides tensor and context cannot share {cfg} guidance branches"
            continue
        for experts in (2, 1):
            one = job.with_changes(cfg=cfg, experts=experts)
            memory = plan_memory(one)
            if _fits(memory, job):
                yield describe(one), Layout(one, memory, plan_duration(one))
                break
            if experts == 1:
                yield describe(one), _too_large(memory, job)


def _fits(memory: MemoryPlan, job: Job) -> bool:
    return memory.total <= USABLE * job.device.memory


def _too_large(memory: MemoryPlan, job: Job) -> str:
    peak = memory.peak
    name, size = max(peak.parts.items(), key=lambda part: part[1])
    return (f"needs {memory.total / GIB:.1f} GiB, the {job.device.name} has {USABLE * job.device.memory / GIB:.1f} to"
            f" fill ({peak.name}; largest part: {name}, {size / GIB:.1f} GiB)")
