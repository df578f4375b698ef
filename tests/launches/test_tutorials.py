"""The four migration tutorials, every command as it stands: tiny folders with the users' own file formats.

A page's ``bash`` blocks are one script, run in a temporary directory with CPU ranks. Only the imports are shared
(``tests/helpers/warm.py``), so that a page takes seconds. By default the first page runs; ``slow`` are the others, and
the first once more with ordinary processes. tests/architecture/test_docs.py checks the commands of all pages by name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.warm import ROOT, WarmPython
from tests.launches.test_launch_shell import SETTABLE

TUTORIALS = ROOT / "docs" / "tutorials"
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
DEFAULT = "mindspeed-mm"
RESULTS: dict[str, tuple[str, ...]] = {
    "mindspeed-mm": ("runs/high/iter_0000002/manifest.json", "runs/low/iter_0000003/manifest.json",
                     "samples/video_0.mp4", "out/model_index.json", "out/transformer_2/config.json"),
    "diffsynth": ("wan/low/train.sh", "video.mp4", "runs/more/iter_0000002/adapter.safetensors"),
    "cann-recipe": ("first.mp4", "second.mp4", "cfg.mp4", "longer.mp4"),
    "videox-fun": ("samples/t2v.mp4", "samples/i2v.mp4", "samples/trained.mp4",
                   "fun-diffusers/transformer_2/config.json"),
}
"""What a page must leave behind in its working folder."""
FOLDERS = {"mindspeed-mm": "MindSpeed-MM", "diffsynth": "DiffSynth-Studio", "cann-recipe": "wan2.2-i2v",
           "videox-fun": "VideoX-Fun"}


def blocks(page: Path, language: str) -> list[str]:
    """Return the code of a page's blocks in one language."""
    return [code for name, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def follow(name: str, folder: Path, environment: dict[str, str]) -> Path:
    """Run a tutorial's commands in ``folder`` and return the working folder; fails with the output."""
    script = "\n".join(["set -euo pipefail", *blocks(TUTORIALS / f"{name}.md", "bash")])
    clean = {key: value for key, value in environment.items() if key not in SETTABLE}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=clean, capture_output=True, text=True, timeout=500,
                          check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    work = folder / FOLDERS[name]
    for result in RESULTS[name]:
        assert (work / result).is_file() and (work / result).stat().st_size > 0, result
    return work


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    with WarmPython(tmp_path_factory.mktemp("warm") / "w") as server:
        yield server


def _settings(port: int) -> dict[str, str]:
    return {"WAN": str(ROOT), "DEVICE": "cpu", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", [DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in RESULTS
                                             if name != DEFAULT)])
def test_every_command_runs(name: str, warm: WarmPython, tmp_path: Path) -> None:
    work = follow(name, tmp_path, warm.environment(**_settings(_free_port())))
    CHECKS.get(name, lambda work: None)(work)


@pytest.mark.slow
def test_every_command_runs_in_ordinary_processes(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    follow(DEFAULT, tmp_path, {**os.environ, "PATH": path, "PYTHON": sys.executable, **_settings(_free_port())})


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_mindspeed_mm(work: Path) -> None:
    """Both runs have finite losses; the resumed one has three steps in one table."""
    for run, steps in (("high", 2), ("low", 3)):
        rows = [json.loads(line) for line in (work / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == list(range(1, steps + 1))
        assert all(0 < row["loss"] < 100 for row in rows)


def _check_videox(work: Path) -> None:
    """Both adapters carry the command's rank and alpha."""
    from mindspeed_wan.checkpoint.safe_load import read_safetensors_header

    for expert in ("high", "low"):
        header = read_safetensors_header(work / "runs" / expert / "iter_0000008" / "adapter.safetensors")
        downs = [tensor.shape[0] for name, tensor in header.tensors.items() if name.endswith("lora_down.weight")]
        assert len(downs) == 2 * 8 and set(downs) == {8}  # 2 blocks of q, k, v twice and two feed-forward layers


CHECKS = {"mindspeed-mm": _check_mindspeed_mm, "videox-fun": _check_videox}
