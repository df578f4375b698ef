"""Reading files: what is tolerated, and what each slip is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_wan.config.documents import parse_json, parse_yaml, read_document, read_json
from mindspeed_wan.config.jsonc import parse_jsonc
from mindspeed_wan.errors import ConfigError

SLIPS = [
    ('{"resolution": {480, 832}}', '{"height": 480, "width": 832}'),
    ("{'a': 1}", 'write "a"'),
    ('{"a": True}', "write true"),
    ('{"a": None}', "write null"),
    ('{"a": 1 "b": 2}', "before '\"b\": 2}'"),
    ('{"a": 1,, "b": 2}', "a comma too many"),
    ('{"a": NaN}', "NaN is not a number"),
    ('{"a": 1, ...}', "placeholder '...'"),
    ('{"a": "C:\\data"}', "use / instead"),
    ('{"a": [1, 2', "'[' opened on line 1"),
    ('{"a": 1', "'{' opened on line 1"),
    ('{"a": 1, "a": 2}', "given twice (first on line 1)"),
    ('{"a": .5}', "0.5"),
    ("/* open", "never closed"),
    ("{a: 1}", 'write "a"'),
    ('{"a": path/to}', "double quotes"),
    ("# note\n{}", "start comments with //"),
    ("\u201ca\u201d", 'write "a"'),
    ("[" * 300, "levels deep"),
    ('{"a" 1}', "':' is missing"),
    ("[1] [2]", "after the end"),
    ('{"a": "text\n"}', "on the same line"),
    ("folder,clips.json", "expected a value"),
]


@pytest.mark.parametrize(("text", "expected"), SLIPS, ids=[slip[:18] for slip, _ in SLIPS])
def test_each_slip_is_explained(text: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "f.json")
    assert expected in str(caught.value)
    assert (caught.value.where or "").startswith("f.json:")


def test_line_numbers_count_comments_and_strings():
    text = '// head\n{\n  "a": 1, /* x\n y */ "b": [\n    2,\n    x]}'
    with pytest.raises(ConfigError, match=r"^f.json:6: "):
        parse_json(text, "f.json")
    with pytest.raises(ConfigError, match=r"^f.jsonl:41: "):
        parse_json('{"a": oops}', "f.jsonl", first_line=41)


def test_comments_trailing_commas_and_bom(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n  // c\r\n  "a": [1, 2,],\r\n  "url": "http://x", /* d */\r\n}')
    document = read_document(path)
    assert document.value == {"a": [1, 2], "url": "http://x"}
    assert document.where(("a", 1)) == f"{path}:3"
    assert document.where(("url",)) == f"{path}:4"
    assert document.where(("a", 9, "gone")) == f"{path}:3"


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_tolerant_parser_agrees_with_json(value):
    for indent in (None, 2):
        text = json.dumps(value, indent=indent, ensure_ascii=indent is None)
        assert parse_jsonc(text, "f")[0] == value


@given(st.text(alphabet="{}[]\",:/*\\ \n019.eE-+trufalsn\u201c'#", max_size=60))
def test_garbage_gives_one_error_with_a_line(text: str):
    try:
        parse_jsonc(text, "f")
    except ConfigError as error:
        assert (error.where or "").startswith("f:")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b'{"a": "\xb0\xa1"}', "not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, expected: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_json(path)


def test_missing_file_names_neighbours(tmp_path: Path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds: data.json"):
        read_json(tmp_path / "dta.json")
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "no" / "data.json")
    with pytest.raises(ConfigError, match="this is a folder"):
        read_json(tmp_path)


def test_yaml_positions_and_errors():
    value, positions = parse_yaml("a: 1\nb:\n  - x\n  - y: 2\n", "f.yaml")
    assert value == {"a": 1, "b": ["x", {"y": 2}]}
    assert positions[("b", 1, "y")] == 4
    for text, expected in (
        ("a: 1\na: 2\n", "f.yaml:2: key 'a' is given twice"),
        ("a:\n\tb: 1\n", "f.yaml:2"),
        ("a: [1\n", "f.yaml"),
        ("", "no values"),
        ("a: !!python/object/apply:os.getcwd []\n", "f.yaml:1"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_yaml(text, "f.yaml")
        assert expected in str(caught.value)


def test_large_file_keeps_the_fast_path(tmp_path: Path):
    path = tmp_path / "big.json"
    rows = [{"path": f"{i}.mp4", "cap": "x", "num_frames": 81} for i in range(20000)]
    path.write_text(json.dumps(rows))
    document = read_document(path)
    assert len(document.value) == 20000
    assert "positions" not in document.__dict__  # found only when asked for
