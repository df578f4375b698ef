"""What the site does to the pages: links that leave docs/ go to the repository, and one page is completed.

On GitHub the pages are read as they are; `mkdocs build` calls these functions by name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)((?:#[^)]*)?\))")
_INCLUDE = re.compile(r"<!-- the site puts (\S+) here -->")
ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's text with links outwards made absolute and the benchmark tables in their place."""
    folder = posixpath.dirname(page.file.src_uri)
    repository = str(config["extra"]["repository"])

    def outwards(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        return link[0] if path.startswith("docs/") else f"{link[1]}{repository}/{path}{link[3]}"

    return _INCLUDE.sub(lambda found: _tables(ROOT / found[1]), _LINK.sub(outwards, markdown))


def _tables(path: Path) -> str:
    """Return a page without its title, and without its pictures, which lie beside it and not in the site."""
    _, *lines = path.read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in lines if not line.startswith("!["))
