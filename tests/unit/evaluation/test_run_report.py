"""The run report: every curve a run has, nothing it lacks, damaged files named."""

from __future__ import annotations

import argparse
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mindspeed_wan.cli import report
from mindspeed_wan.errors import DataError


def _run_folder(path: Path, loss: float) -> Path:
    path.mkdir(parents=True)
    rows = [{"iteration": i, "consumed_samples": 4 * i, "loss": loss / i, "grad_norm": 1.0, "lr": 1e-4, "sigma": 0.9,
             "seconds": 2.0, "data_seconds": 0.5} for i in range(1, 6)]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 6, "lo')
    (path / "config.json").write_text(json.dumps({"optimizer": {"lr": 1e-4}, "note": "<b>not markup</b>"}))
    (path / "bad_samples.jsonl").write_text(json.dumps({"path": "a.mp4", "reason": "no video stream"}) + "\n")
    return path


def _report(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args([str(a) for a in argv]))


def test_two_runs_share_one_page(tmp_path: Path) -> None:
    runs = [_run_folder(tmp_path / name, loss) for name, loss in (("high", 1.0), ("low", 2.0))]
    out = tmp_path / "page.html"
    _report(*runs, "--out", out)
    text = out.read_text()
    HTMLParser().feed(text)
    assert text.count("<svg") == 6  # loss, gradient norm, lr, seconds, data wait, sigma; no memory or validation curve
    assert "5 iterations, last loss 0.2000" in text and "no video stream" in text
    assert "<b>not markup" not in text and "http" not in text.split("<svg")[0]


def test_damaged_and_missing_runs_are_named(tmp_path: Path) -> None:
    run = _run_folder(tmp_path / "run", 1.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", lines[1]]))
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        _report(run)
    with pytest.raises(DataError, match="holds no metrics.jsonl"):
        _report(tmp_path)
