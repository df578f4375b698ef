"""What a run reports: Megatron's log line, ``<save>/metrics.jsonl``, TensorBoard, and what produced them.

Only rank 0 writes. ``metrics.jsonl`` holds one line per iteration, ``validation.jsonl`` one per evaluation; a resumed
run cuts off the lines after the checkpoint it starts from, so the files are always one history of one model.
"""

from __future__ import annotations

import json
import platform as python_platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mindspeed_wan import __version__
from mindspeed_wan.checkpoint.manifest import disk_error, write_text_atomic

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
GIB = 2**30
_PACKAGES = ("torch", "torch_npu", "megatron-core", "mindspeed", "diffusers", "transformers", "safetensors", "av",
             "decord", "decord2", "numpy", "pydantic")


@dataclass(frozen=True, kw_only=True)
class IterationReport:
    """One optimizer step, as seen by the whole job.

    ``loss`` is the mean over the global batch, ``grad_norm`` the norm before clipping, ``sigma`` the mean noise
    fraction, ``seconds`` wall time of the step, ``data_seconds`` the part of it spent waiting for data.
    ``skipped`` is true when the update was left out because the gradient was not finite; ``peak_memory_bytes`` is the
    most device memory of the first rank so far; ``sigma_counts`` how many samples fell into each of 20 equal bins of
    sigma.
    """

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float
    sigma: float
    seconds: float
    data_seconds: float = 0.0
    skipped: bool = False
    peak_memory_bytes: int = 0
    sigma_counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What turns seconds into rates.

    Args:
        flops_per_sample: forward and backward of one sample (``models.wan.flops.training_flops``).
        global_batch_size: samples per iteration.
        world_size: ranks; TFLOP/s is per rank, as Megatron prints it.
        peak_flops: of one device in the compute dtype, when known.
    """

    flops_per_sample: float
    global_batch_size: int
    world_size: int
    peak_flops: float | None = None

    def samples_per_second(self, seconds: float) -> float:
        """Return samples per second of the whole job."""
        return self.global_batch_size / max(seconds, 1e-9)

    def flops_per_second(self, seconds: float) -> float:
        """Return FLOP per second and device."""
        return self.flops_per_sample * self.samples_per_second(seconds) / self.world_size

    def mfu(self, seconds: float) -> float | None:
        """Return the fraction of the device's peak, ``None`` when the peak is not known."""
        return self.flops_per_second(seconds) / self.peak_flops if self.peak_flops else None


def log_line(report: IterationReport, total: int, rates: Throughput, *, skipped: int, peak_memory: int) -> str:
    """Return one line in Megatron's form: its field names first (scripts that grep them keep working), then ours.

    Args:
        report: the iteration; ``seconds`` and ``data_seconds`` may be averages over the logging interval.
        total: iterations of the whole run.
        rates: converts seconds into throughput.
        skipped: updates left out so far.
        peak_memory: bytes of device memory this rank used at most.
    """
    width = len(str(total))
    mfu = rates.mfu(report.seconds)
    fields = [
        f"iteration {report.iteration:>{width}}/{total}",
        f"consumed samples: {report.consumed_samples:>12}",
        f"elapsed time per iteration (ms): {report.seconds * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {rates.flops_per_second(report.seconds) / 1e12:.3f}",
        f"learning rate: {report.lr:.6E}",
        f"global batch size: {rates.global_batch_size:>5}",
        f"loss: {report.loss:.6E}",
        f"grad norm: {report.grad_norm:.6E}",
        f"number of skipped iterations: {skipped:>3}",
        f"samples/s: {rates.samples_per_second(report.seconds):.3f}",
        *([f"MFU: {100 * mfu:.1f} %"] if mfu is not None else []),
        f"mean sigma: {report.sigma:.4f}",
        f"data wait: {100 * report.data_seconds / max(report.seconds, 1e-9):.1f} %",
        f"peak memory: {peak_memory / GIB:.2f} GiB",
    ]
    return f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] " + " | ".join(fields) + " |"


class MetricsWriter:
    """Writes ``metrics.jsonl`` and TensorBoard events of one run (rank 0).

    Args:
        folder: the save folder; created when missing.
        start: iterations already done; later lines of an earlier attempt are dropped.
        tensorboard_dir: where events go; ``<folder>/tensorboard`` by default.
    """

    def __init__(self, folder: str | Path, *, start: int, tensorboard_dir: str | Path | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / METRICS_FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, start)
            _drop_after(self.path.with_name(VALIDATION_FILE), start)
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - held open for the whole run
            events = Path(tensorboard_dir) if tensorboard_dir else self.path.parent / "tensorboard"
            self._events = SummaryWriter(str(events), purge_step=start + 1 if start else None)
        except OSError as error:
            raise disk_error(error, self.path) from None

    def write(self, report: IterationReport) -> None:
        """Write one iteration; its line of ``metrics.jsonl`` is on disk when this returns."""
        try:
            self._stream.write(json.dumps(asdict(report)) + "\n")
            self._stream.flush()
        except OSError as error:
            raise disk_error(error, self.path) from None
        for name in ("loss", "grad_norm", "lr", "sigma", "seconds", "peak_memory_bytes"):
            self._events.add_scalar(f"train/{name}", getattr(report, name), report.iteration)

    def validation(self, loss: float, iteration: int, *, quartiles: Sequence[float | None] = (),
                   sigma_bounds: Sequence[float] = ()) -> None:
        """Append one evaluation to ``validation.jsonl`` and TensorBoard.

        Args:
            loss: mean over all samples.
            iteration: of the weights.
            quartiles: the same per quarter of the sigmas, from little to much noise.
            sigma_bounds: the sigmas between them, ends included.
        """
        row = {"iteration": iteration, "loss": loss, "quartiles": list(quartiles), "sigma_bounds": list(sigma_bounds)}
        try:
            with open(self.path.with_name(VALIDATION_FILE), "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise disk_error(error, self.path) from None
        self._events.add_scalar("validation/loss", loss, iteration)
        for part, value in enumerate(quartiles, 1):
            if value is not None:
                self._events.add_scalar(f"validation/loss_sigma_quarter_{part}", value, iteration)

    def close(self) -> None:
        """Flush and close both files."""
        self._stream.close()
        self._events.close()


def _drop_after(path: Path, iteration: int) -> None:
    """Keep the lines up to ``iteration``; a last line torn by a kill is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomic(path, "".join(kept))


def versions() -> dict[str, str]:
    """Return the versions of everything a result depends on; packages that are not installed are left out."""
    found = {"mindspeed-wan": __version__, "python": python_platform.python_version(),
             "platform": python_platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_provenance(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write the resolved ``config.json`` and ``versions.json`` into the save folder."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from None
    write_text_atomic(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    write_text_atomic(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
