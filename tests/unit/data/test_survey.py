"""mindspeed-wan data: a folder becomes a data set, problems are listed, parts divided, numbers counted, clips shown."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mindspeed_wan.cli import data
from mindspeed_wan.data import manifest, survey
from mindspeed_wan.data.records import ClipRecord, Problems, RowSource
from mindspeed_wan.errors import ConfigError, DataError, ResourceError
from tests.helpers.odd_media import damaged_files, numbered_frames, odd_files, write_stream
from tests.helpers.tiny import tiny_clips, tiny_pipeline_folder


def command(*argv: object) -> int:
    """Run ``mindspeed-wan data``."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in argv]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips with captions beside them, one without, one broken, one image."""
    from PIL import Image

    root = tmp_path / "my clips"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "c"):
        write_stream(root / f"{name}.mp4", numbered_frames(9))
        (root / f"{name}.txt").write_text(f"caption of {name}\n", encoding="utf-8")
    Image.fromarray(numbered_frames(1)[0]).save(root / "still.png")
    (root / "still.txt").write_text("a still", encoding="gbk")
    write_stream(root / "mute.mp4", numbered_frames(9))
    (root / "torn.mp4").write_bytes(b"junk")
    (root / "torn.txt").write_text("torn")
    return root


def test_init_makes_a_data_set_that_loads(folder, capsys):
    assert command("init", folder, "--num-frames", 9, "--size", "64x96") == 0
    out = capsys.readouterr().out
    assert "4 clips" in out and "mute.mp4 has no caption" in out and "torn.mp4 cannot open" in out
    records = manifest.load(folder / "data.txt")
    assert [record.path.name for record in records] == ["a.mp4", "c.mp4", "still.png", "b.mp4"]
    assert records[0].captions == ("caption of a",) and records[0].num_frames == 9 and records[0].fps == 24.0
    from mindspeed_wan.config.load import load_files

    section = load_files(data=folder / "data.json").data
    assert (section.num_frames, section.max_height, section.max_width) == (9, 64, 96)


def test_init_with_buckets(folder):
    command("init", folder, "--num-frames", 9, "--size", "64x96", "--buckets")
    from mindspeed_wan.config.load import load_files

    sizes = load_files(data=folder / "data.json").data.size_buckets
    assert len(sizes) == 5 and all(h * w <= 64 * 96 for h, w in sizes)


def test_init_does_not_overwrite_and_gives_captions(folder, tmp_path):
    command("init", folder, "--out", tmp_path / "out", "--caption", "a clip")
    assert len(manifest.load(tmp_path / "out" / "data.txt")) == 5
    with pytest.raises(ConfigError, match="exists"):
        command("init", folder, "--out", tmp_path / "out")
    assert command("init", folder, "--out", tmp_path / "out", "--overwrite") == 0


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["init", "{f}", "--num-frames", "80"], DataError, "use 77 or 81"),
        (["init", "{f}", "--size", "480"], ConfigError, "480x832"),
        (["init", "{f}", "--size", "470x832"], DataError, "use 464 or 480"),
        (["init", "{f}/nowhere"], DataError, "no such folder"),
        (["init", "{f}/empty"], DataError, "no usable clip"),
        (["split", "{f}/data.txt", "--share", "1.5"], ConfigError, "between 0 and 1"),
        (["sheet", "{f}/data.txt", "--limit", "0"], ConfigError, "at least 1"),
        (["stats", "{f}/nothing.jsonl"], DataError, "no such file"),
        (["init", "{f}", "--out", "{f}/a.mp4"], ResourceError, "cannot write"),
        (["split", "{f}/data.txt", "--out", "{f}/a.mp4"], ResourceError, "cannot write"),
        (["check", "{f}/features.json"], ConfigError, "names features"),
    ],
)
def test_mistakes_are_named(folder, argv, error, message):
    (folder / "empty").mkdir()
    command("init", folder)
    text = (folder / "data.json").read_text().replace('"t2v"', '"feature"')
    (folder / "features.json").write_text(text)
    with pytest.raises(error, match=message):
        command(*[word.format(f=folder) for word in argv])


