"""Documentation that cannot rot: links and anchors resolve, JSON parses, every command names real scripts, verbs and
flags, generated pages are the code's. tests/launches/test_tutorials.py runs the tutorials' commands as well.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)]*))?\)")
_HEREDOC = re.compile(r"^([^\n]*)<<'(\w+)'\n.*?^\2$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def _is_translation(page: Path) -> bool:
    """Code of translations is that of the page itself (tests/architecture/test_docs_chinese.py)."""
    return page.name.endswith((".zh.md", "_zh.md"))


def _blocks(*languages: str) -> list[tuple[str, str]]:
    return [(page.relative_to(ROOT).as_posix(), text) for page in PAGES if not _is_translation(page)
            for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")) if kind in languages]


def _commands() -> list[tuple[str, str]]:
    """Every shell command of every page, with continued lines joined and comments dropped."""
    found: list[tuple[str, str]] = []
    values: dict[str, dict[str, str]] = {}
    for page, text in _blocks("bash", "shell", "sh"):
        exported = values.setdefault(page, {"WAN": "."})
        for line in _HEREDOC.sub(r"\1", text.replace("\\\n", " ")).splitlines():
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            line = _expand(line.strip(), exported)
            if line.startswith("export "):
                pairs = (word.partition("=") for word in shlex.split(line, comments=True)[1:])
                exported.update({name: value for name, _, value in pairs if name != "WAN"})
            found.append((page, line))
    return found


def _expand(line: str, values: dict[str, str]) -> str:
    """Do what the shell does with a page's own variables; arithmetic becomes 1."""
    line = re.sub(r"\$\(\([^)]*\)\)", "1", line)
    line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
    return re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), line).replace("./examples/", "examples/")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_resolve(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in _LINK.findall(text):
        if target.startswith(("http", "mailto:")):
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        twin = found.with_suffix(".zh.md")
        if page.name.endswith(".zh.md") and twin.exists():
            found = twin  # the site resolves a page's name to the reader's language
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize(("page", "text"), _blocks("json"))
def test_json_blocks_parse(page: str, text: str) -> None:
    assert json.loads(text) is not None, page


@pytest.mark.parametrize(("page", "text"), _blocks("python"))
def test_python_blocks_import_what_is_there(page: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mindspeed_wan"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), f"{page}: {ast.unparse(node)}"


def test_generated_pages_are_current() -> None:
    """If this fails: make reference."""
    from mindspeed_wan.cli.reference import pages

    stale = [name for name, text in pages().items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != text]
    assert not stale


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
               if not _is_translation(page)}
    assert named == written


@pytest.mark.parametrize(("page", "command"), _commands())
def test_commands_name_real_things(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words.pop(0)
    if not words:
        return
    check = _CHECKS.get(words[0])
    assert check is not None, f"{page}: nobody checks commands of {words[0]!r}; add a check to this test"
    check(words)


_DEGREES = ("--tensor_size", "--ulysses_size", "--ring_size", "--cfg_size", "--pipeline_model_parallel_size",
            "--tensor-model-parallel-size", "--context-parallel-size", "--pipeline-model-parallel-size")


@pytest.mark.parametrize(("page", "command"), [found for found in _commands() if "/wan2." in found[1]])
def test_launch_commands_start_the_ranks_of_their_layout(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    variables: dict[str, str] = {}
    while re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    if words[0] != "bash":
        return
    generates = any(word in words[1] for word in ("inference", "generate", "predict"))
    ranks = int(variables.get("NPROC_PER_NODE", "1" if generates and "8card" not in words[1] else "8"))
    ranks *= int(variables.get("NNODES", "1"))
    experts = variables.get("EXPERT_RANKS", "even" if "pretrain_both" in words[1] else str(ranks))
    parts = [ranks // 2, ranks // 2] if experts == "even" else [int(part) for part in experts.split(",")]
    degrees = [int(variables.get(name, "1")) for name in ("TP", "CP", "PP")]
    degrees += [int(value) for flag, value in pairwise(words) if flag in _DEGREES]
    assert sum(parts) == ranks, page
    assert all(part % math.prod(degrees) == 0 for part in parts), f"{page}: {parts} ranks, degrees {degrees}"


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words[1:]) <= targets


def _check_convert(words: list[str]) -> None:
    from mindspeed_wan_converters import cli

    _, rest = cli._split_names([w for w in words[1:] if w != ">" and not w.endswith("conversion.yaml")])
    cli._parser().parse_args([w for w in rest if w != "--config"])


def _check_bash(words: list[str]) -> None:
    script = next(w for w in words[1:] if w.endswith(".sh"))
    if script.endswith("/train.sh"):
        return  # what mindspeed-wan import writes; the tutorial's test runs it
    matches = [ROOT / script] if "/" in script else list(ROOT.glob(f"examples/**/{script}"))
    assert matches and matches[0].is_file(), script
    flags = words[words.index(script) + 1 :]
    if "inference" in script or "generate" in script or "predict" in script:
        _check_inference_flags(flags)
    else:
        from mindspeed_wan.config.flags import read_words

        line = read_words(flags)
        assert not line.errors, line.errors


def _check_inference_flags(flags: list[str]) -> None:
    from mindspeed_wan.inference import flags as inference_flags

    problems: list[str] = []
    inference_flags._read_words([word for word in flags if word not in ("--dry-run", "--help")], problems)
    assert not problems


def _check_command_line(words: list[str]) -> None:
    import argparse

    from mindspeed_wan.cli.main import available_commands

    if len(words) == 1 or words[1].startswith("-"):
        return
    commands = available_commands()
    assert words[1] in commands, f"mindspeed-wan has no sub-command {words[1]!r}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(commands[words[1]][0]).add_arguments(parser)
    try:
        parser.parse_args(words[2:])
    except SystemExit as stop:
        assert stop.code == 0, f"does not parse: {shlex.join(words)}"


def _check_python(words: list[str]) -> None:
    import importlib.util

    if words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2]) or words[2] in ("pip", "pytest", "venv")
    elif words[1:] and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()


def _anything(words: list[str]) -> None:
    """Commands of the system (pip, sbatch, kill ...): their arguments are not ours to check."""


_CHECKS = {
    "make": _check_make, "mm-convert": _check_convert, "wan-convert": _check_convert, "bash": _check_bash,
    "mindspeed-wan": _check_command_line, "python": _check_python, "python3": _check_python,
    "torchrun": _anything, "pip": _anything, "sbatch": _anything, "kubectl": _anything, "docker": _anything,
    "kill": _anything, "cp": _anything, "source": _anything, "git": _anything, "cd": _anything, "export": _anything,
    "ma-cli": _anything, "scancel": _anything,
}
