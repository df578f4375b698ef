"""Signals ask for a stop; the second one ends the process; handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mindspeed_wan.training.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_is_remembered_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), number)
        assert stop.wanted and stop.reason == number.name
    assert signal.getsignal(number) is before


def test_second_signal_exits_at_once() -> None:
    code = ("import os, signal\nfrom mindspeed_wan.training.stop import StopRequest\n"
            "with StopRequest() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM); assert stop.wanted\n"
            "    os.kill(os.getpid(), signal.SIGTERM); raise SystemExit(0)\n")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143


def test_time_limit() -> None:
    assert StopRequest(after_minutes=0.0).wanted
    assert not StopRequest(after_minutes=10.0).wanted
