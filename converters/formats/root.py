"""Checkpoint roots: the tracker file, ``release`` and ``iter_*`` folders, shared by the MM and the DCP layout."""

from __future__ import annotations

import re
from pathlib import Path

from mindspeed_wan.checkpoint.manifest import MANIFEST_NAME, TRACKER_NAME, checkpoint_folder, read_manifest
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan_converters.formats.folder import check_sizes
from mindspeed_wan_converters.plan import Card

_ITERATION = re.compile(r"release|iter_\d{7,}")


def locate(path: Path) -> Path:
    """Return the folder with the weights: ``path`` itself, or the one that the tracker of ``path`` names.

    A root without tracker is accepted when it holds exactly one ``release`` or ``iter_*`` folder.
    """
    if (path / TRACKER_NAME).is_file():
        return checkpoint_folder(path)
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and _ITERATION.fullmatch(entry.name))
    if len(inside) > 1:
        raise CheckpointError(f"holds {', '.join(e.name for e in inside[:4])} but no {TRACKER_NAME}", where=str(path),
                              fix="give one of these folders")
    return inside[0] if inside else path


def read_card(folder: Path) -> Card | None:
    """Return the folder's ``wan.json``, after comparing file sizes with its manifest when it has one."""
    if (folder / MANIFEST_NAME).is_file():
        check_sizes(folder, read_manifest(folder))
    return Card.read(folder)
