"""The text of ``pretrain_sora.py --help``, made from the flag table."""

from __future__ import annotations

from itertools import groupby

from mindspeed_wan.config.flag_table import USED, Flag
from mindspeed_wan.config.flag_table_inert import NOTED, REFUSED

WIDTH = 110
_COLUMN = 40

_INTRO = """\
usage: torchrun ... pretrain_sora.py --mm-model model.json --mm-data data.json --load DIR --save DIR [flags]

Train one expert of Wan2.2 A14B. The launchers under examples/ fill these in; flags appended to them win.
A file's value is used unless a flag says otherwise. Flags marked * are ours, all others mean what they mean in
Megatron-LM and MindSpeed-MM. --dry-run checks everything and prints the resolved configuration.
"""

_KINDS = {"int": "N", "float": "X", "text": "TEXT", "texts": "TEXT ...", "switch": ""}


def help_text() -> str:
    """Return the whole help: used flags by group, then those without effect, then the refused ones."""
    lines = [_INTRO]
    for title, flags in groupby(USED, key=lambda flag: flag.group):
        lines += [f"{title}:", *(line for flag in flags for line in _row(flag)), ""]
    lines += ["accepted without effect (the run says why):", *_names(NOTED), ""]
    lines += ["refused (the error says what to use instead):", *_names(REFUSED), ""]
    lines.append("exit codes: 0 done, 2 flags or files, 3 device, disk or memory, 4 weights, 5 NaN, 6 lost rank,")
    lines.append("            7 data, 75 stopped on request after saving")
    return "\n".join(lines)


def usage(flag: Flag) -> str:
    """Return ``--name VALUE`` as it is typed."""
    value = "{" + ",".join(flag.choices) + "}" if flag.choices else _KINDS[flag.kind]
    return f"{flag.name} {value}".strip()


def _row(flag: Flag) -> list[str]:
    left = f"  {'*' if flag.own else ' '} {usage(flag)}"
    if len(left) < _COLUMN - 1:
        return [f"{left:<{_COLUMN}}{flag.help}"]
    return [left, " " * _COLUMN + flag.help]


def _names(flags: tuple[Flag, ...]) -> list[str]:
    import textwrap

    names = "  ".join(flag.name for flag in flags)
    indent = "    "
    return textwrap.wrap(names, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
