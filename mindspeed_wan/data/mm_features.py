"""MindSpeed-MM's feature folders: ``data.jsonl`` with one ``{"file": "features/x.pt"}`` a line.

A ``.pt`` file is a dict: ``video`` latents [16, f, h, w] (normalised), ``prompt_ids`` text states [L, C] (padded),
``prompt_mask`` [L], for I2V ``i2v_vae_feature`` [20, f, h, w] (mask and first-frame latents); a leading dimension of
size 1 is tolerated. DiffSynth's names (``input_latents``, ``context``, ``y``) are known too. Files are read with
``weights_only``, so no code in them runs.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.data.bad_samples import BadSample
from mindspeed_wan.data.dataset import Failure, KeyedDataset, give_up
from mindspeed_wan.data.features import FeatureDataset, FeatureSample
from mindspeed_wan.data.plan import MODEL_STRIDE, VAE_STRIDE, Shape
from mindspeed_wan.data.records import ClipRecord, Problems, RowSource
from mindspeed_wan.data.sampler import Key
from mindspeed_wan.data.text_files import read_text
from mindspeed_wan.errors import DataError

_LATENTS = ("video", "latents", "input_latents")
_TEXT = ("prompt_ids", "prompt", "context")
_MASK = ("prompt_mask",)
_CONDITION = ("i2v_vae_feature", "y")
_FILE = ("file", "path", "features")
_THREADS = 8


class MMFeatureDataset(KeyedDataset):
    """Samples of a MindSpeed-MM feature folder by (epoch, index).

    Args:
        data_path: its ``data.jsonl``.
        data_folder: what file names are joined to; ``None`` takes the folder of ``data_path``.
        task: ``i2v`` also wants the condition.
        channels, text_width, text_length: of the latents and text states that the model reads; ``None`` takes any.
        seed: of replacements. A caption cannot be dropped: the folder has no states of the empty caption.

    Attributes:
        unreadable: the files without readable latents, each with its reason.

    Raises:
        DataError: rows without a file, files that are missing (all are listed), or none that can be read.
    """

    def __init__(self, data_path: Path, data_folder: Path | None = None, *, task: str = "t2v", seed: int = 0,
                 channels: int | None = None, text_width: int | None = None, text_length: int | None = None) -> None:
        self.task, self.channels, self.text_width, self.text_length = task, channels, text_width, text_length
        problems = Problems()
        rows = _read_rows(data_path, data_folder or data_path.parent, problems)
        problems.raise_if_any()
        if not rows:
            raise DataError("no samples", where=str(data_path))
        self.records: list[ClipRecord] = []
        self.unreadable: list[tuple[ClipRecord, str]] = []
        shapes: list[Shape] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for record, shape in zip(rows, pool.map(lambda record: self._shape_of(record.path), rows)):
                if isinstance(shape, str):
                    self.unreadable.append((record, shape))
                else:
                    self.records.append(record)
                    shapes.append(shape)
        if not self.records:
            record, reason = self.unreadable[0]
            raise DataError(f"none of the {len(rows)} files can be read, e.g. {reason}", where=record.where)
        super().__init__([record.captions for record in self.records], shapes, seed, 0.0)

    def __getitem__(self, key: Key) -> FeatureSample | Failure:
        """Return the sample of (epoch, index), or of its replacement when that file cannot be read."""
        epoch, index = key
        bad: list[BadSample] = []
        for source in self.candidates(epoch, index):
            try:
                return self._sample(epoch, index, source, tuple(bad))
            except DataError as error:
                record = self.records[source]
                bad.append(BadSample(source, str(record.path), record.where, error.message))
        return give_up(bad)

    def _sample(self, epoch: int, index: int, source: int, bad: tuple[BadSample, ...]) -> FeatureSample:
        file = self.records[source].path
        latents, text, condition = self._tensors(read_features(file), file)
        for tensor in (latents, text, condition):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise DataError("holds values that are not finite", where=str(file))
        return FeatureSample(index, epoch, source, latents.float().clone(), text.clone(),
                             None if condition is None else condition.float(), "", file, bad)

    def _tensors(self, content: Mapping[str, Any], file: Path) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a file's latents, text states and, for I2V, condition latents, all of the sizes the model reads."""
        latents, text = _wanted(content, _LATENTS, 4, "latents", file), _text(content, file)
        for what, found, wanted in (("latents", latents.shape[0], self.channels),
                                    ("text states", text.shape[-1], self.text_width)):
            if wanted is not None and found != wanted:
                raise DataError(f"{file}: the {what} have {found} channels, the model reads {wanted}")
        if self.text_length is not None and len(text) > self.text_length:
            raise DataError(f"{file}: {len(text)} text states, the model reads {self.text_length}")
        frames, height, width = latents.shape[1:]
        if not frames or height * VAE_STRIDE % MODEL_STRIDE or width * VAE_STRIDE % MODEL_STRIDE:
            raise DataError(f"{file}: latents of {frames}x{height}x{width}: sides of clips are multiples of "
                            f"{MODEL_STRIDE} pixels, {MODEL_STRIDE // VAE_STRIDE} latents")
        if self.task != "i2v":
            return latents, text, None
        told = _wanted(content, _CONDITION, 4, "i2v_vae_feature", file)
        # Mask and latents; the mask is the same for every clip and made anew by the training loop.
        condition = told[-latents.shape[0]:]
        if condition.shape != latents.shape:
            raise DataError(f"{file}: i2v_vae_feature has shape {list(told.shape)}, the latents {list(latents.shape)}")
        return latents, text, condition

    def _shape_of(self, file: Path) -> Shape | str:
        """Return the pixel shape of a sample (its tensors are mapped, not read), or why it cannot be had."""
        try:
            frames, height, width = self._tensors(read_features(file), file)[0].shape[1:]
        except DataError as error:
            return error.message
        return (frames - 1) * 4 + 1, height * VAE_STRIDE, width * VAE_STRIDE

    collate = staticmethod(FeatureDataset.collate)


