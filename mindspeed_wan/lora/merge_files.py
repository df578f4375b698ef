"""Merging adapters into an expert on disk, one run of rows at a time: memory does not grow with the model.

The source is anything ``checkpoint.sources`` understands (Diffusers, Wan-AI's layout, mp_rank files, DCP); the result
is a safetensors folder in the Diffusers or the original layout, committed in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.lock import locked_target
from mindspeed_wan.checkpoint.manifest import commit_folder, disk_error, staging_folder
from mindspeed_wan.checkpoint.sources import check_names_and_shapes, find, open_weights
from mindspeed_wan.checkpoint.stored import TensorFiles
from mindspeed_wan.checkpoint.torch_file import DTYPES, TORCH_TO_CODE
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora.formats.file import LoraFile
from mindspeed_wan.lora.merge import MergeLoss, MergeReport, Weighted, change_of_rows, row_chunks, touched_parameters
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import Layout, Param, parameter_table

SHARD_BYTES = 5_000_000_000
STEM = "diffusion_pytorch_model"
_HEADER_ALIGNMENT = 8


@dataclass
class FileMerge:
    """What ``merge_files`` did."""

    folder: Path
    report: MergeReport
    seconds: float = 0.0
    bytes_written: int = 0
    shards: list[str] = field(default_factory=list)


def merge_files(
    base: str | Path,
    loras: list[tuple[LoraFile, float]],
    target: str | Path,
    config: WanConfig,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout = "hf",
    shard_bytes: int = SHARD_BYTES,
    on_parameter: Callable[[str, int, int], None] | None = None,
) -> FileMerge:
    """Write ``base`` with ``loras`` merged into it to the folder ``target``.

    Args:
        loras: adapter files and their weights.
        dtype: of the result; default each parameter's own (see the report for what bf16 loses).
        layout: ``hf`` (a ``transformer/`` folder) or ``original`` (Wan-AI's).
        shard_bytes: size of one safetensors file.
        on_parameter: progress, called with (name, index, total).

    Raises:
        CheckpointError: base weights that are not this model's.
        ConfigError: target equals base, another layout, or a target that another process is writing.
        ResourceError: the disk is full or not writable.
    """
    base, target = Path(base), Path(target)
    if layout not in ("hf", "original"):
        raise ConfigError(f"layout {layout!r} cannot be written here", fix="use hf or original, then mm-convert")
    if os.path.realpath(target) == os.path.realpath(find(base).path):
        raise ConfigError(f"target {target} is the base itself", fix="choose another folder")
    started = time.monotonic()
    with locked_target(target), open_weights(find(base), config) as files:
        check_names_and_shapes(files, {p.mm: p.shape for p in parameter_table(config)}, config)
        job = _Job(files, loras, config, layout, dtype)
        staging = staging_folder(target)
        try:
            job.write(staging, shard_bytes, on_parameter)
            commit_folder(staging, target)
        except OSError as error:
            raise disk_error(error, staging) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # after a failure: tens of GB on a disk that is full
    job.result.folder, job.result.seconds = target, time.monotonic() - started
    return job.result


class _Job:
    def __init__(
        self, files: TensorFiles, loras: Weighted, config: WanConfig, layout: Layout, dtype: torch.dtype | None
    ) -> None:
        self.files, self.loras, self.config, self.layout, self.dtype = files, loras, config, layout, dtype
        self.touched = touched_parameters(loras)
        self.params = parameter_table(config)
        self.result = FileMerge(Path(), MergeReport())
        unknown = [name for name in self.touched if name not in files.tensors]
        if unknown:
            raise CheckpointError(f"the base has no {unknown[0]}, which an adapter changes")

    def code(self, param: Param) -> str:
        """Return the dtype code that ``param`` is written in; fp8 bases become bf16."""
        if self.dtype is None:
            stored = self.files.tensors[param.mm]
            return "BF16" if stored.is_fp8 else stored.code
        return TORCH_TO_CODE[str(self.dtype).removeprefix("torch.")]

    def write(self, folder: Path, shard_bytes: int, on_parameter: Callable[[str, int, int], None] | None) -> None:
        """Write every shard, the index and the configuration."""
        shards = self._plan(shard_bytes)
        weight_map: dict[str, str] = {}
        done = 0
        for number, shard in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            name = f"{STEM}{part}.safetensors"
            weight_map.update({param.name(self.layout): name for param in shard})
            self.result.shards.append(name)
            with open(folder / name, "wb") as stream:
                stream.write(self._header(shard))
                for param in shard:
                    if on_parameter is not None:
                        on_parameter(param.mm, done, len(self.params))
                    self._write_parameter(param, stream)
                    done += 1
                self.result.bytes_written += stream.tell()
        if len(shards) > 1:
            total = sum(self._size(param) for param in self.params)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / f"{STEM}.safetensors.index.json", index)
        card = self.config.to_diffusers() if self.layout == "hf" else self.config.to_original()
        _write_json(folder / "config.json", card)

    def _size(self, param: Param) -> int:
        count = 1
        for size in param.shape:
            count *= size
        return count * DTYPES[self.code(param)][1]

    def _plan(self, shard_bytes: int) -> list[list[Param]]:
        shards: list[list[Param]] = [[]]
        filled = 0
        for param in self.params:
            size = self._size(param)
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(param)
            filled += size
        return shards

    def _header(self, shard: list[Param]) -> bytes:
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for param in shard:
            end = offset + self._size(param)
            table[param.name(self.layout)] = {
                "dtype": self.code(param), "shape": list(param.shape), "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _write_parameter(self, param: Param, stream: IO[bytes]) -> None:
        dtype = getattr(torch, DTYPES[self.code(param)][0])
        loss = MergeLoss() if param.mm in self.touched else None
        for before, rows in self._chunks(param):
            after = before.to(dtype)
            if loss is not None:
                columns = slice(0, before[0].numel())
                wanted = change_of_rows(param.mm, rows, columns, param.shape, self.loras, "cpu")
                assert wanted is not None
                flat = before.reshape(before.shape[0], -1)
                after = (flat.float() + wanted).to(dtype).reshape(before.shape)
                # Widening the dtype is exact, so the loss is that of the merge alone.
                loss.add(wanted, flat, after.reshape(flat.shape))
            stream.write(_raw(after))
        if loss is not None:
            self.result.report.losses[param.mm] = loss

    def _chunks(self, param: Param) -> Iterator[tuple[Tensor, slice]]:
        others = [slice(0, size) for size in param.shape[1:]]
        for start, stop in row_chunks(param.shape):
            yield self.files.read(param.mm, [slice(start, stop), *others]), slice(start, stop)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
