"""Paths as users write them: relative to the working directory or to the file, with a home sign, or not filled in."""

from __future__ import annotations

import re
from pathlib import Path

_PLACEHOLDER = re.compile(
    r"path[ /_-]?to\b|\byour[ /_-]|/your\b|^your$|\[[a-z_ -]+\]|<[^<>]+>|\bxxx+\b|\.\.\.$|\$\{?[A-Z_]+\}?|TODO|FIXME",
    re.IGNORECASE,
)


def is_placeholder(path: str) -> bool:
    """Tell whether a path was left as the template had it (``path to save your ...``, ``/your/path``, ``<dir>``).

    A path that exists is never a placeholder, whatever it is called.
    """
    return bool(_PLACEHOLDER.search(path)) and not Path(path).expanduser().exists()


def resolve_path(path: str, base: Path | None) -> str:
    """Return an absolute path.

    A relative path is taken from the working directory, as MindSpeed-MM does. Where it is not there but stands beside
    the file that names it (``base``), or at least its folder does, that one is meant.
    """
    expanded = Path(path.strip()).expanduser()
    if expanded.is_absolute():
        return str(expanded)
    here = Path.cwd() / expanded
    if base is not None and not here.exists():
        beside = base / expanded
        if beside.exists() or (beside.parent.exists() and not here.parent.exists()):
            return str(beside.resolve())
    return str(here)
