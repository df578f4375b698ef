"""The log line, metrics.jsonl across a resume, and the provenance files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mindspeed_wan.errors import ResourceError
from mindspeed_wan.training.metrics import IterationReport, MetricsWriter, Throughput, log_line, write_provenance


def report(iteration: int, loss: float = 0.5) -> IterationReport:
    return IterationReport(iteration=iteration, consumed_samples=4 * iteration, loss=loss, grad_norm=1.25, lr=1e-5,
                           sigma=0.93, seconds=2.0, data_seconds=0.5)


def test_line_has_the_fields_that_launchers_grep() -> None:
    rates = Throughput(flops_per_sample=3e12, global_batch_size=4, world_size=2, peak_flops=30e12)
    line = log_line(report(7), 5000, rates, skipped=1, peak_memory=3 * 2**30)
    assert re.search(r"iteration +7/5000 \| consumed samples: +28 \|", line)
    assert "elapsed time per iteration (ms): 2000.0 |" in line
    assert "samples/s: 2.000 |" in line
    assert "throughput per GPU (TFLOP/s/GPU): 3.000 |" in line  # 3e12 x 4 / 2 s / 2 ranks
    assert "MFU: 10.0 % |" in line
    assert "data wait: 25.0 % |" in line
    assert "number of skipped iterations:   1 |" in line
    assert "peak memory: 3.00 GiB |" in line


def test_no_mfu_without_a_known_peak() -> None:
    rates = Throughput(flops_per_sample=1.0, global_batch_size=1, world_size=1)
    assert "MFU" not in log_line(report(1), 10, rates, skipped=0, peak_memory=0)


def test_resume_cuts_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start=0)
    for iteration in range(1, 6):
        writer.write(report(iteration))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"iteration": 6, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, start=3)
    writer.write(report(4, loss=9.0))
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 9.0)]
    assert set(rows[0]) >= {"iteration", "consumed_samples", "loss", "grad_norm", "lr", "sigma", "seconds"}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_save_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        MetricsWriter(tmp_path / "file" / "save", start=0)
    with pytest.raises(ResourceError):
        write_provenance(tmp_path / "file" / "save", {})


def test_provenance_names_versions(tmp_path: Path) -> None:
    write_provenance(tmp_path, {"training": {"seed": 1}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"training": {"seed": 1}}
    assert {"torch", "python", "mindspeed-wan"} <= set(json.loads((tmp_path / "versions.json").read_text()))

