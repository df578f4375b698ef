"""The wheel holds every module of the tree and nothing else at top level."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside a wheel built from a copy of the tree (a build leaves files beside its sources)."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    # No isolation: the build needs only setuptools, which is installed, and tests must not need the network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_wheel_holds_every_module(wheel: list[str]) -> None:
    expected = {f"mindspeed_wan/{p.relative_to(ROOT / 'mindspeed_wan').as_posix()}"
                for p in (ROOT / "mindspeed_wan").rglob("*.py")}
    expected |= {f"mindspeed_wan_converters/{p.relative_to(ROOT / 'converters').as_posix()}"
                 for p in (ROOT / "converters").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == expected


def test_wheel_has_no_other_top_level_name(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mindspeed_wan", "mindspeed_wan_converters"}
    assert "mindspeed_wan/py.typed" in wheel
