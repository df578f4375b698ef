"""From folders of videos to tables, score and pages, through the command line."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest

from mindspeed_wan.cli import eval as eval_command
from mindspeed_wan.errors import DataError, WanError
from mindspeed_wan.evaluation.score import CRITERIA, read_ratings, score


def _write_video(path: Path, offset: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(5):
            image = np.full((48, 64, 3), 60, np.uint8)
            image[10:30, 5 + 4 * i + offset : 20 + 4 * i + offset] = (200, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for clip in ("a", "b"):
        _write_video(tmp_path / "reference" / f"{clip}.mp4", 0)
        _write_video(tmp_path / "good" / f"{clip}.mp4", 1)
        _write_video(tmp_path / "poor" / f"{clip}.mp4", 8)
    return tmp_path


def _run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    eval_command.add_arguments(parser)
    return eval_command.run(parser.parse_args([str(a) for a in argv]))


def test_two_models_side_by_side(folders: Path) -> None:
    ratings = folders / "ratings.csv"
    ratings.write_text(",".join(("model", "clip", *CRITERIA)) + "\ngood,a,5,4,4,5\ngood,b,4,4,4,4\npoor,a,1,2,2,1\n")
    out = folders / "out"
    assert _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}",
                "--model", f"poor={folders / 'poor'}", "--ratings", ratings, "--out", out) == 0
    good, poor = json.loads((out / "summary.json").read_text())
    assert good["psnr_db"] > poor["psnr_db"] and good["ssim"] > poor["ssim"]
    assert good["subjective"] == pytest.approx(17.0)
    assert good["score"] == pytest.approx(score(17.0, good["psnr_db"], good["ssim"])) and good["score"] > poor["score"]
    assert len(list(csv.DictReader((out / "clips.csv").open()))) == 4
    assert (out / "comparison.html").read_text().count("<video") == 2 * 3
    assert (out / "rating.html").read_text().count("<select") == 4 * len(CRITERIA)


def test_known_score() -> None:
    assert score(20, 50, 1.0) == 1.0
    assert score(10, 25, 0.5) == 0.5
    assert score(20, 100, 1.0) == 1.0  # identical frames do not lift the score above 1


def test_every_mismatch_is_named(folders: Path) -> None:
    (folders / "good" / "b.mp4").rename(folders / "good" / "c.mp4")
    with pytest.raises(DataError, match="lacks b and has no reference for c"):
        _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}", "--out", folders / "out")
    assert not (folders / "out").exists()


@pytest.mark.parametrize(("row", "message"), [("m,a,5,4,4", "whole numbers"), ("m,a,5,4,4,6", "between 1 and 5")])
def test_bad_ratings_are_named_with_their_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(",".join(("model", "clip", *CRITERIA)) + f"\n{row}\n")
    with pytest.raises(DataError, match=message) as caught:
        read_ratings(path)
    assert f"{path}:2" in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage"])
def test_a_bad_video_is_one_clear_error(folders: Path, kind: str) -> None:
    video = folders / "good" / "a.mp4"
    video.unlink()
    if kind != "missing":
        video.write_bytes(b"" if kind == "empty" else b"not a video" * 100)
    with pytest.raises(WanError, match=r"a\b"):
        _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}", "--out", folders / "out")
