"""Is this adapter file whole, which model and expert is it for, and does it do on this device what it should?

The checks, in order: the bytes (stand-ins, truncation, hash), the structure (names, shapes, ranks, alphas, holes), the
values (NaN, zeros, outliers), the device (every tensor there and back), the merge (every module in fp32 on the device
against fp64 on the CPU, error relative to the *change*, since an absolute bound above the change cannot fail), and the
forward pass of one block with the adapter beside the weights and inside them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.manifest import disk_error, hash_file, write_text_atomic
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.lora.block_parity import block_parity
from mindspeed_wan.lora.expert import expert_of
from mindspeed_wan.lora.formats import LoraFile, read_lora
from mindspeed_wan.lora.formats.reader import find_file
from mindspeed_wan.lora.merge import MergeLoss, change_of_rows, row_chunks, touched_parameters
from mindspeed_wan.lora.spec import linear_modules
from mindspeed_wan.models.wan.config import WanConfig

MERGE_TOLERANCE = 1e-3
"""Largest error of an fp32 merge, relative to the change; measured about 1e-5 on weights of std 0.02."""
PARITY_TOLERANCE = 1e-3
"""Largest difference of merged and unmerged forward passes, relative to the change of the output."""
OUTLIER_FACTOR = 100.0
"""A module whose change is this many times the median is suspicious."""
BASE_STD = 0.02
"""Standard deviation of the random base weights that stand in when none are given."""

REWARD_LORA = {"modules": 326, "tensors": 978, "values": 429_171_014, "rank": 128, "alpha": 64.0}
"""The published Wan2.2-Fun reward LoRAs, for ``--expect reward``."""


@dataclass
class Check:
    """One line of the report: ``error`` fails the verification, ``warning`` does not."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    seconds: float = 0.0