def test_check_lists_every_problem_with_its_line(tmp_path, capsys):
    write_stream(tmp_path / "a.mp4", numbered_frames(9))
    write_stream(tmp_path / "wide.mp4", numbered_frames(9, 16, 640))
    rows = [
        {"path": "a.mp4", "cap": "good"},
        {"path": "a.mp4", "cap": "long", "num_frames": 60},
        {"path": "a.mp4", "cap": "fast", "fps": 60},
        {"path": "a.mp4", "cap": "large", "resolution": [640, 960]},
        {"path": "a.mp4", "cap": "cut", "cut": [4, 40]},
        {"path": "gone.mp4", "cap": "gone"},
        {"path": "a.mp4", "cap": ""},
        {"path": "wide.mp4", "cap": "wide"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.txt").write_text(f"{tmp_path},d.jsonl\n")
    settings = data._data_json(tmp_path / "data.txt", 9, 64, 96)
    (tmp_path / "data.json").write_text(json.dumps(settings))
    assert command("check", tmp_path / "data.json") == 7
    out = capsys.readouterr().out
    expected = {2: "num_frames is 60, the file has 9", 3: "fps is 60", 4: "resolution is 640x960", 5: "cut ends at 40",
                6: "does not exist", 7: "'cap' is empty", 8: "side ratio"}
    for line, text in expected.items():
        assert re.search(rf"d\.jsonl:{line}: .*{text}", out), (line, out)
    assert "d.jsonl:1:" not in out
    assert command("check", tiny_clips() / "data.json", "--decode") == 0


def test_check_of_sixty_damaged_files_names_each(tmp_path, capsys):
    files = damaged_files(tmp_path)
    rows = [{"path": str(path), "cap": name, "num_frames": 21} for name, path in files.items()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("check", tmp_path / "d.jsonl", "--decode") == 7
    out = capsys.readouterr().out
    named = {int(number) for number in re.findall(r"d\.jsonl:(\d+):", out)}
    good = {number for number, name in enumerate(files, 1) if name == "truncated to 99 %"}
    assert named | good == set(range(1, len(files) + 1))


def test_odd_files_have_no_problems(tmp_path, capsys):
    rows = [{"path": str(path), "cap": name} for name, (path, *_) in odd_files(tmp_path).items()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("check", tmp_path / "d.jsonl", "--decode") == 0, capsys.readouterr().out


def _records(count: int, windows: int = 1) -> list[ClipRecord]:
    return [ClipRecord(Path(f"{i}.mp4"), (f"c{i}",), RowSource("f", i * windows + w + 1), cut=(w, w + 9))
            for i in range(count) for w in range(windows)]


@pytest.mark.parametrize(("count", "share", "expected"), [(100, 0.9, 90), (10, 0.9, 9), (2, 0.9, 1), (3, 0.01, 1)])
def test_split_by_source_video(count, share, expected):
    records = _records(count, windows=3)
    first, second = survey.split(records, share, seed=5)
    assert len({record.path for record in first}) == expected and len(first) + len(second) == len(records)
    assert not {record.path for record in first} & {record.path for record in second}
    assert survey.split(records, share, seed=5) == (first, second)
    assert count < 10 or survey.split(records, share, seed=6)[0] != first


def test_split_of_one_video_is_refused():
    with pytest.raises(DataError, match="cannot be split"):
        survey.split(_records(1, windows=5), 0.9, 0)


def test_split_writes_sets_that_load(folder):
    command("init", folder)
    command("split", folder / "data.txt", "--share", "0.5")
    parts = [manifest.load(folder / f"data_{name}.txt") for name in ("train", "val")]
    assert sorted(len(part) for part in parts) == [2, 2]
    assert {record.path for part in parts for record in part} == {
        record.path for record in manifest.load(folder / "data.txt")}


def test_a_split_of_relative_paths_loads_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    rows = [{"path": f"{name}.mp4", "cap": name} for name in ("a", "sub/b", "c", "sub/../a")]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ([], ["--out", "elsewhere"]):
        command("split", Path(folder.name) / "d.jsonl", *out)
        where = tmp_path / out[1] if out else folder
        parts = [manifest.load(where / f"data_{name}.txt") for name in ("train", "val")]
        assert sum(map(len, parts)) == 4
        sources = [{record.path.resolve() for record in part} for part in parts]
        assert not sources[0] & sources[1]  # one video under two names stays on one side


def test_split_keeps_columns_that_json_cannot_hold(folder):
    arrow = pytest.importorskip("pyarrow")
    from datetime import datetime

    from pyarrow import parquet

    rows = [{"path": f"{name}.mp4", "cap": name, "taken": datetime(2024, 1, 2)} for name in ("a", "c")]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "d.parquet")
    command("split", folder / "d.parquet", "--share", "0.5")
    record, = manifest.load(folder / "data_val.txt")
    assert record.extra["taken"].startswith("2024-01-02")


def test_settings_may_be_yaml_and_begin_with_comments(folder, capsys):
    command("init", folder, "--num-frames", 9, "--size", "64x96")
    text = (folder / "data.json").read_text()
    (folder / "data.yaml").write_text(text)
    (folder / "long.json").write_text("// " + "licence " * 1000 + "\n" + text)
    for name in ("data.yaml", "long.json"):
        assert command("check", folder / name) == 0
    assert capsys.readouterr().out.count("4 clips (first frame decoded): 0 problems") == 2


def test_a_name_that_is_not_utf8_is_left_out(folder, capsys):
    shutil.copy(folder / "a.mp4", folder / os.fsdecode("中文.mp4".encode("gbk")))
    assert command("init", folder, "--caption", "x") == 0
    out = capsys.readouterr().out
    assert "5 clips" in out and "has a name that is not UTF-8" in out
    (folder / "data.txt").unlink()
    problems = Problems()
    manifest.collect(folder, None, problems)
    assert any("not UTF-8" in problem.message for problem in problems.found)


def test_an_empty_annotation_is_a_problem(tmp_path, capsys):
    (tmp_path / "d.json").write_text("[]")
    assert command("check", tmp_path / "d.json") == 7
    assert "no clips" in capsys.readouterr().out


def test_statistics(tmp_path, capsys):
    write_stream(tmp_path / "a.mp4", numbered_frames(9))
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    stamps = [0, 25, 100, 125, 300]
    write_stream(tmp_path / "vfr.mp4", numbered_frames(5, 32, 64), stamps=stamps)
    rows = [{"path": "a.mp4", "cap": "one two"}, {"path": "copy.mp4", "cap": "one two"},
            {"path": "vfr.mp4", "cap": "word " * 600}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("stats", tmp_path / "d.jsonl", "--tokenizer", tiny_pipeline_folder() / "tokenizer")
    out = capsys.readouterr().out
    assert "clips: 3 (0 cannot be read)" in out and "frames: 5 to 9, median 9" in out
    assert "64x96 (2), 32x64 (1)" in out and "variable in 1 files" in out
    assert "1 captions occur more than once" in out and "1 (33.3 %) are cut at 512" in out
    assert "1 files have the content of another" in out and "copy.mp4" in out


def test_the_sheet_is_one_file_without_network(tmp_path, capsys):
    write_stream(tmp_path / "a.mp4", numbered_frames(9))
    (tmp_path / "torn.mp4").write_bytes(b"junk")
    rows = [{"path": "a.mp4", "cap": "<b>bold & bright</b>"}, {"path": "torn.mp4", "cap": "torn"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("sheet", tmp_path / "d.jsonl", "--out", tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "http" not in page.lower().replace("http-equiv", "")
    assert "&lt;b&gt;bold &amp; bright" in page and "<b>bold" not in page
    assert 'class="clip bad"' in page and "cannot open" in page
    assert "2 of 2 clips" in capsys.readouterr().out


def test_the_sheet_is_limited(tmp_path):
    command("sheet", tiny_clips() / "data.txt", "--out", tmp_path / "sheet.html", "--limit", 3)
    assert (tmp_path / "sheet.html").read_text().count('class="clip"') == 3


def test_a_long_file_is_decoded_in_pieces(tmp_path):
    path = write_stream(tmp_path / "long.mp4", np.repeat(numbered_frames(50, 16, 32), 3, axis=0))
    clip, = survey.survey([ClipRecord(path, ("x",), RowSource("f", 1))], decode=True)
    assert clip.info is not None and clip.info.num_frames == 150
