"""The run report: every curve a run has, nothing it lacks, damaged files named."""

from __future__ import annotations

import argparse
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mindspeed_wan.cli import report
from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation import charts


def _run_folder(path: Path, loss: float) -> Path:
    path.mkdir(parents=True)
    rows = [{"iteration": i, "consumed_samples": 4 * i, "loss": loss / i, "grad_norm": 1.0, "lr": 1e-4, "sigma": 0.9,
             "seconds": 2.0, "data_seconds": 0.5, "sigma_counts": [0] * 18 + [3, 1]} for i in range(1, 6)]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 6, "lo')
    (path / "config.json").write_text(json.dumps({"optimizer": {"lr": 1e-4}, "note": "<b>not markup</b>"}))
    line = json.dumps({"path": "a.mp4", "reason": "no video stream"}) + "\n"
    (path / "bad_samples.jsonl").write_text(2 * line)  # found by two starts of the run
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
    # loss, gradient norm, lr, samples/s, seconds, data wait, sigmas; nothing was said about memory or validation
    assert text.count("<svg") == 7
    assert "5 iterations, last loss 0.2000" in text and text.count("no video stream") == len(runs)
    assert "<b>not markup" not in text and "http" not in text.split("<svg")[0]


def _with_validation(run: Path) -> None:
    rows = [{"iteration": i, "loss": 1.0 / i, "quartiles": [0.1, 0.2, None, 0.4],
             "sigma_bounds": [0.9, 0.92, 0.95, 0.98, 1.0]} for i in (2, 4)]
    (run / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = run / "metrics.jsonl"
    metrics.write_text(json.dumps({"iteration": 0, "loss": math.nan, "peak_memory_bytes": 3 * 2**30, "skipped": True})
                       + "\n" + metrics.read_text())
    for i in range(1, 13):
        folder = run / "validation" / f"iter_{i:07d}"
        folder.mkdir(parents=True)
        (folder / "000.mp4").write_bytes(b"video %d" % i)
        (folder / "videos.json").write_text(json.dumps({"note": "at the boundary", "videos": [
            {"file": "000.mp4", "prompt": "a <fox> runs", "image": None}]}))


def test_the_folder_of_both_experts_with_validation(tmp_path: Path) -> None:
    for expert in ("high", "low"):
        _with_validation(_run_folder(tmp_path / expert, 1.0))
    _report(tmp_path, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    HTMLParser().feed(text)
    # beside the above: validation loss, memory, and the validation loss by sigma of each expert
    assert text.count("<svg") == 7 + 4
    assert text.count("<h4>a &lt;fox&gt; runs</h4>") == 2 and text.count("at the boundary") == 2
    assert text.count("<video") == 2 * 8 and "4 of 12 iterations are left out" in text
    assert "addEventListener('play'" in text and "1 left out, last validation loss 0.250000" in text


def test_long_curves_are_thinned_to_means() -> None:
    points = [(i, float(i % 2)) for i in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS and thinned[-1][0] == 9_999
    assert sum(value for _, value in thinned) / len(thinned) == pytest.approx(0.5, abs=0.01)
    assert charts.smooth([(i, 1.0) for i in range(500)])[-1] == (499, pytest.approx(1.0))
    assert max(value for _, value in charts.smooth(points)[1000:]) < 0.51


def test_a_run_named_from_inside_and_a_last_step_without_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                ) -> None:
    run = _run_folder(tmp_path / "$run$", 1.0)
    rows = (run / "metrics.jsonl").read_text().splitlines()[:5]
    (run / "metrics.jsonl").write_text("\n".join([*rows, json.dumps({"iteration": 6, "loss": math.nan})]))
    monkeypatch.chdir(run)
    _report(".", run)
    text = (run / "report.html").read_text()
    assert text.count("<h2>$run$</h2>") == 1 and "6 iterations, last loss 0.2000" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 7


def test_damaged_and_missing_runs_are_named(tmp_path: Path) -> None:
    run = _run_folder(tmp_path / "run", 1.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", lines[1]]))
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        _report(run)
    (run / "metrics.jsonl").write_text(lines[0])
    (run / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json: is not JSON"):
        _report(run)
    with pytest.raises(DataError, match="holds no metrics.jsonl"):
        _report(tmp_path)
