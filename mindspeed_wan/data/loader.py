"""Micro-batches of one data rank, in an order that no worker count and no number of ranks changes."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mindspeed_wan.data.bad_samples import BadSample, BadSampleLog
from mindspeed_wan.data.dataset import ClipDataset, Failure, Sample
from mindspeed_wan.data.sampler import GlobalBatchSampler, Key, rank_slice
from mindspeed_wan.errors import DataError
from mindspeed_wan.parallel.failures import lost_worker


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together; all of one shape.

    ``keys``: (sample index, epoch) of each, the name of its randomness. ``video`` [B, 3, F, H, W] uint8 (see
    ``models.vae.unit_range``) and ``captions`` when clips are encoded online; from a feature cache instead ``latents``
    [B, 16, f, h, w] fp32 normalised, ``text`` (unpadded [L_i, C] states) and for I2V ``condition`` [B, 16, f, h, w],
    the latents of the first frame followed by grey.
    """

    keys: list[tuple[int, int]]
    captions: list[str]
    video: Tensor | None = None
    latents: Tensor | None = None
    text: list[Tensor] | None = None
    condition: Tensor | None = None
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who reads what: this data rank's part of every global batch, in micro-batches, from a position on."""

    global_batch_size: int
    micro_batch_size: int = 1
    rank: int = 0
    ranks: int = 1
    consumed: int = 0

    def __post_init__(self) -> None:
        per_pass = self.micro_batch_size * self.ranks
        if self.global_batch_size % per_pass:
            raise DataError(
                f"global batch size {self.global_batch_size} is not a multiple of micro batch size "
                f"{self.micro_batch_size} x {self.ranks} data ranks",
                fix=f"use {max(1, self.global_batch_size // per_pass) * per_pass}",
            )


def micro_batch_keys(sampler: GlobalBatchSampler, schedule: Schedule) -> Iterator[list[Key]]:
    """Yield the keys of this rank's micro-batches for ever, starting after ``schedule.consumed`` samples."""
    consumed = schedule.consumed
    while True:
        batch = sampler.indices(consumed, schedule.global_batch_size)
        mine = rank_slice(batch, schedule.rank, schedule.ranks)
        # A batch of small clips may be a multiple of the usual size; the number of passes stays the same.
        size = schedule.micro_batch_size * (len(batch) // schedule.global_batch_size)
        for start in range(0, len(mine), size):
            yield mine[start : start + size]
        consumed += schedule.global_batch_size


class BadSampleCounter(Protocol):
    """Takes note of clips that could not be read (``bad_samples.BadSampleLog``)."""

    def add(self, samples: Iterable[BadSample]) -> None:
        """Note bad samples; raises ``DataError`` when there are too many."""


class _KeyBatches:
    """Lists of keys as the iterable object that torch's DataLoader wants; it is iterated once."""

    def __init__(self, keys: Iterator[list[Key]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys


def build_loader(
    dataset: Any,
    sampler: GlobalBatchSampler,
    schedule: Schedule,
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str = "fork",
    bad_samples: BadSampleCounter | None = None,
) -> Iterator[MicroBatch]:
    """Return an endless iterator of this rank's micro-batches; see :func:`load_batches` for the other arguments.

    Args:
        dataset: a ``ClipDataset``, or anything with its ``__getitem__`` and a ``collate`` of its own.
        sampler: the order.
        schedule: this rank's part and the position to start from.
    """
    return load_batches(dataset, micro_batch_keys(sampler, schedule), num_workers=num_workers, prefetch=prefetch,
                        pin_memory=pin_memory, start_method=start_method, bad_samples=bad_samples)


def load_batches(
    dataset: Any,
    keys: Iterator[list[Key]],
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str = "fork",
    bad_samples: BadSampleCounter | None = None,
) -> Iterator[MicroBatch]:
    """Return an iterator of the batches with these keys.

    Args:
        dataset: a ``ClipDataset``, or anything with its ``__getitem__`` and a ``collate`` of its own.
        keys: the keys of each batch, all of one shape.
        num_workers: processes that decode ahead; 0 decodes in this one.
        prefetch: micro-batches each worker keeps ready.
        pin_memory: page-locked batches (for CUDA).
        start_method: ``fork`` starts at once; ``spawn`` where forking is not possible.
        bad_samples: counts unreadable clips; ``None`` stops at the first.

    Raises (while iterating):
        DataError: too many unreadable clips.
        ResourceError: a worker process died.
    """
    log: BadSampleCounter = bad_samples or BadSampleLog(None, len(dataset), 0.0)
    collate = getattr(dataset, "collate", collate_clips)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_KeyBatches(keys),  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_as_list,
        pin_memory=False,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_quiet_worker,
    )
    return _checked(_started(loader), collate, log, pin_memory)


def _started(loader: Any) -> Iterator[list[Any]]:
    """Start the workers now, not at the first batch: they decode while the model is still being loaded.

    What a forked worker inherits must never be collected there: a decoder or a process group that waits for its threads
    when it is freed waits for ever in a process that does not have them. Frozen objects are invisible to the collector.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _as_list(samples: Sequence[Any]) -> list[Any]:
    return list(samples)


def _quiet_worker(_: int) -> None:
    """Let the training process alone answer signals: its handlers, inherited by fork, would keep workers alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _checked(samples_of: Any, collate: Any, log: BadSampleCounter, pin_memory: bool) -> Iterator[MicroBatch]:
    while True:
        try:
            samples = next(samples_of)
        except StopIteration:
            return
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise lost_worker(error) from None
        for sample in samples:
            log.add(sample.bad)
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            raise DataError(failed.message, where=failed.where)
        batch = collate(samples)
        yield _pinned(batch) if pin_memory else batch


def collate_clips(samples: Sequence[Sample]) -> MicroBatch:
    """Stack samples of one shape."""
    return MicroBatch(
        keys=[(sample.index, sample.epoch) for sample in samples],
        captions=[sample.caption for sample in samples],
        video=torch.stack([sample.video for sample in samples]),
        paths=tuple(sample.path for sample in samples),
    )


def _pinned(batch: MicroBatch) -> MicroBatch:
    changes = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return MicroBatch(**{**vars(batch), **changes})


__all__ = ["ClipDataset", "MicroBatch", "Schedule", "build_loader", "collate_clips", "load_batches", "micro_batch_keys"]
