"""What a rank tells its launcher: how far it is, and, when asked, where it stands.

The launcher gives each rank a file (``MINDSPEED_WAN_HEARTBEAT_FILE``). ``beat`` writes the iteration into it; its age
shows which rank fell silent. Signal ``SIGUSR2`` makes a rank print the stack of every thread. Outside the launcher
both do nothing.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

HEARTBEAT_VARIABLE = "MINDSPEED_WAN_HEARTBEAT_FILE"


def answer_stack_requests() -> None:
    """Print all stacks on ``SIGUSR2`` and tell the launcher that it may ask; called when the platform is activated."""
    path = os.environ.get(HEARTBEAT_VARIABLE)
    if path:
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        Path(path).touch()


def beat(iteration: int) -> None:
    """Tell the launcher that this rank has reached ``iteration`` (one small write to a local file)."""
    path = os.environ.get(HEARTBEAT_VARIABLE)
    if path:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(iteration))
