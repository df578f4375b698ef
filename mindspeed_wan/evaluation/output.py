"""Tables and pages on their way to disk."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.checkpoint.manifest import disk_error, write_text_atomic


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made where there is none.

    Raises:
        ResourceError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path.parent) from None
    write_text_atomic(path, text)
