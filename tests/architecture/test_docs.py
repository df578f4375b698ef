"""Documentation that cannot rot: links resolve, JSON parses, and every command names real scripts, verbs and flags."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")


def _blocks(language: str) -> list[tuple[str, str]]:
    return [(page.relative_to(ROOT).as_posix(), text) for page in PAGES
            for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def _commands() -> list[tuple[str, str]]:
    """Every shell command of every page, with continued lines joined and comments dropped."""
    found = []
    for page, text in _blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append((page, line.strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_resolve(page: Path) -> None:
    targets = [target for target, _ in _LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [t for t in targets if not t.startswith(("http", "mailto:")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "text"), _blocks("json"))
def test_json_blocks_parse(page: str, text: str) -> None:
    assert json.loads(text) is not None, page


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


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words[1:]) <= targets


def _check_convert(words: list[str]) -> None:
    from mindspeed_wan_converters import cli

    _, rest = cli._split_names(words[1:])
    known = set(cli._parser()._option_string_actions)
    unknown = [w.split("=")[0] for w in rest if w.startswith("--") and w.split("=")[0] not in known]
    assert not unknown


def _check_bash(words: list[str]) -> None:
    script = next(w for w in words[1:] if w.endswith(".sh"))
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

    known = {flag.name for group in inference_flags._GROUPS.values() for flag in group}
    named = [w[2:].split("=")[0].replace("-", "_") for w in flags if w.startswith("--")]
    assert set(named) - {"device", "dry_run", "help"} <= known


def _check_command_line(words: list[str]) -> None:
    import argparse
    import importlib

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
    "kill": _anything, "source": _anything, "git": _anything, "cd": _anything, "export": _anything,
    "ma-cli": _anything, "scancel": _anything,
}
