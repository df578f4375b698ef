"""The commands of docs/planning.md and docs/cluster.md run; the rendered examples are those of the description."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.planning.cluster.render import TARGETS, render
from mindspeed_wan.planning.cluster.spec import read_spec

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "examples" / "wan2.2" / "cluster"
COMMANDS = [line for page in ("planning.md", "cluster.md")
            for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
            for line in block.splitlines() if line.startswith("mindspeed-wan ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert dispatch(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_rendered_example_is_up_to_date(target: str, tmp_path: Path) -> None:
    """If this fails: mindspeed-wan cluster render --target all --spec .../cluster.yaml --out .../rendered"""
    fresh = render(read_spec(CLUSTER / "cluster.yaml"), target, tmp_path)
    assert (CLUSTER / "rendered" / fresh.name).read_text(encoding="utf-8") == fresh.read_text(encoding="utf-8")
