"""Training from cached features: the same samples in the same order as online, without decoding or encoding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.data import feature_cache
from mindspeed_wan.data.bad_samples import BadSample
from mindspeed_wan.data.dataset import Failure, KeyedDataset, give_up
from mindspeed_wan.data.feature_cache import ClipContent, EncoderChoice, Identity
from mindspeed_wan.data.loader import MicroBatch
from mindspeed_wan.data.plan import ClipSettings
from mindspeed_wan.data.sampler import Key
from mindspeed_wan.errors import DataError

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class FeatureSample:
    """One sample from a cache; fields as in ``loader.MicroBatch``, without the batch dimension."""

    index: int
    epoch: int
    source: int
    latents: Tensor
    text: Tensor
    condition: Tensor | None
    caption: str
    path: Path
    bad: tuple[BadSample, ...] = ()


class FeatureDataset(KeyedDataset):
    """Samples of a finished cache by (epoch, index).

    Args:
        folder: the cache.
        seed: of caption choice and dropout; the same as online gives the same captions.
        caption_dropout: probability of the empty caption.

    Raises:
        DataError: no cache, an unfinished one, or a damaged one.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0, caption_dropout: float = 0.0) -> None:
        self.folder = Path(folder)
        self.identity = feature_cache.read_identity(self.folder)
        self.rows = _read_index(self.folder, self.identity)
        shapes = [(row["shape"][0], row["shape"][1], row["shape"][2]) for row in self.rows]
        super().__init__([row["captions"] for row in self.rows], shapes, seed, caption_dropout)

    def __getitem__(self, key: Key) -> FeatureSample | Failure:
        """Return the sample of (epoch, index), or of its replacement when that clip could not be encoded."""
        epoch, index = key
        bad: list[BadSample] = []
        for source in self.candidates(epoch, index):
            row = self.rows[source]
            if "bad" not in row:
                try:
                    return self._sample(epoch, index, source, tuple(bad))
                except DataError as error:
                    row = {**row, "bad": error.message}
            bad.append(BadSample(source, row["content"]["path"], row["where"], row["bad"]))
        return give_up(bad)

    def _sample(self, epoch: int, index: int, source: int, bad: tuple[BadSample, ...]) -> FeatureSample:
        row, variant = self.rows[source], epoch % self.identity.variants
        choice = self.caption_choice(epoch, source)
        name = row["name"]
        text = self._empty_text() if choice is None else self._tensor(row, f"{name}/text/{choice}")
        condition = self._tensor(row, f"{name}/condition/{variant}") if self.identity.task == "i2v" else None
        return FeatureSample(index, epoch, source, self._tensor(row, f"{name}/latents/{variant}"), text, condition,
                             self.caption(source, choice), Path(row["content"]["path"]), bad)

    def _tensor(self, row: dict[str, Any], name: str) -> Tensor:
        path = str(self.folder / "shards" / row["shard"])
        tensor = _read_tensor(path, name)
        if feature_cache.checksum(tensor) != row["crc"][name]:
            raise DataError(f"{name} is not what was written (damaged on disk)", where=path,
                            fix="remove the shard and run features build again")
        return tensor

    def _empty_text(self) -> Tensor:
        return _read_tensor(str(self.folder / feature_cache.EMPTY_TEXT_FILE), "text")

    def damaged(self) -> Iterator[str]:
        """Read every tensor and yield a message for each that is missing or not what was written."""
        for row in self.rows:
            for name in row.get("crc", {}):
                try:
                    self._tensor(row, name)
                except DataError as error:
                    yield str(error).split("\n", 1)[0]

    @staticmethod
    def collate(samples: Sequence[FeatureSample]) -> MicroBatch:
        """Stack samples of one shape."""
        conditions = [sample.condition for sample in samples if sample.condition is not None]
        return MicroBatch(
            keys=[(sample.index, sample.epoch) for sample in samples],
            captions=[sample.caption for sample in samples],
            latents=torch.stack([sample.latents for sample in samples]),
            text=[sample.text for sample in samples],
            condition=torch.stack(conditions) if conditions else None,
            paths=tuple(sample.path for sample in samples),
        )

    def check(self, settings: ClipSettings, task: str, encoders: EncoderChoice) -> None:
        """Refuse a cache that was made from something else than this run would make.

        Args:
            settings: of the run.
            task: of the run.
            encoders: of the run; weights that are not on this machine are not compared.

        Raises:
            DataError: names every difference.
        """
        weights = {**self.identity.weights, **encoders.weights(self.identity.weights)}
        options = {**self.identity.options, **encoders.options()}
        mine = Identity(task, feature_cache.settings_fields(settings), self.identity.seed, self.identity.variants,
                        options, weights)
        found = self.identity.differences(mine)
        if found:
            raise DataError(f"the cache was made differently from what this run asks for ({'; '.join(found)})",
                            where=str(self.folder), fix="build it again, or give the settings it was made with")

    @property
    def text_width(self) -> int:
        """Channels of the text states."""
        return self._empty_text().shape[-1]

    def check_clips(self) -> None:
        """Refuse a cache whose clips have changed since; one ``stat`` a clip (a changed time makes it hash the file).

        Raises:
            DataError: names the first changed clips.
        """
        changed = [row for row in self.rows if feature_cache.is_changed(ClipContent(**row["content"]))]
        if changed:
            names = ", ".join(row["content"]["path"] for row in changed[:3])
            raise DataError(f"{len(changed)} clips changed after they were encoded: {names}", where=str(self.folder),
                            fix="run mindspeed-wan features build again; it encodes only these")


def _read_index(folder: Path, identity: Identity) -> list[dict[str, Any]]:
    path = folder / feature_cache.INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["samples"]
    except FileNotFoundError:
        done = len(list((folder / "shards").glob("*.safetensors")))
        raise DataError(f"the cache is not finished ({done} shards so far)", where=str(folder),
                        fix="run mindspeed-wan features build again; it continues") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged: {error}", where=str(path), fix="remove it and run features build again") from None
    if content.get("key") != identity.key:
        raise DataError("index.json and cache.json belong to different caches", where=str(folder),
                        fix="remove index.json and run features build again")
    if not rows:
        raise DataError("the cache is empty", where=str(folder))
    return rows


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the shard: {str(error).splitlines()[0]}", where=path,
                        fix="remove it and run features build again") from None


def _read_tensor(path: str, name: str) -> Tensor:
    from safetensors import SafetensorError

    try:
        return _open_shard(path).get_tensor(name).clone()
    except SafetensorError as error:
        raise DataError(f"has no {name}: {error}", where=path, fix="remove it and run features build again") from None
