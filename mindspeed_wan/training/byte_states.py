"""Adam moments in 8 bits each (``--optimizer adam8bit``): 2.03 instead of 8 bytes per parameter.

A row of a moment (all that is under one index of dimension 0) is cut into blocks of 256 elements; each keeps its
largest magnitude in fp32 and, per element, the index of a value in [-1, 1] from a fixed table. Both tables are
geometric, so the relative error is the same for large and small elements of a block: neighbours differ by 10 % for the
first moment (127 magnitudes over 5 decades, and zero), by 8 % for the second (255 over 8 decades, and zero).

Three decisions make this train like fp32 (measured in tests/unit/training/test_byte_states.py):

- Values are rounded at random, up or down in proportion, so that the mean is right. A second moment moves by a
  thousandth per step (beta2 = 0.999): rounding to the nearest would never move it at all.
- A second moment that is not zero is never rounded to zero; the step divides by its root.
- Small or one-dimensional tensors (norms, biases, tables) stay in fp32, where nothing is to be gained.

Blocks lie within rows, and FSDP2 cuts between rows, so another number of FSDP2 ranks finds the same blocks. Checkpoints
hold the fp32 values, and storing those again in 8 bits gives the same bytes: a run resumes exactly in any such layout,
and with another optimizer state (fp32, offloaded) from the same files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.training.optimizer import BATCH_BYTES, Moments, in_batches

BLOCK = 256
"""Elements of a row that share a scale."""
SMALLEST = 4096
"""Tensors with fewer elements stay in fp32."""
KINDS = ("exp_avg", "exp_avg_sq")


def geometric_table(count: int, decades: float, *, signed: bool) -> Tensor:
    """Return zero and ``count`` magnitudes from ``10 ** -decades`` to exactly 1, and their negatives; ascending."""
    magnitudes = torch.logspace(-decades, 0, count, dtype=torch.float64)
    magnitudes[-1] = 1.0
    values = torch.cat((torch.zeros(1, dtype=torch.float64), magnitudes))
    if signed:
        values = torch.cat((-magnitudes.flip(0), values))
    return values.float()


TABLES = {
    "exp_avg": geometric_table(127, 5, signed=True),
    "exp_avg_sq": geometric_table(255, 8, signed=False),
}


@dataclass
class Bytes:
    """One moment of one parameter: ``codes`` uint8 like the shard, ``scales`` fp32 ``[rows, blocks in a row]``."""

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes


def _blocks(x: Tensor) -> Tensor:
    """``[R, ...] -> [R, blocks, BLOCK]``; the last block of a row is filled up with zeros."""
    rows = x.flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(1)[:, : shape[1:].numel()].reshape(shape)


def encode(x: Tensor, table: Tensor, generator: torch.Generator | None) -> Bytes:
    """Store ``x`` (fp32, at least two dimensions).

    Args:
        x: values ``[R, ...]``.
        table: ascending, with 0 and 1 in it.
        generator: source of the random rounding, on ``x``'s device; ``None`` rounds to the nearest.
    """
    blocks = _blocks(x)
    scales = blocks.abs().amax(-1)
    share = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    above = torch.bucketize(share, table).clamp_(1, len(table) - 1)  # table[above - 1] < share <= table[above]
    low, high = table[above - 1], table[above]
    up = (share - low) / (high - low)
    drawn = torch.full_like(up, 0.5) if generator is None else torch.rand(
        up.shape, generator=generator, device=up.device)
    codes = above - (up <= drawn).long()
    if table[0] == 0:  # second moments: what is not zero stays above zero
        codes = torch.maximum(codes, (share > 0).long())
    return Bytes(_from_blocks(codes.to(torch.uint8), x.shape), scales)


def decode(stored: Bytes, table: Tensor) -> Tensor:
    """Return the fp32 values of what ``encode`` stored."""
    values = table[_blocks(stored.codes).int()] * stored.scales.unsqueeze(-1)
    return _from_blocks(values, stored.codes.shape)


class ByteStates:
    """Moments in 8 bits on the parameters' device; decoded, updated and encoded again some tensors at a time.

    Args:
        shards: name -> this rank's part of the parameter.
        seed: of the random rounding, which also depends on the parameter's name and the step.
        smallest: tensors with fewer elements stay in fp32.
        batch_bytes: about so much fp32 state is decoded at a time.
    """

    def __init__(self, shards: Mapping[str, Tensor], *, seed: int = 0, smallest: int = SMALLEST,
                 batch_bytes: int = BATCH_BYTES) -> None:
        self._seed, self._batch_bytes = seed, batch_bytes
        self._names = list(shards)
        self._tables: dict[torch.device, dict[str, Tensor]] = {}
        self._whole: dict[str, Moments] = {}
        self._masters: dict[str, Tensor] = {}
        self._stored: dict[str, dict[str, Bytes]] = {}
        for name, shard in shards.items():
            if shard.dim() < 2 or shard.numel() < smallest:
                self._whole[name] = Moments.fresh(shard)
                continue
            if shard.dtype != torch.float32:
                self._masters[name] = shard.float()
            zeros = torch.zeros_like(shard, dtype=torch.float32)
            self._stored[name] = {kind: encode(zeros, self._table(kind, shard.device), None) for kind in KINDS}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all moments."""
        whole = sum(t.nbytes for s in self._whole.values() for t in (s.exp_avg, s.exp_avg_sq))
        return whole + sum(part.nbytes for parts in self._stored.values() for part in parts.values())

    def _table(self, kind: str, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = {kind: table.to(device) for kind, table in TABLES.items()}
        return self._tables[device][kind]

    def _decoded(self, name: str) -> dict[str, Tensor]:
        return {kind: decode(part, self._table(kind, part.codes.device)) for kind, part in self._stored[name].items()}

    def batches(self, names: Sequence[str], step: int) -> Iterator[dict[str, Moments]]:
        """Yield the small tensors, then the others decoded in batches; encode each batch when it comes back."""
        whole = {name: self._whole[name] for name in names if name in self._whole}
        if whole:
            yield whole
        sizes = {n: 8 * self._stored[n]["exp_avg"].codes.numel() for n in names if n in self._stored}
        for batch in in_batches(sizes, self._batch_bytes):
            states = {n: Moments(**self._decoded(n), master=self._masters.get(n)) for n in batch}
            yield states
            for name in batch:
                self._encode(name, states.pop(name), step)

    def _encode(self, name: str, moments: Moments, step: int) -> None:
        for kind in KINDS:
            values: Tensor = getattr(moments, kind)
            seed = zlib.crc32(f"{self._seed}/{step}/{kind}/{name}".encode())
            generator = torch.Generator(values.device).manual_seed(seed)
            self._stored[name][kind] = encode(values, self._table(kind, values.device), generator)

    def masters(self) -> dict[str, Tensor]:
        """Return the live masters."""
        found = {n: s.master for n, s in self._whole.items() if s.master is not None} | self._masters
        return {name: found[name] for name in self._names if name in found}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live tensors of what is in fp32, and fp32 copies in host memory of the rest.

        In the parameters' order: which of them are small differs between ranks with uneven shards.
        """
        return {name: self._fp32(name) for name in self._names}

    def _fp32(self, name: str) -> dict[str, Tensor]:
        if name in self._whole:
            return {kind: getattr(self._whole[name], kind) for kind in KINDS}
        return {kind: values.cpu() for kind, values in self._decoded(name).items()}

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Encode what was written into those copies, to the nearest: values that came from here keep their codes."""
        for name, parts in self._stored.items():
            for kind, part in parts.items():
                device = part.codes.device
                parts[kind] = encode(moments[name][kind].to(device), self._table(kind, device), None)
