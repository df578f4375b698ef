"""Chinese pages keep step with the English ones: the same commands, flags, figures, files, links, tables, headings."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TWINS = {ROOT / "README_zh.md": ROOT / "README.md",
         **{page: page.with_name(page.name.removesuffix(".zh.md") + ".md") for page in sorted(DOCS.rglob("*.zh.md"))}}
WANTED = ("index", "quickstart", "training", "inference", "lora", "data", "converters", "cluster", "planning",
          "reliability", "tutorials/mindspeed-mm", "tutorials/diffsynth", "tutorials/cann-recipe",
          "tutorials/videox-fun")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)")
_TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|(?<=\s))#[^\n]*")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)")
_FLAG = re.compile(r"--[a-z][\w-]+")
_HAN = re.compile(r"[\u4e00-\u9fff]")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _code(page: Path) -> list[tuple[str, str]]:
    """Return (language, code) of every block; comments of commands may be translated."""
    return [(language, _COMMENT.sub("", code) if language in ("bash", "shell", "sh") else code)
            for language, code in _FENCE.findall(_text(page)) if language]


def _links(page: Path) -> list[str]:
    """Return the link targets without their language; on GitHub the Chinese README names Chinese pages itself."""
    links = _LINK.findall(_FENCE.sub("", _text(page)))
    return sorted(link.replace("_zh.md", ".md").replace(".zh.md", ".md") for link in links)


def _shape(page: Path) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the levels of the headings, and (rows, columns) of every table."""
    text = _FENCE.sub("", _text(page))
    levels = [len(mark) for mark in re.findall(r"^(#+) ", text, re.MULTILINE)]
    tables = [(table.count("\n"), re.sub(r"`[^`]*`", "", table.split("\n")[0]).count("|"))
              for table in _TABLE.findall(text + "\n")]
    return levels, tables


def _figures(page: Path) -> tuple[Counter[str], set[str]]:
    """Return the numbers of prose and tables (small ones may be words in one language), and the flags named there."""
    text = _FENCE.sub("", _text(page))
    return Counter(number for number in _NUMBER.findall(text) if len(number) > 1), set(_FLAG.findall(text))


def test_the_pages_people_start_with_are_there() -> None:
    assert {f"{name}.zh.md" for name in WANTED} <= {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.zh.md")}


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_twin_keeps_step(page: Path) -> None:
    english = TWINS[page]
    assert _code(page) == _code(english)
    assert _links(page) == _links(english)
    assert _shape(page) == _shape(english)
    assert _figures(page) == _figures(english)


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_twin_is_chinese(page: Path) -> None:
    """Prose, not leftovers: every paragraph outside code and tables holds Han characters."""
    text = re.sub(r"<!--.*?-->", "", _TABLE.sub("", _FENCE.sub("", _text(page))), flags=re.DOTALL)
    paragraphs = [part for part in text.split("\n\n") if len(re.sub(r"`[^`]*`|\([^)]*\)|\W", "", part)) > 30]
    assert all(_HAN.search(part) for part in paragraphs), [part for part in paragraphs if not _HAN.search(part)]