def read_features(file: Path) -> Mapping[str, Any]:
    """Read a ``.pt`` file of features (memory-mapped).

    Raises:
        DataError: absent, damaged, or not a dict.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file} is not a torch file (truncated, or an old pickle)")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe archive
        raise DataError(f"{file} cannot be read: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{file} holds {type(content).__name__}, not a dict of features")
    return content


def _wanted(content: Mapping[str, Any], names: Sequence[str], dims: int, what: str, file: Path) -> Tensor:
    """Return the tensor under one of ``names`` without a leading dimension of size 1."""
    value = next((content[name] for name in names if content.get(name) is not None), None)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor):
        raise DataError(f"{file} has no {what} (found: {', '.join(map(str, content))})")
    while value.dim() > dims and value.shape[0] == 1:
        value = value[0]
    if value.dim() != dims:
        raise DataError(f"{file}: {what} has shape {list(value.shape)}, expected {dims} dimensions")
    if names is not _MASK and not value.is_floating_point():
        raise DataError(f"{file}: {what} is {str(value.dtype).removeprefix('torch.')}, expected floating point")
    return value


def _text(content: Mapping[str, Any], file: Path) -> Tensor:
    states = _wanted(content, _TEXT, 2, "text states", file)
    if not any(content.get(name) is not None for name in _MASK):
        return states
    mask = _wanted(content, _MASK, 1, "prompt_mask", file).bool()
    length = int(mask.sum())
    if len(mask) != len(states) or not length or not bool(mask[:length].all()):
        raise DataError(f"{file}: prompt_mask marks {length} of {len(mask)} places for {len(states)} text states; "
                        "expected the first ones of a prompt")
    return states[:length]


def _read_rows(data_path: Path, folder: Path, problems: Problems) -> list[ClipRecord]:
    records: dict[Path, ClipRecord] = {}
    for number, line in enumerate(read_text(data_path).split("\n"), 1):
        if not line.strip():
            continue
        source = RowSource(str(data_path), number)
        try:
            row = json.loads(line)
            name = next(row[key] for key in _FILE if isinstance(row.get(key), str))
        except (ValueError, AttributeError, StopIteration):
            problems.add('expected {"file": "features/NAME.pt"}', source.where)
            continue
        file = folder / name
        if not file.is_file():
            problems.add(f"{file} does not exist", source.where, "data_folder must be the folder that holds features/")
        elif file in records:
            problems.add(f"{file} is named twice: clips of equal names overwrote each other's features", source.where,
                         "extract the features again, or use mindspeed-wan features build")
        else:
            records[file] = ClipRecord(file, ("",), source, "feature")
    return list(records.values())
