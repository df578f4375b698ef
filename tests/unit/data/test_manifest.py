"""Annotations: every format gives the same clips; damaged ones are named with file and line, none with a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_wan.data import manifest
from mindspeed_wan.data.manifest import load
from mindspeed_wan.errors import DataError
from tests.helpers.tiny import tiny_clips

CLIPS = [("a.mp4", "a red ball"), ("b.mp4", "a cat, running \"fast\""), ("子/c.mp4", "一只猫在跑")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, _ in CLIPS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def _rows(path="path", cap="cap", **more):
    return [{path: name, cap: text, **more} for name, text in CLIPS]


def _write(root: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (root / name).write_bytes(text.encode(encoding))
    return root / name


def _csv(header: str, extra: str = "") -> str:
    quote = '"{}"'.format
    lines = [f"{name},{quote(text.replace(chr(34), chr(34) * 2))}{extra}" for name, text in CLIPS]
    return "\n".join([header, *lines]) + "\n"


def _jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


SIZED = {"num_frames": 9, "fps": 24}
FORMATS = {
    "MindSpeed-MM json": ("d.json", lambda: json.dumps(_rows(**SIZED, resolution={"height": 4, "width": 6}))),
    "MindSpeed-MM jsonl": ("d.jsonl", lambda: _jsonl(_rows(**SIZED, resolution=[4, 6]))),
    "json with comments": ("d.json", lambda: "// mine\n" + json.dumps(_rows())[:-1] + ",]"),
    "jsonl named json": ("d.json", lambda: _jsonl(_rows())),
    "json named jsonl": ("d.jsonl", lambda: json.dumps(_rows(), indent=1)),
    "DiffSynth csv": ("metadata.csv", lambda: _csv("video,prompt")),
    "DiffSynth csv with extras": ("metadata.csv", lambda: _csv("video,prompt,input_image", ",x.png")),
    "DiffSynth json": ("metadata.json", lambda: json.dumps(_rows("video", "prompt"))),
    "VideoX-Fun json": ("d.json", lambda: json.dumps(_rows("file_path", "text", type="video", width=6, height=4))),
    "VideoX-Fun csv": ("d.csv", lambda: _csv("file_path,text,type", ",video")),
    "musubi jsonl": ("d.jsonl", lambda: _jsonl(_rows("video_path", "caption"))),
    "file_name text": ("d.csv", lambda: _csv("file_name,text")),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_clips(root, kind, encoding):
    name, text = FORMATS[kind]
    records = load(_write(root, name, text(), encoding))
    assert [(record.path.relative_to(root).as_posix(), record.captions) for record in records] == [
        (clip, (caption,)) for clip, caption in CLIPS
    ]
    if "MindSpeed-MM" in kind:
        assert (records[0].num_frames, records[0].fps, records[0].height, records[0].width) == (9, 24.0, 4, 6)


DATA_TXT = ["{root},{root}/d.json", "{root} , d.json", '"{root}","d.json"', "# x\n\n.,d.json\r"]


@pytest.mark.parametrize("line", DATA_TXT)
def test_data_txt(root, line, monkeypatch):
    _write(root, "d.json", json.dumps(_rows()))
    monkeypatch.chdir(root)
    assert len(load(_write(root, "data.txt", line.format(root=root) + "\n"))) == 3


def test_data_txt_joins_several_sets_and_a_folder_may_hold_a_comma(root):
    other = root / "a, b"
    other.mkdir()
    (other / "z.mp4").write_bytes(b"x")
    _write(root, "d.json", json.dumps(_rows()))
    _write(other, "e.json", json.dumps([{"path": "z.mp4", "cap": "z"}]))
    records = load(_write(root, "data.txt", f"{root},d.json\n{other},e.json\n"))
    assert [record.path.name for record in records] == ["a.mp4", "b.mp4", "c.mp4", "z.mp4"]


@pytest.mark.parametrize("line", ["{root},{root}/d, e.json", '"{root}","{root}/d, e.json"', ".,d, e.json"])
def test_an_annotation_may_hold_a_comma(root, line, monkeypatch):
    _write(root, "d, e.json", json.dumps(_rows()))
    monkeypatch.chdir(root)
    assert len(load(_write(root, "data.txt", line.format(root=root)))) == 3


def test_a_folder_that_describes_its_clips(root):
    """``data init`` leaves data.txt in the folder; beside data.mp4 that name is the caption of a clip."""
    _write(root, "d.json", json.dumps(_rows()[:1]))
    _write(root, "data.txt", f"{root},d.json\n")
    assert [record.captions for record in load(root)] == [("a red ball",)]
    (root / "data.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.mp4 has no caption file"):
        load(root)


def test_paths_do_not_depend_on_the_current_folder(root, monkeypatch):
    _write(root, "d.json", json.dumps(_rows()))
    monkeypatch.chdir(root.parent)
    assert all(record.path.is_absolute() for record in load(Path(root.name) / "d.json"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_line_of_a_row_is_where_it_begins(root, delimiter):
    text = delimiter.join(("video", "prompt")) + "\n\n" + "".join(
        f'{clip}{delimiter}"two\nlines, {delimiter} {number}"\n' for number, (clip, _) in enumerate(CLIPS))
    assert [r.where.rsplit(":", 1)[1] for r in load(_write(root, "d.csv", text))] == ["3", "5", "7"]


def test_empty_cells_of_parquet_and_other_columns(root):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**row, "fps": float("nan"), "score": float("nan"), "raw": b"\x00"} for row in _rows("video", "prompt")]
    parquet.write_table(arrow.Table.from_pylist(rows), root / "d.parquet")
    assert [(record.fps, set(record.extra)) for record in load(root / "d.parquet")] == [(None, {"raw"})] * 3


def test_data_folder_wins_over_the_line(root):
    _write(root, "d.json", json.dumps(_rows()))
    assert len(load(_write(root, "data.txt", f"/nowhere,{root}/d.json"), root)) == 3


def test_plain_folder_with_caption_files(root):
    for name, text in CLIPS:
        (root / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    records = load(root)
    assert sorted(record.captions[0] for record in records) == sorted(text for _, text in CLIPS)


def test_folders_are_walked_whole_and_once(tmp_path):
    clips, elsewhere = tmp_path / "clips", tmp_path / "elsewhere"
    for name in ("clips/a.mp4", "clips/deep/b.MP4", "clips/.cache/c.mp4", "clips/.d.mp4", "clips/folder.mp4/e.MOV",
                 "elsewhere/f.webm", "blobs/0123abcd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text("a clip")
    (clips / "deep" / "loop").symlink_to(clips)
    (clips / "linked").symlink_to(elsewhere)
    (clips / "again").symlink_to(elsewhere)
    (clips / "hub.mp4").symlink_to(tmp_path / "blobs" / "0123abcd")  # as a download cache keeps its files
    (clips / "hub.txt").write_text("a clip")
    found = [record.path.relative_to(clips).as_posix() for record in load(clips)]
    assert found == ["a.mp4", "again/f.webm", "deep/b.MP4", "folder.mp4/e.MOV", "hub.mp4"]
    (clips / "gone.mp4").symlink_to("nowhere.mp4")
    (clips / "gone.txt").write_text("a clip")
    with pytest.raises(DataError, match=r"gone\.mp4 does not exist"):
        load(clips)


def test_musubi_toml(root):
    for name, text in CLIPS[:2]:
        (root / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    _write(root, "m.jsonl", _jsonl(_rows("video_path", "caption")))
    toml = '[general]\nresolution = [960, 544]\n[[datasets]]\nvideo_directory = "{0}"\nnum_repeats = 2\n' \
           '[[datasets]]\nvideo_jsonl_file = "{0}/m.jsonl"\n'
    assert len(load(_write(root, "set.toml", toml.format(root)))) == 2 * 2 + 3


def test_parquet(root):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(_rows("video", "prompt")), root / "d.parquet")
    assert len(load(root / "d.parquet")) == 3


def test_several_captions_and_a_window(root):
    row = {"path": "a.mp4", "cap": ["one", "two"], "cut": [4, 20], "crop": [0, 8, 0, 8], "duration": 2, "fps": 12}
    record, = load(_write(root, "d.jsonl", json.dumps(row)))
    assert record.captions == ("one", "two") and record.cut == (4, 20) and record.crop == (0, 8, 0, 8)
    assert record.num_frames == 24


def test_lines_are_those_of_the_file(root):
    text = '[\n  {"path": "a.mp4", "cap": "x"},\n\n  {"path": "b.mp4",\n   "cap": "y"}\n]\n'
    assert [r.where.rsplit(":", 1)[1] for r in load(_write(root, "d.json", text))] == ["2", "4"]
    rows = _jsonl(_rows()).replace("\n", "\n\n")
    assert [r.where.rsplit(":", 1)[1] for r in load(_write(root, "d.jsonl", rows))] == ["1", "3", "5"]


GOOD = '{"path": "a.mp4", "cap": "x"}'
# name of the file, its text (or bytes), what the message says, and the line it names (None: the file alone)
DAMAGED: list[tuple[str, str | bytes, str, int | None]] = [
    ("d.json", "", "empty", None),
    ("d.json", "   \n", "empty", None),
    ("d.json", "[]", "no clips", None),
    ("d.jsonl", "", "no clips", None),
    ("d.json", "{", "ends too early", 1),
    ("d.json", "[" + GOOD, "ends too early", 1),
    ("d.json", f"[{GOOD} {GOOD}]", "missing", 1),
    ("d.json", f"[\n{GOOD},\n{{'path': 'a.mp4'}}]", "double quotes", 3),
    ("d.json", '[{"path": "a.mp4", "cap": "x", "resolution": {480, 832}}]', "not JSON", 1),
    ("d.json", f"[{GOOD}, ...]", "placeholder", 1),
    ("d.json", '[{"path": "a.mp4", "cap": None}]', "Python", 1),
    ("d.json", '{"videos": [' + GOOD + "]}", "expected a list", 1),
    ("d.json", "42", "expected a list", 1),
    ("d.json", '"text"', "expected a list", 1),
    ("d.json", "[1]", "expected an object", 1),
    ("d.json", f"[\n{GOOD},\nnull]", "expected an object", 3),
    ("d.json", '[{"path": "a.mp4", "cap": "x", "path": "b.mp4"}]', "twice", 1),
    ("d.json", b"\x00\x01\x02\x00", "binary", None),
    ("d.json", b"PK\x03\x04\x00\x00", "binary", None),
    ("d.jsonl", GOOD + "\n{\n" + GOOD, "ends too early", 2),
    ("d.jsonl", GOOD + "\n[1]\n", "expected an object", 2),
    ("d.jsonl", GOOD + '\n{"path": "a.mp4"}', "no caption", 2),
    ("d.jsonl", '{"cap": "x"}', "no 'path'", 1),
    ("d.jsonl", '{"pth": "a.mp4", "cap": "x"}', "no 'path'.*", 1),
    ("d.jsonl", '{"path": "a.mp4", "captoin": "x"}', "no caption", 1),
    ("d.jsonl", '{"path": "", "cap": "x"}', "'path' is empty", 1),
    ("d.jsonl", '{"path": null, "cap": "x"}', "'path' is empty", 1),
    ("d.jsonl", '{"path": 3, "cap": "x"}', "not text", 1),
    ("d.jsonl", '{"path": ["a.mp4"], "cap": "x"}', "not text", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": ""}', "'cap' is empty", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "  \\n"}', "'cap' is empty", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": null}', "'cap' is null", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": []}', "empty list", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": ["x", ""]}', "is empty", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": 5}', "not text", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": {"en": "x"}}', "not text", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": NaN}', "NaN", 1),
    ("d.jsonl", '{"path": "nowhere.mp4", "cap": "x"}', "does not exist", 1),
    ("d.jsonl", GOOD + '\n{"path": "zero.mp4", "cap": "x"}', "0 bytes", 2),
    ("d.jsonl", '{"path": "folder.mp4", "cap": "x"}', "not a file", 1),
    ("d.jsonl", '{"path": "loop.mp4", "cap": "x"}', "cannot be opened", 1),
    ("d.jsonl", '{"path": "a.txt", "cap": "x"}', "neither a video nor an image", 1),
    ("d.jsonl", '{"path": "a", "cap": "x"}', "neither a video nor an image", 1),
    ("d.jsonl", '{"path": "https://x.org/a.mp4", "cap": "x"}', "address", 1),
    ("d.jsonl", '{"path": "path to your video.mp4", "cap": "x"}', "placeholder", 1),
    ("d.jsonl", '{"path": "a\\u0000.mp4", "cap": "x"}', "NUL", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "fps": "fast"}', "'fps'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "fps": 0}', "above 0", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "fps": -24}', "above 0", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "num_frames": 2.5}', "whole number", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "num_frames": 0}', "whole number", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "num_frames": true}', "a number", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "num_frames": 1' + "0" * 400 + "}", "'num_frames'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "crop": [0, 8, 0, 1' + "0" * 400 + "]}", "'crop'", 1),
    ("d.jsonl", GOOD + '\n{"path": "a.mp4", "cap": "x", "num_frames": 1' + "0" * 5000 + "}", "5001 digits", 2),
    ("d.json", '[{"path": "a.mp4", "cap": "x", "num_frames": 1' + "0" * 5000 + "}]", "5001 digits", 1),
    ("d.toml", "general = {x = 1" + "0" * 5000 + "}", "not TOML", None),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "path": "b.mp4"}', "twice", 1),
    ("d.jsonl", '{"path": "sub\\\\a.mp4", "cap": "x"}', "does not exist", 1),
    ("d.jsonl.gz", b"\x1f\x8b\x08\x00", "not an annotation format", None),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "resolution": "480x832"}', "'resolution'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "resolution": {"height": 480}}', "'resolution'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "resolution": [480, 832, 3]}', "'resolution'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "resolution": [480, -1]}', "'width'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "cut": [9, 3]}', "start < end", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "cut": 3}', "'cut'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "cut": [0, 1e999]}', "'cut'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "\\ud800 x"}', "half a character", 1),
    ("d.jsonl", '{"path": "a\\udcd6.mp4", "cap": "x"}', "UTF-8", 1),
    ("d.jsonl", '{"path": "~nobody-of-this-name/a.mp4", "cap": "x"}', "does not exist", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "crop": [0, 5]}', "'crop'", 1),
    ("d.jsonl", '{"path": "a.mp4", "cap": "x", "crop": [5, 0, 0, 5]}', "left < right", 1),
    ("d.csv", "", "empty", None),
    ("d.csv", "a.mp4,a red ball\n", "first line must name the columns|no column", 1),
    ("d.csv", "video,propmt\na.mp4,x\n", "no column for the caption", 1),
    ("d.csv", "clip,prompt\na.mp4,x\n", "no column for the clip", 1),
    ("d.csv", "video,prompt\na.mp4,a cat, running\n", "3 cells", 2),
    ("d.csv", "video,prompt\na.mp4\n", "1 cells", 2),
    ("d.csv", "video,prompt,prompt\na.mp4,x,y\n", "'prompt' is there twice", 1),
    ("d.csv", "video,prompt\na.mp4,\n", "'prompt' is empty", 2),
    ("d.csv", 'video,prompt\na.mp4,"open\n', "not a CSV table", 2),
    ("d.toml", "[[datasets]\n", "not TOML", None),
    ("d.toml", "[general]\n", "datasets", None),
    ("d.toml", "datasets = [1, 2]\n", "datasets", None),
    ("d.toml", 'general = 3\n[[datasets]]\nvideo_directory = "."\n', "general is not a table", None),
    ("d.toml", '[[datasets]]\nvideo_directory = "."\nnum_repeats = "two"\n', "num_repeats is 'two'", None),
    ("d.toml", '[[datasets]]\nvideo_directory = "."\nnum_repeats = 0\n', "num_repeats is 0", None),
    ("d.toml", '[[datasets]]\nvideo_directory = "/nowhere"\n', "does not exist", None),
    ("d.toml", "[[datasets]]\nx = 1\n", "names neither", None),
    ("d.xml", "<a/>", "not an annotation format", None),
    ("d.parquet", b"PAR1 torn", "not a Parquet file|needs pyarrow", None),
    ("data.txt", "", "names no data set", None),
    ("data.txt", "# only a comment\n", "names no data set", None),
    ("data.txt", "/clips\n", "is not 'folder,annotation'", 1),
    ("data.txt", "/clips,\n", "is not 'folder,annotation'", 1),
    ("data.txt", ",d.json\n", "is not 'folder,annotation'", 1),
    ("data.txt", "\n/clips,nowhere.json\n", "does not exist", 2),
]


@pytest.mark.parametrize(("name", "text", "message", "line"), DAMAGED)
def test_damaged_annotations_are_named(root, name, text, message, line):
    (root / "zero.mp4").write_bytes(b"")
    (root / "folder.mp4").mkdir()
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    where = str(caught.value)
    assert where.startswith(str(path) if line is None else f"{path}:{line}:"), where
    assert caught.value.exit_code == 7 and len(where.splitlines()) <= 3


def test_there_are_sixty_of_them():
    assert len(DAMAGED) >= 60


def test_all_problems_are_reported_together(root):
    rows = [{"path": f"missing{i}.mp4", "cap": "x"} for i in range(30)]
    with pytest.raises(DataError) as caught:
        load(_write(root, "d.jsonl", _jsonl(rows)))
    text = str(caught.value)
    assert "30 problems" in text and "d.jsonl:1:" in text and "d.jsonl:10:" in text and "20 more" in text


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (lambda r: r / "metdata.csv", "no such file"),
        (lambda r: r / "no" / "folder" / "d.json", "does not exist either"),
        (lambda r: (r / "sub").mkdir() or r / "sub", "no videos or images"),
        (lambda r: r, "no caption file"),
    ],
)
def test_places_without_annotations(root, setup, message):
    with pytest.raises(DataError, match=message):
        load(setup(root))


def test_a_close_file_name_is_offered(root):
    _write(root, "metadata.csv", _csv("video,prompt"))
    with pytest.raises(DataError, match=r"metadata\.csv"):
        load(root / "metdata.csv")


def test_demo_clips_load():
    records = load(tiny_clips() / "data.txt")
    assert len(records) == 8 and records[0].num_frames == 17


def test_unreadable_without_touching_files(root):
    text = _jsonl([{"path": "gone.mp4", "cap": "x"}])
    assert len(manifest.load(_write(root, "d.jsonl", text), check_files=False)) == 1