@dataclass
class Report:
    """What ``verify`` found; ``write`` makes it a JSON file."""

    path: str
    device: str
    environment: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    file: dict[str, Any] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    round_trip: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    forward_parity: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No check failed."""
        return bool(self.checks) and all(check.status != "error" for check in self.checks)

    @property
    def errors(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "error"]

    def write(self, path: str | Path) -> None:
        """Write the report as JSON."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path.parent) from None
        write_text_atomic(path, json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n")

    def add(self, name: str, problems: Iterable[str], ok: str, *, warnings: Iterable[str] = (), since: float) -> None:
        """Add a check: failed when there are problems, else with its warnings, else ``ok``."""
        problems, warnings = list(problems), list(warnings)
        status: Literal["ok", "warning", "error"] = "error" if problems else "warning" if warnings else "ok"
        self.checks.append(Check(name, status, "; ".join(problems or warnings or [ok]), time.monotonic() - since))


@dataclass(frozen=True)
class Expectation:
    """What the caller knows about the file.

    ``base`` gives the weights for the merge and the block as a function from MM parameter name to tensor.
    """

    expert: str | None = None
    sha256: str | None = None
    reward: bool = False
    alpha_override: float | None = None
    allow_unmatched: bool = False


def verify(
    path: str | Path,
    config: WanConfig,
    device: torch.device | str = "cpu",
    *,
    expect: Expectation | None = None,
    weight: float = 1.0,
    base: Any = None,
) -> Report:
    """Check the adapter file at ``path`` against the model ``config`` on ``device``.

    Args:
        expect: what the caller knows; a mismatch is an error.
        weight: strength used for the merge and the forward pass.
        base: ``checkpoint.stored.TensorFiles`` of the expert it is for; random weights of std 0.02 without.

    Returns:
        The report. Problems of the file are in it, they are not raised.
    """
    expect = expect or Expectation()
    report = Report(str(path), str(device))
    lora = _read(report, path, config, expect)
    if lora is None:
        return report
    _check_structure(report, lora, config, expect, path)
    _check_values(report, lora)
    _check_device(report, lora, torch.device(device))
    if report.passed:
        weights = BaseWeights(config, base)
        _check_merge(report, lora, weights, torch.device(device), weight)
        started = time.monotonic()
        error, block = block_parity(lora, config, weights.read, torch.device(device), weight)
        problems = [] if error <= PARITY_TOLERANCE else [f"block {block}: merged and unmerged differ by {error:.2g}"]
        report.forward_parity = {"block": block, "relative_error": error}
        ok = "no block is adapted" if block is None else f"block {block} merged equals unmerged to {error:.1e}"
        report.add("forward", problems, ok, since=started)
    return report


class BaseWeights:
    """Base weights by MM name: an expert's, or reproducible random ones."""

    def __init__(self, config: WanConfig, files: Any = None) -> None:
        from mindspeed_wan.models.wan.param_map import by_name

        self.files, self.params = files, by_name(config, "mm")

    def read(self, name: str) -> Tensor:
        """Return a parameter in fp32 on the CPU."""
        if self.files is not None:
            return self.files.read(name).float()
        param = self.params[name]
        generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
        values = torch.randn(param.shape, generator=generator) * BASE_STD
        return values + 1.0 if "norm" in name and name.endswith("weight") else values


# ---- the bytes and the structure --------------------------------------------------------------------------------


def _read(report: Report, path: str | Path, config: WanConfig, expect: Expectation) -> LoraFile | None:
    started = time.monotonic()
    try:
        file = find_file(path)
        report.file = {"path": str(file)}
        if file.is_file():
            record = hash_file(file)
            report.file.update(bytes=record.size, sha256=record.sha256)
        lora = read_lora(file, config, alpha_override=expect.alpha_override, allow_unmatched=expect.allow_unmatched)
    except CheckpointError as error:
        report.add("file", [f"{error.message} ({error.fix})" if error.fix else error.message], "", since=started)
        return None
    report.file.update(format=lora.format, metadata=dict(lora.metadata))
    wrong = expect.sha256 and expect.sha256.lower() != record.sha256
    problems = [f"sha256 is {record.sha256}, expected {expect.sha256}"] if wrong else []
    report.add("file", problems, f"{report.file['bytes']:,} bytes, {lora.format}, every key resolved", since=started)
    return lora


def _check_structure(
    report: Report, lora: LoraFile, config: WanConfig, expect: Expectation, path: str | Path
) -> None:
    started = time.monotonic()
    alphas = Counter(adapter.alpha for adapter in lora.adapters.values())
    named = expert_of(lora.metadata, path)
    tensors = 2 * len(lora.adapters) + len(lora.diffs) + (len(lora.adapters) if lora.alpha_source == "stored" else 0)
    values = lora.num_values + (len(lora.adapters) if lora.alpha_source == "stored" else 0)
    report.structure = {
        "modules": len(lora.adapters), "differences": len(lora.diffs), "tensors": tensors, "values": values,
        "ranks": lora.ranks, "alphas": sorted(alphas), "alpha_source": lora.alpha_source, "expert": named,
        "unmatched": list(lora.unmatched), "kinds": lora.kinds,
        "model": {"layers": config.num_layers, "dim": config.dim, "in_channels": config.in_channels},
        "dtypes": sorted({str(a.up.dtype).removeprefix("torch.") for a in lora.adapters.values()}),
    }
    problems = _holes(lora, config)
    if expect.expert and named and named != expect.expert:
        problems.append(f"its metadata or name says it is for the {named}-noise expert, not for the {expect.expert}-"
                        "noise expert")
    if expect.reward:
        problems += _not_the_reward_lora(report.structure)
    warnings = []
    if expect.expert and not named:
        warnings.append(f"neither its metadata nor its name says that it is for the {expect.expert}-noise expert")
    if lora.alpha_source == "default" and lora.adapters:
        warnings.append("no alpha in the file: alpha = rank is assumed (VideoX-Fun's --use_peft_lora files need "
                        "--alpha-override 32 at rank 64)")
    if len(alphas) > 1:
        common, _ = alphas.most_common(1)[0]
        odd = [name for name, adapter in lora.adapters.items() if adapter.alpha != common]
        warnings.append(f"alpha of {odd[0]} is {lora.adapters[odd[0]].alpha:g}, of most others {common:g} "
                        f"({len(odd)} such modules)")
    if len(lora.ranks) > 1:
        warnings.append(f"ranks differ: {lora.ranks}")
    if lora.unmatched:
        warnings.append(f"{len(lora.unmatched)} keys were left out, first {lora.unmatched[0]}")
    ok = (f"{len(lora.adapters)} modules, {tensors} tensors, {values:,} values, rank {lora.ranks}, alpha "
          f"{sorted(alphas)} ({lora.alpha_source})")
    report.add("structure", problems, ok, warnings=warnings, since=started)


def _holes(lora: LoraFile, config: WanConfig) -> list[str]:
    """Name blocks and modules that are missing although their like in other blocks are there."""
    modules = linear_modules(config)
    kinds: Counter[str] = Counter()
    present: dict[int, set[str]] = {}
    for mm in lora.adapters:
        module = modules.get(mm)
        if module is not None and module.block is not None:
            kind = mm.split(".", 2)[2]
            kinds[kind] += 1
            present.setdefault(module.block, set()).add(kind)
    if not present or len(present) <= config.num_layers // 2:
        return []  # an adapter for a few chosen blocks
    problems = [f"block {block} has no adapters, the others have" for block in range(config.num_layers)
                if block not in present]
    for kind, count in kinds.items():
        missing = [block for block in present if kind not in present[block]]
        if missing and count > len(present) // 2:
            problems.append(f"blocks.{missing[0]}.{kind} is missing ({count} other blocks have it)")
    return problems


def _not_the_reward_lora(structure: dict[str, Any]) -> list[str]:
    found = {"modules": structure["modules"], "tensors": structure["tensors"], "values": structure["values"],
             "rank": structure["ranks"][0] if len(structure["ranks"]) == 1 else structure["ranks"],
             "alpha": structure["alphas"][0] if len(structure["alphas"]) == 1 else structure["alphas"]}
    return [f"{key} is {found[key]}, the published reward LoRAs have {value}" for key, value in REWARD_LORA.items()
            if found[key] != value]


# ---- values and device ------------------------------------------------------------------------------------------


def _tensors(lora: LoraFile) -> Iterable[tuple[str, Tensor]]:
    for mm, adapter in lora.adapters.items():
        yield f"{mm} down", adapter.down
        yield f"{mm} up", adapter.up
    yield from lora.diffs.items()


def _check_values(report: Report, lora: LoraFile) -> None:
    started = time.monotonic()
    problems, sums = [], {"down": _Moments(), "up": _Moments()}
    for name, tensor in _tensors(lora):
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} has NaN or Inf")
        if name.endswith((" down", " up")):
            sums[name.rpartition(" ")[2]].add(tensor)
    report.statistics = {part: moments.as_dict() for part, moments in sums.items() if moments.count}
    zero = [mm for mm, a in lora.adapters.items() if not bool(a.up.any()) or not bool(a.down.any())]
    warnings = []
    if zero and len(zero) == len(lora.adapters):
        problems.append("every adapter is zero: it was never trained, or the file lost its values")
    elif zero:
        problems.append(f"{zero[0]} is all zero ({len(zero)} such modules), the others are not")
    sizes = {mm: float(a.up.float().norm() * a.down.float().norm()) * a.scale for mm, a in lora.adapters.items()}
    median = statistics.median(sizes.values()) if sizes else 0.0
    large = [mm for mm, size in sizes.items() if median and size > OUTLIER_FACTOR * median]
    if large:
        warnings.append(f"{large[0]} changes {sizes[large[0]] / median:.0f} times as much as the median module")
    report.add("values", problems[:10], "finite, none of them zero", warnings=warnings, since=started)


