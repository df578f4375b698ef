"""From folders of videos to tables, score and pages, through the command line."""

from __future__ import annotations

import argparse
import csv
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest

from mindspeed_wan.cli import eval as eval_command
from mindspeed_wan.errors import DataError, WanError
from mindspeed_wan.evaluation import charts, html
from mindspeed_wan.evaluation.frames import find_videos
from mindspeed_wan.evaluation.score import CRITERIA, read_ratings, score


def _write_video(path: Path, offset: int, *, fps: int = 8, num_frames: int = 5, width: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for i in range(num_frames):
            image = np.full((48, width, 3), 60, np.uint8)
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
    assert good["subjective"] == pytest.approx(17.0) and (good["num_ratings"], poor["num_ratings"]) == (2, 1)
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("m,a,5,4,4", "header's 6 values"),
        ("m,a,b,5,4,4,5", "header's 6 values"),  # a comma in a name that nobody quoted would move the points
        ("m,a,5,4,4,good", "whole numbers"),
        ("m,a,5,4,4,6", "between 1 and 5"),
        (f"m,{'a' * 200_000},5,4,4,5", "not a CSV"),
    ],
    ids=["short", "long", "word", "six", "endless"],
)
def test_bad_ratings_are_named_with_their_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(",".join(("model", "clip", *CRITERIA)) + f"\n\nm,b,1,2,3,4\n{row}\n")
    csv.field_size_limit(1 << 24)  # as after reading annotations
    with pytest.raises(DataError, match=message) as caught:
        read_ratings(path)
    assert f"{path}:{3 if message == 'not a CSV' else 4}" in str(caught.value)


@pytest.mark.parametrize("head", ["model,clip", ",".join(("model", "clip", *CRITERIA, CRITERIA[0]))])
def test_a_rating_sheet_with_other_columns_is_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f"{head}\n{','.join(['1'] * len(head.split(',')))}\n")
    with pytest.raises(DataError, match="needs a header with model,clip"):
        read_ratings(path)


def test_what_was_not_compared_alike_is_said(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_video(folders / "good" / "a.mp4", 1, fps=16)
    _write_video(folders / "good" / "b.mp4", 1, num_frames=3, width=80)
    _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}", "--out", folders / "out")
    told = capsys.readouterr().out
    for text in ("1 of 2 clips have another frame rate than the reference (a: 16 against 8 frames a second)",
                 "another length than the reference (b: 3 against 5 frames)", "another size than the reference (b)"):
        assert text in told and text in (folders / "out" / "comparison.html").read_text()
    rows = {row["clip"]: row for row in csv.DictReader((folders / "out" / "clips.csv").open())}
    assert (rows["b"]["compared_frames"], rows["b"]["resized"], rows["a"]["resized"]) == ("3", "True", "False")


@pytest.mark.parametrize("rating", ["godo,a", "good,c"])
def test_ratings_of_what_is_not_compared_are_refused(folders: Path, rating: str) -> None:
    ratings = folders / "ratings.csv"
    ratings.write_text(",".join(("model", "clip", *CRITERIA)) + f"\ngood,a,5,4,4,5\n{rating},1,1,1,1\n")
    with pytest.raises(DataError, match=rating.replace(",", "/")):
        _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}", "--ratings", ratings)


def test_two_videos_of_one_name_are_refused_and_hidden_files_left_out(folders: Path) -> None:
    (folders / "good" / "._a.mp4").write_bytes(b"what another system keeps about a file")
    assert list(find_videos(folders / "good")) == ["a", "b"]
    (folders / "good" / "a.mov").write_bytes((folders / "good" / "a.mp4").read_bytes())
    with pytest.raises(DataError, match=r"both a\.mov and a\.mp4"):
        find_videos(folders / "good")


def test_a_file_name_that_no_page_can_hold_is_refused(folders: Path) -> None:
    (folders / "good" / "a.mp4").rename(folders / "good" / os.fsdecode("\u6d4b.mp4".encode("gbk")))
    with pytest.raises(DataError, match="name is not UTF-8") as caught:
        find_videos(folders / "good")
    str(caught.value).encode()


def test_a_legend_names_every_series() -> None:
    assert charts.grouped("score", {"_base": {"score": 0.5}, "tuned": {"score": 0.6}}).count("_base</text>") == 1


def test_pages_show_hostile_names_and_load_nothing(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "'<script>alert(1)<b> #1 50%? $x_$ \u6d4b"
    model = folders / "models" / name
    model.mkdir(parents=True)
    (folders / "good" / "a.mp4").rename(model / f"{name}.mp4")
    (model / f"{name}.json").write_text(json.dumps({"prompt": "a fox & <i>a hen</i>"}))
    monkeypatch.setattr(html, "PAGE_LIMIT_BYTES", 0)
    _run("--model", f"{name}={model}", "--out", folders / "out")
    for page in ("comparison.html", "rating.html"):
        found = _Page()
        found.feed((folders / "out" / page).read_text())
        assert "a fox & <i>a hen</i>" in found.text and name in found.text and "i" not in found.tags
        assert found.tags.count("script") == 1
        (source,) = found.sources
        assert (folders / "out" / unquote(source)).samefile(model / f"{name}.mp4")


class _Page(HTMLParser):
    """What a page holds: its tags, its text, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage"])
def test_a_bad_video_is_one_clear_error(folders: Path, kind: str) -> None:
    video = folders / "good" / "a.mp4"
    video.unlink()
    if kind != "missing":
        video.write_bytes(b"" if kind == "empty" else b"not a video" * 100)
    with pytest.raises(WanError, match=r"a\b"):
        _run("--reference", folders / "reference", "--model", f"good={folders / 'good'}", "--out", folders / "out")
