"""Which samples make up which global batch: a function of (seed, consumed samples) and of nothing else.

No state is kept, so a run resumes from one number; no rank, worker or process count enters, so every layout sees the
same batches. Clips of one shape form a bucket; a global batch comes from one bucket. Each bucket is an endless stream
of its epochs, each epoch a permutation of its own, so every sample comes exactly once per epoch of its bucket and
nothing is dropped; buckets take turns in proportion to their size, in an order shuffled anew each epoch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from mindspeed_wan.diffusion import randomness
from mindspeed_wan.errors import DataError

Key = tuple[int, int]
"""(epoch, sample index)."""


class GlobalBatchSampler:
    """The order of a data set.

    Args:
        num_samples: size of the data set.
        seed: of the order.
        shuffle: a new permutation each epoch; else the order of the annotations.
        shapes: one hashable per sample; samples of equal shape form a bucket. ``None``: all are equal.
        drop_last: leave out the tail of a bucket's epoch that does not fill a global batch (another tail each epoch),
            instead of letting the batch run on into the next epoch. Buckets smaller than a batch always run on.
        multiples: by shape, how many samples take the place of one (``buckets.batch_multiples``): a global batch of
            that shape is so many times larger, and still counts as one batch in ``consumed``.

    Raises:
        DataError: no samples.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        shuffle: bool = True,
        *,
        shapes: Sequence[Hashable] | None = None,
        drop_last: bool = False,
        multiples: Mapping[Any, int] | None = None,
    ) -> None:
        if num_samples < 1:
            raise DataError("no samples to draw from")
        if shapes is not None and len(shapes) != num_samples:
            raise DataError(f"{len(shapes)} shapes for {num_samples} samples")
        self.num_samples, self.seed, self.shuffle, self.drop_last = num_samples, seed, shuffle, drop_last
        groups: dict[Hashable, list[int]] = {}
        for index in range(num_samples):
            groups.setdefault(shapes[index] if shapes is not None else None, []).append(index)
        self.buckets = [torch.tensor(members) for members in groups.values()]
        self.bucket_shapes = list(groups)
        self.multiples = [(multiples or {}).get(shape, 1) for shape in groups]
        # Permutations are a few megabytes for a million samples; only the current and next epoch are ever needed.
        self._permutation = lru_cache(maxsize=2 * len(self.buckets) + 2)(self._draw_permutation)
        self._turns = lru_cache(maxsize=2)(self._draw_turns)

    def indices(self, consumed: int, global_batch_size: int) -> list[Key]:
        """Return the global batch that follows ``consumed`` samples, as (epoch, sample index) pairs.

        With one bucket and ``drop_last`` off, ``consumed`` may be any number and the batch size may change between
        calls; otherwise ``consumed`` must be a multiple of the batch size, as it is after whole steps.

        Raises:
            DataError: ``consumed`` is not a multiple of the batch size where it has to be.
        """
        if len(self.buckets) == 1 and not self._drops(0, global_batch_size) and self.multiples == [1]:
            return self._stream(0, consumed, global_batch_size)
        step, rest = divmod(consumed, global_batch_size)
        if rest:
            raise DataError(
                f"{consumed} consumed samples are not a whole number of batches of {global_batch_size}: the batch size "
                "changed, and the order of a data set with several shapes depends on it",
                fix="resume with the old global batch size, or start a new run from the weights",
            )
        bucket, turn = self._bucket_at(step, global_batch_size)
        size = global_batch_size * self.multiples[bucket]
        if not self._drops(bucket, global_batch_size):
            return self._stream(bucket, turn * size, size)
        epoch, number = divmod(turn, len(self.buckets[bucket]) // size)
        chosen = self._permutation(bucket, epoch)[number * size : (number + 1) * size]
        return [(epoch, index) for index in chosen]

    def dropped_per_epoch(self, global_batch_size: int) -> dict[Hashable, int]:
        """Return how many samples of each shape an epoch leaves out (only with ``drop_last``)."""
        left = {
            shape: len(self.buckets[number]) % (global_batch_size * self.multiples[number])
            for number, shape in enumerate(self.bucket_shapes)
            if self._drops(number, global_batch_size)
        }
        return {shape: count for shape, count in left.items() if count}

    def _drops(self, bucket: int, batch: int) -> bool:
        return self.drop_last and len(self.buckets[bucket]) >= batch * self.multiples[bucket]

    # ---- inside a bucket ---------------------------------------------------------------------------------------------

    def _stream(self, bucket: int, start: int, count: int) -> list[Key]:
        """Return ``count`` samples of a bucket's endless stream of epochs."""
        size = len(self.buckets[bucket])
        keys: list[Key] = []
        while len(keys) < count:
            epoch, offset = divmod(start + len(keys), size)
            taken = self._permutation(bucket, epoch)[offset : offset + count - len(keys)]
            keys += [(epoch, index) for index in taken]
        return keys

    def _draw_permutation(self, bucket: int, epoch: int) -> list[int]:
        members = self.buckets[bucket]
        if not self.shuffle:
            return members.tolist()
        order = shuffled(len(members), self.seed, epoch, f"order/{bucket}")
        return members[order].tolist()

    # ---- between buckets ---------------------------------------------------------------------------------------------

    def _batches_before(self, epoch: int, batch: int) -> list[int]:
        """Return for each bucket how many batches it gives before ``epoch``: enough to have shown its epochs."""
        counts = []
        for number, members in enumerate(self.buckets):
            size = batch * self.multiples[number]
            whole = epoch * (len(members) // size)
            counts.append(whole if self._drops(number, batch) else -(-epoch * len(members) // size))
        return counts

    def _bucket_at(self, step: int, batch: int) -> tuple[int, int]:
        """Return (bucket, its running batch number) of global batch ``step``."""
        low, high = 0, 1
        while sum(self._batches_before(high, batch)) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._batches_before(middle, batch)) <= step else (low, middle)
        before = self._batches_before(low, batch)
        position = step - sum(before)
        turns = self._turns(low, batch)
        bucket = turns[position]
        return bucket, before[bucket] + turns[:position].count(bucket)

    def _draw_turns(self, epoch: int, batch: int) -> list[int]:
        """Return the buckets of an epoch's batches in their order."""
        before, after = self._batches_before(epoch, batch), self._batches_before(epoch + 1, batch)
        turns = [bucket for bucket, (a, b) in enumerate(zip(before, after)) for _ in range(b - a)]
        order = shuffled(len(turns), self.seed, epoch, "turns").tolist() if self.shuffle else range(len(turns))
        return [turns[i] for i in order]


def shuffled(count: int, seed: int, epoch: int, stream: str) -> torch.Tensor:
    """Return a permutation of ``range(count)`` that is the same on every platform and version of torch."""
    draws = randomness.uniform(count, seed=seed, sample_index=epoch, stream=f"data/{stream}")
    return torch.argsort(draws, stable=True)


def rank_slice(batch: Sequence[Key], rank: int, ranks: int) -> list[Key]:
    """Return data rank ``rank``'s contiguous share of a global batch.

    Raises:
        DataError: the batch does not divide.
    """
    if len(batch) % ranks:
        raise DataError(f"a global batch of {len(batch)} does not divide among {ranks} data ranks")
    share = len(batch) // ranks
    return list(batch[rank * share : (rank + 1) * share])
