"""The verbs ``inspect`` and ``verify``: what a folder is and what it is good for; whether it is whole; whether two
folders hold the same weights, whatever their formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_wan.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import BOUNDARY, WanConfig
from mindspeed_wan_converters.plan import Weights
from mindspeed_wan_converters.progress import Progress, human
from mindspeed_wan_converters.sources import FORMATS, Source, read_all, recognise
from mindspeed_wan_converters.tensors import Box, SourceFiles, StoredTensor, iter_blocks

_BLOCK = 8 << 20
_GOOD_FOR = {
    "hf": "diffusers' from_pretrained; pretrain --load; generate; convert with hf_to_dcp, hf_to_mm, hf_to_original",
    "original": "Wan-AI's generate.py; convert with original_to_hf, original_to_dcp, original_to_mm",
    "mm": "MindSpeed-MM and pretrain --load; convert with mm_to_dcp, mm_to_hf, resplit",
    "dcp": "pretrain --load in any parallel layout; convert with dcp_to_hf, dcp_to_mm",
}


def inspect(path: Path, expert: str | None, hint: WanConfig | None, *, as_json: bool) -> None:
    """Print what ``path`` is: format, task, sizes, precision, experts, and what can be done with it."""
    source = recognise(path)
    weights = read_all(source, source.format, expert, hint)
    facts = [_facts(name, found, source) for name, found in weights.items()]
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for fact in facts:
        print(f"{fact['path']}")
        for key, value in fact.items():
            if key not in ("path", "config"):
                print(f"  {key:<10} {value}")


def _facts(expert: str | None, found: Weights, source: Source) -> dict[str, Any]:
    config = found.card.config
    codes: dict[str, int] = {}
    for tensor in found.tensors.values():
        codes[tensor.code] = codes.get(tensor.code, 0) + 1
    name = found.card.expert or expert
    version = "2.1" if config.has_image_embedder else "2.2 (or 2.1 T2V)" if config.task == "t2v" else "2.2"
    return {
        "path": str(found.path), "format": f"{FORMATS[source.format]} ({found.note})",
        "model": f"Wan{version} {config.task.upper()}, {config.num_layers} blocks, hidden size {config.dim}, "
                 f"{config.num_heads} heads",
        "expert": name or "not recorded",
        "boundary": found.card.boundary or (BOUNDARY[config.task] if name else None),
        "tensors": len(found.tensors), "parameters": sum(t.nbytes // t.itemsize for t in found.tensors.values()),
        "dtype": ", ".join(f"{code} x {count}" for code, count in sorted(codes.items())),
        "size": human(found.nbytes), "good for": _GOOD_FOR[source.format], "config": config.to_dict(),
    }


def verify(first: Path, second: Path | None, expert: str | None, hint: WanConfig | None, *, quiet: bool) -> None:
    """Check one folder, or compare two; raises ``CheckpointError`` on the first damage or up to ten differences.

    One folder: names, shapes and precision against the model's table, and every file against the manifest (SHA-256)
    when there is one, every tensor against its checksum else. Two folders: same experts, tensors, shapes, precision
    and bytes, in whatever formats and parallel layouts they are stored.
    """
    left = _read(first, expert, hint)
    sealed = [p.parent for p in sorted(first.rglob(MANIFEST_NAME))] if first.is_dir() else []
    for folder in sealed:
        verify_manifest(folder, full=True)
    if second is None:
        if not sealed:
            _read_through(left, quiet=quiet)
        state = "match the manifest" if sealed else "are complete; there is no manifest to compare content with"
        print(f"ok: {sum(len(w.tensors) for w in left.values())} tensors {state}: {first}")
        return
    right = _read(second, expert, hint)
    _compare(left, right, quiet=quiet)
    print(f"ok: {sum(len(w.tensors) for w in left.values())} tensors are equal: {first} and {second}")


def _read(path: Path, expert: str | None, hint: WanConfig | None) -> dict[str | None, Weights]:
    source = recognise(path)
    return read_all(source, source.format, expert, hint)


def _read_through(weights: Mapping[str | None, Weights], *, quiet: bool) -> None:
    """Read every tensor once, which compares the checksums that torch's containers carry."""
    progress = Progress(sum(w.nbytes for w in weights.values()), quiet=quiet, label="reading")
    with SourceFiles() as files:
        for found in weights.values():
            for tensor in found.tensors.values():
                for block in iter_blocks(tensor, Box.whole(tensor.shape), tensor.code, files, _BLOCK):
                    progress.add(block.nbytes)
    progress.finish()


def _compare(left: Mapping[str | None, Weights], right: Mapping[str | None, Weights], *, quiet: bool) -> None:
    pairs = _pair_experts(left, right)
    progress = Progress(sum(a.nbytes for a, _ in pairs), quiet=quiet, label="comparing")
    with SourceFiles() as files:
        for a, b in pairs:
            _compare_one(a, b, files, progress)
    progress.finish()


def _pair_experts(left: Mapping[str | None, Weights],
                  right: Mapping[str | None, Weights]) -> list[tuple[Weights, Weights]]:
    if len(left) == len(right) == 1:
        return [(next(iter(left.values())), next(iter(right.values())))]
    if set(left) != set(right):
        raise CheckpointError(f"one side has {_experts(left)}, the other {_experts(right)}",
                              fix="compare folders with the same experts, or give --expert")
    return [(left[name], right[name]) for name in left]


def _experts(weights: Mapping[str | None, Weights]) -> str:
    return " and ".join(name or "one unnamed expert" for name in weights)


def _compare_one(a: Weights, b: Weights, files: SourceFiles, progress: Progress) -> None:
    where = f"{a.path} and {b.path}"
    if a.card.expert and b.card.expert and a.card.expert != b.card.expert:
        raise CheckpointError(f"different experts: {a.card.expert} and {b.card.expert}", where=where)
    odd = sorted(set(a.tensors) ^ set(b.tensors))
    if odd:
        raise CheckpointError(f"{len(odd)} tensors are on one side only: {', '.join(odd[:10])}", where=where)
    different = []
    for name, tensor in a.tensors.items():
        reason = _difference(tensor, b.tensors[name], files)
        progress.add(tensor.nbytes)
        if reason:
            different.append(f"{name} ({reason})")
    if different:
        more = f" ... and {len(different) - 10} more" if len(different) > 10 else ""
        raise CheckpointError(f"{len(different)} tensors differ: {', '.join(different[:10])}{more}", where=where,
                              fix="convert again, or compare with --dtype unchanged")


def _difference(a: StoredTensor, b: StoredTensor, files: SourceFiles) -> str | None:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} against {list(b.shape)}"
    code = a.output_code
    if code != b.output_code:
        return f"{code} against {b.output_code}"
    box = Box.whole(a.shape)
    for one, other in zip(iter_blocks(a, box, code, files, _BLOCK), iter_blocks(b, box, code, files, _BLOCK),
                          strict=True):
        if not np.array_equal(one.view("u1"), other.view("u1")):  # bits, so that NaN equals itself and -0.0 is not 0.0
            return "values"
    return None
