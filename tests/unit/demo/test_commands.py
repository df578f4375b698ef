"""Commands of the demo: shown, kept, run side by side, and never left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_wan.demo.commands import Command, claim_folder, make_folder, run_together
from mindspeed_wan.errors import ConfigError, ResourceError, WanError


def test_output_is_shown_and_kept_and_a_failure_keeps_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Command("good", ["sh", "-c", 'echo "$WORD"'], {"WORD": "hello"})
    bad = Command("bad", ["sh", "-c", "echo no; exit 7"])
    with pytest.raises(WanError, match="exit code 7") as error:
        run_together([good, bad], repository=tmp_path, logs=tmp_path / "logs")
    assert error.value.exit_code == 7
    assert (tmp_path / "logs" / "good.log").read_text() == "hello\n"
    shown = capsys.readouterr().out
    assert "good: hello" in shown and "bad: no" in shown
    assert "$ WORD=hello sh -c 'echo \"$WORD\"'" in shown  # as a shell takes it


def test_a_stopped_demo_leaves_no_command_running(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    script = ("from pathlib import Path\nfrom mindspeed_wan.demo.commands import Command, run_together\n"
              f"run_together([Command('long', ['sh', '-c', 'touch {mark}; exec sleep 30'])], "
              f"repository=Path({str(tmp_path)!r}), logs=Path({str(tmp_path)!r}))")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    # It exits only when the command's output has ended, so ten seconds say that the command was stopped, too.
    assert process.wait(timeout=10) == 143


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", "demo.json", {"iterations": 200, "seed": 0})
    claim_folder(tmp_path / "out", "demo.json", {"iterations": 200, "seed": 0})
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        claim_folder(tmp_path / "out", "demo.json", {"iterations": 200, "seed": 1})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="choose another --out"):
        make_folder(tmp_path / "file" / "world")
