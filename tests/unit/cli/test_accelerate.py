"""`mindspeed-wan accelerate`: candidates beside the exact run, the report, the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_wan.cli import accelerate
from mindspeed_wan.cli.accelerate import parse_candidate, suite
from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.evaluation import acceleration
from mindspeed_wan.evaluation.acceleration import Run, Thresholds, summarise
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder

EXACT = ["--size", "48*32", "--frame_num", "5", "--device", "cpu", "--dtype", "fp32", "--sample_steps", "10"]
PROMPTS = ["--prompt", "a red circle moves left", "two"]


def _accelerate(out: Path, *options: str, words: tuple[str, ...] = ()) -> int | None:
    return dispatch(["accelerate", "--out", str(out), *options, str(tiny_pipeline_folder()), *PROMPTS, *EXACT, *words])


def _results(out: Path) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in json.loads((out / "acceleration.json").read_text())["candidates"]}


def test_named_candidates_and_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--try", "never=--step_cache magcache --cache_table {table} --cache_threshold 1e-9",
               "--try", "skip=--cfg_skip_ratio 0.5", "--try", "more=--sample_steps 10 --dtype bf16"]
    # Options of the command may follow the model as well.
    assert _accelerate(tmp_path, *options, words=("--min-psnr", "15")) == 0
    results = _results(tmp_path)
    assert results["never"]["worst_psnr_db"] == 100 and results["never"]["evaluations_saved"] == 0
    assert results["skip"]["evaluations_saved"] == 0.25 and 15 < results["skip"]["psnr_db"] < 100
    assert results["more"]["psnr_db"] < 100  # the model was loaded again, in another precision
    assert {path.name for path in tmp_path.iterdir()} >= {"exact", "never", "skip", "more", "calibration.json"}
    assert len(list((tmp_path / "exact").glob("*.mp4"))) == 2
    assert "| skip | `--cfg_skip_ratio 0.5` |" in (tmp_path / "acceleration.md").read_text()
    assert "fastest that passes: " in capsys.readouterr().out

    assert _accelerate(tmp_path, *options[:4], "--min-psnr", "99") == 1
    assert "below the threshold: skip\n" in capsys.readouterr().out
    assert _results(tmp_path)["skip"]["failures"][0].endswith("is below 99")


def test_the_suite_on_a_small_model(tmp_path: Path) -> None:
    assert _accelerate(tmp_path, "--min-psnr", "20", words=("--sample_guide_scale", "1,4")) == 0
    record = json.loads((tmp_path / "acceleration.json").read_text())
    names = {result["name"] for result in record["candidates"]} | set(record["left_out"])
    assert names == {candidate.name for candidate in suite(10)}
    assert "skip 0.25" in record["left_out"]  # the low expert is not guided here: nothing is left to skip
    assert _results(tmp_path)["taylorseer 3"]["evaluations_saved"] > 0.1


def test_a_suite_on_few_steps_leaves_out_what_they_cannot_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    few = [candidate for candidate in suite(4) if candidate.name in ("teacache 0.1", "gate")]
    monkeypatch.setattr(accelerate, "suite", lambda steps: few)
    assert _accelerate(tmp_path, words=("--sample_steps", "4")) == 0
    record = json.loads((tmp_path / "acceleration.json").read_text())
    assert "polynomials of 0 experts" in record["left_out"]["teacache 0.1"]
    assert [result["name"] for result in record["candidates"]] == ["gate"]


@pytest.mark.parametrize(("words", "message"), [
    (["--try", "x"], "is not NAME=FLAGS"),
    (["--try", "a=--cfg_gate 2", "--try", "a=--cfg_gate 3"], "the name 'a' is taken"),
    (["--try", "exact=--cfg_gate 2"], "the name 'exact' is taken"),
    (["--try", "a=--cfg_gat 2"], "candidate 'a': unknown flag --cfg_gat; did you mean 'cfg_gate'"),
    (["--step_cache", "taylorseer"], "describe the exact run"),
    (["--save_path", "x"], "the folder of --out"),
    (["--base_seed", "-1"], "repeats the exact run's seeds"),
])
def test_what_cannot_be_compared_is_refused_before_loading(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _accelerate(tmp_path / "out", words=tuple(words))
    assert not (tmp_path / "out").exists()


def test_a_named_candidate_without_an_effect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves out none of the 10 steps"):
        _accelerate(tmp_path, "--try", "none=--cfg_gate 50")


def _ranks(rank: int, world_size: int, out: Path) -> int | None:
    return _accelerate(out, "--try", "gate=--cfg_gate 3", "--min-psnr", "99", words=("--ulysses_size", "2"))


def test_two_ranks_measure_one_video_and_one_of_them_reports(tmp_path: Path) -> None:
    tiny_pipeline_folder()  # written once, before the ranks start
    assert run_ranks(_ranks, 2, tmp_path) == [1, 0]
    assert _results(tmp_path)["gate"]["num_videos"] == 2


def _run(value: int, seconds: float, evaluations: int) -> Run:
    frames = np.full((2, 16, 16, 3), value, dtype=np.uint8)
    return Run(frames=frames, seconds=seconds, evaluations=evaluations, peak_bytes=2**30)


def test_the_arithmetic_of_a_result() -> None:
    exact = [_run(100, 2.0, 40), _run(100, 4.0, 40)]
    result = summarise("c", "--x", [_run(100, 1.0, 20), _run(110, 1.0, 40)], exact, Thresholds(min_speedup=4))
    assert (result.speedup, result.evaluations_saved, result.seconds, result.peak_gib) == (3.0, 0.25, 2.0, 1.0)
    assert result.worst_psnr_db == pytest.approx(20 * np.log10(255 / 10)) and result.psnr_db > result.worst_psnr_db
    assert result.failures == ("speed-up 3 is below 4",)
    passing = summarise("d", "--y", exact, exact, Thresholds())
    assert acceleration.fastest_passing([result, passing]) == passing
    assert acceleration.fastest_passing([result]) is None
    assert parse_candidate("a b=--prompt 'x y'").words == ("--prompt", "x y")