@dataclass
class _Moments:
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, tensor: Tensor) -> None:
        values = tensor.float()
        self.count += values.numel()
        self.total += float(values.sum(dtype=torch.float64))
        self.squares += float(values.square().sum(dtype=torch.float64))
        self.largest = max(self.largest, float(values.abs().max()))

    def as_dict(self) -> dict[str, float]:
        mean = self.total / self.count
        return {"mean": mean, "std": max(0.0, self.squares / self.count - mean**2) ** 0.5, "max": self.largest}


def _check_device(report: Report, lora: LoraFile, device: torch.device) -> None:
    started = time.monotonic()
    count, problems = 0, []
    for name, tensor in _tensors(lora):
        there_and_back = (tensor.to(device) * 1).cpu()  # computed on, not just copied to, the device
        count += 1
        if not torch.equal(there_and_back.nan_to_num(), tensor.nan_to_num()):
            problems.append(f"{name} comes back changed from {device}")
    report.round_trip = {"tensors": count, "changed": len(problems)}
    report.add("device", problems[:10], f"{count} tensors to {device} and back, bit for bit", since=started)


# ---- merge ------------------------------------------------------------------------------------------------------


def _check_merge(
    report: Report, lora: LoraFile, weights: BaseWeights, device: torch.device, weight: float
) -> None:
    started = time.monotonic()
    errors: dict[str, float] = {}
    problems: list[str] = []
    in_bf16 = MergeLoss()
    for name in touched_parameters([(lora, weight)]):
        error, rounding, loss = _merge_one(lora, name, weights.read(name), device, weight)
        errors[name.removesuffix(".weight")] = error
        in_bf16.include(loss)
        if not error <= MERGE_TOLERANCE + rounding:
            problems.append(f"{name.removesuffix('.weight')}: fp32 merge is off by {error:.2g} of the change")
    worst = max(errors, key=lambda name: errors[name])
    report.merge = {"modules": len(lora.adapters), "parameters": len(errors), "worst": worst,
                    "worst_relative_error": errors[worst], "relative_errors": errors,
                    "base": "expert" if weights.files is not None else f"random, std {BASE_STD}",
                    "in_bf16": in_bf16.as_dict()}
    report.add("merge", problems[:10], f"{len(errors)} parameters in fp32 on {device} against fp64, worst "
               f"{errors[worst]:.1e} of the change ({worst}); a bf16 merge would keep: {in_bf16}", since=started)


