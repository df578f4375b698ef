"""``run_main``: an exit code and one message, whatever a command's main raises."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_wan.errors import CheckpointError, run_main


def _ends_with(code: int, error: BaseException) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main)  # type: ignore[arg-type]
    assert exit_.value.code == code


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MINDSPEED_WAN_LAUNCHED", "MINDSPEED_WAN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def test_our_errors_give_their_code_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    _ends_with(4, CheckpointError("is damaged", where="a/b", fix="copy it again"))
    assert capsys.readouterr().err == "error: a/b: is damaged\n  fix: copy it again\n"


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied", "/data/locked"),
    OSError(errno.ENAMETOOLONG, "File name too long", "/data/" + "x" * 300),
    OSError(errno.EROFS, "Read-only file system"), OSError(errno.ENOSPC, "No space left on device"),
], ids=["permission", "long name", "read-only", "full"])
def test_what_the_system_says_about_files_is_one_message(
    error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    _ends_with(3, error)
    text = capsys.readouterr().err
    assert text.startswith("error: ") and error.strerror in text and str(error.filename or "") in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "Connection reset"), OSError("a bug"),
                                   ValueError("a bug")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_main(main)  # type: ignore[arg-type]


_WRITES = """
import os, signal, sys, time
from pathlib import Path
from mindspeed_wan.data.video_writer import atomic_path
from mindspeed_wan.errors import run_main

def main():
    with atomic_path(Path(sys.argv[1])) as temporary:
        temporary.write_text("half of it")
        print("writing", flush=True)
        while True:
            time.sleep(0.01)

for number in (signal.SIGTERM, signal.SIGHUP):  # a shell may have started the tests with signals ignored
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
run_main(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP),
                                              (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_without_leaving_half_a_file(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITES, str(tmp_path / "out.mp4")], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "writing\n" and list(tmp_path.iterdir())
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == code
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_so() -> None:
    """``nohup`` starts commands with SIGHUP ignored."""
    code = ("import os, signal; from mindspeed_wan.errors import run_main; "
            "signal.signal(signal.SIGHUP, signal.SIG_IGN); run_main(lambda: os.kill(os.getpid(), signal.SIGHUP))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
