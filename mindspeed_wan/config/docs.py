"""docs/reference/flags.md, made from the flag table and the file classes so that it cannot go stale.

``make reference`` (``cli.reference``) writes it with the other generated pages, and ``python -m
mindspeed_wan.config.docs docs/reference/flags.md`` this one alone; a test compares all of them with the code.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel

from mindspeed_wan.config.flag_table import USED
from mindspeed_wan.config.flag_table_inert import NOTED, REFUSED
from mindspeed_wan.config.fsdp2_file import Fsdp2File
from mindspeed_wan.config.help import usage
from mindspeed_wan.config.json_schema import write_file
from mindspeed_wan.config.mm_files import DataFile, ModelFile
from mindspeed_wan.config.validate import key_paths, section_at
from mindspeed_wan.errors import ConfigError, run_main

_HEAD = """\
# Flags and files of pretrain_sora.py

This page is made by `make reference`; do not edit it by hand.

A value comes from its default, then the file, then the flag; of repeated flags the last one wins. Names are never
abbreviated. `--dry-run` checks everything and prints the result. An unknown flag or key stops the run with exit
code 2, and all mistakes are listed together.
"""

_FILES = (
    ("model.json (`--mm-model`)", ModelFile),
    ("data.json (`--mm-data`)", DataFile),
    ("fsdp2_config.yaml (`--fsdp2-config-path`)", Fsdp2File),
)


def flags_page() -> str:
    """Return the Markdown of the whole page."""
    parts = [_HEAD, "## Flags\n", "`*` marks our own; the others mean what they do in Megatron-LM and MindSpeed-MM.\n"]
    for title, flags in groupby(USED, key=lambda flag: flag.group):
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n| flag | meaning |\n|---|---|")
        rows = [f"| `{cell(usage(flag))}`{' *' if flag.own else ''} | {flag.help} |" for flag in flags]
        parts.append("\n".join(rows) + "\n")
    parts.append("### Accepted without effect\n\nThe run says so once.\n\n| flag | why |\n|---|---|")
    parts.append("\n".join(f"| `{flag.name}` | {flag.reason} |" for flag in NOTED) + "\n")
    parts.append("### Refused\n\n| flag | instead |\n|---|---|")
    parts.append("\n".join(f"| `{flag.name}` | {flag.reason} |" for flag in REFUSED) + "\n")
    parts.append("## Files\n\nJSON may hold `//` comments and trailing commas.\n")
    for title, kind in _FILES:
        parts.append(f"### {title}\n\n{key_table(kind)}\n")
    return "\n".join(parts)


def key_table(kind: type[BaseModel]) -> str:
    """Return a table of every key of a file: dotted path, default, meaning."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for path in key_paths(kind):
        owner = section_at(kind, path[:-1])
        if owner is None or section_at(kind, path) is not None:
            continue  # blocks are listed through their keys
        field = owner.model_fields[str(path[-1])]
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append(f"| `{'.'.join(map(str, path))}` | {default} | {cell(str(field.description))} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    """Write the page to the path named on the command line."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError("one path is needed", fix="python -m mindspeed_wan.config.docs docs/reference/flags.md")
    write_file(Path(words[0]), flags_page())
    return 0


if __name__ == "__main__":
    run_main(main)