def _merge_one(
    lora: LoraFile, name: str, base: Tensor, device: torch.device, weight: float
) -> tuple[float, float, MergeLoss]:
    """Return the error of the fp32 merge on the device, the part of it that rounding to fp32 explains, and what a bf16
    merge loses; both relative to the change.
    """
    error_square = wanted_square = 0.0
    loss = MergeLoss()
    base = base.reshape(base.shape[0], -1)
    for start, stop in row_chunks(base.shape):
        rows, columns = slice(start, stop), slice(0, base.shape[1])
        exact = _exact_change(lora, name, rows, weight)
        change = change_of_rows(name, rows, columns, base.shape, [(lora, weight)], device)
        if change is None:
            raise CheckpointError(f"{name} has no change")
        merged = (base[rows].to(device) + change).cpu()
        error_square += float((merged.double() - base[rows].double() - exact).square().sum())
        wanted_square += float(exact.square().sum())
        stored = base[rows].bfloat16()
        loss.add(exact.float(), stored, (stored.float() + exact.float()).bfloat16())
    if not wanted_square:
        return (float("inf") if error_square else 0.0), 0.0, loss
    rounding = torch.finfo(torch.float32).eps * float(base.double().norm())
    return (error_square / wanted_square) ** 0.5, rounding / wanted_square**0.5, loss


def _exact_change(lora: LoraFile, name: str, rows: slice, weight: float) -> Tensor:
    """Return the change of a parameter's rows in fp64, by other code than the merge's."""
    adapter, diff = lora.adapters.get(name.removesuffix(".weight")), lora.diffs.get(name)
    change = torch.zeros((), dtype=torch.float64)
    if adapter is not None:
        change = adapter.up[rows].double() @ (adapter.down.double() * (weight * adapter.scale))
    if diff is not None:
        change = change + diff[rows].flatten(1).double() * weight if diff.ndim > 1 else (
            change + diff[rows, None].double() * weight)
    return change
