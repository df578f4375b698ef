"""Dockerfiles: what can be checked without building them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"
FILES = sorted(DOCKER.glob("Dockerfile.*"))
INSTRUCTIONS = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, argument), continuation lines joined, comments gone."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def test_there_is_an_image_for_every_device() -> None:
    assert {path.suffix for path in FILES} == {".cpu", ".cuda", ".cann"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_images_are_well_formed_and_not_root(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS
    assert names.count("FROM") == 1 and set(names[: names.index("FROM")]) <= {"ARG"}
    users = [argument for name, argument in found if name == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    base = next(argument for name, argument in found if name == "FROM")
    declared = dict(argument.split("=", 1) for name, argument in found if name == "ARG" and "=" in argument)
    image = re.sub(r"\$\{(\w+)\}", lambda match: declared[match[1]], base)
    assert ":" in image and not image.endswith(":latest")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_the_user_may_write_where_the_job_starts(path: Path) -> None:
    """COPY gives files to the user, but not the folder that WORKDIR makes; relative SAVE_PATHs are in it."""
    found = instructions(path)
    workdir = dict(found)["WORKDIR"]
    before = found[: [name for name, _ in found].index("WORKDIR")]
    assert any(f"install -d --owner wan {workdir}" in argument for name, argument in before if name == "RUN")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_commands_of_images_are_valid_bash(path: Path) -> None:
    for name, argument in instructions(path):
        if name == "RUN":
            done = subprocess.run(["bash", "-n", "-c", argument], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_entry_point_and_context() -> None:
    """The entry point is found from any working directory, and no build takes environments or weights along."""
    entry = dict(instructions(DOCKER / "Dockerfile.cann"))["ENTRYPOINT"]
    workdir = dict(instructions(DOCKER / "Dockerfile.cann"))["WORKDIR"]
    assert f'"{workdir}/docker/cann_entry.sh"' in entry
    ignored = (DOCKER.parent / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", "ckpt", "runs", "site"} <= set(ignored)


def test_extras_and_versions_are_those_of_the_package() -> None:
    """Installed extras exist, and every pinned torch and megatron-core is a supported one."""
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement

    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ranges = {r.name: r.specifier for r in map(Requirement, [*project["dependencies"], *extras["train"]])}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for group in re.findall(r"'\.\[([\w,]+)\]'", text):
            assert set(group.split(",")) <= set(extras)
        pins = {"torch": re.findall(r"^ARG TORCH=(\S+)", text, re.MULTILINE),
                "megatron-core": re.findall(r"megatron-core==([\d.]+)", text)}
        assert all(version in ranges[name] for name, found in pins.items() for version in found)


def test_entry_script_becomes_its_command(tmp_path: Path) -> None:
    entry = DOCKER / "cann_entry.sh"
    done = subprocess.run(["bash", str(entry), "sh", "-c", "exit 75"], check=False, timeout=30)
    assert done.returncode == 75
