"""The generated part of docs/: every flag, sub-command and key, and the JSON schemas, from the code that reads them.

``python -m mindspeed_wan.cli.reference docs`` (``make reference``) writes them; a test compares what is committed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from mindspeed_wan.config.docs import cell, flags_page, key_table
from mindspeed_wan.config.json_schema import write_file
from mindspeed_wan.errors import ConfigError, run_main

_MADE = "This page is made by `make reference`; do not edit it by hand.\n"


def pages() -> dict[str, str]:
    """Return the text of every generated file by its path below docs/."""
    from mindspeed_wan.cli.schema import schema_texts

    return {
        "reference/flags.md": flags_page(),
        "reference/inference.md": inference_page(),
        "reference/mm-convert.md": convert_page(),
        "reference/commands.md": commands_page(),
        "reference/config.md": config_page(),
        "reference/cluster.md": cluster_page(),
        **{f"schemas/{name}": text for name, text in schema_texts().items()},
    }


def inference_page() -> str:
    """Return the flags of inference_sora.py and the keys of inference_model.json."""
    from mindspeed_wan.inference import flags
    from mindspeed_wan.inference.mm_file import InferenceFile

    parts = ["# Flags and file of inference_sora.py\n", _MADE,
             "Hyphens and underscores are the same. A flag wins over the file of `--mm-model`. An unknown flag stops "
             "the run with exit code 2, and all mistakes are listed together.\n", "## Flags\n"]
    for title, group in flags._GROUPS.items():
        rows = [f"| `--{flag.name}`{' ...' if flag.many else ''} | {cell(flag.help)} |" for flag in group]
        parts.append("\n".join([f"### {title[0].upper()}{title[1:]}\n", "| flag | meaning |", "|---|---|", *rows, ""]))
    inert = ", ".join(f"`--{name}`" for name in sorted(flags._INERT))
    parts.append(f"### Accepted without effect\n\nThe run says so once: {inert}.\n")
    refused = [f"| `--{name}` | {cell(reason)} |" for name, reason in flags._REFUSED.items()]
    parts.append("\n".join(["### Refused\n", "| flag | instead |", "|---|---|", *refused, ""]))
    parts.append(f"## inference_model.json (`--mm-model`)\n\n{key_table(InferenceFile)}\n")
    return "\n".join(parts)


def convert_page() -> str:
    """Return mm-convert's verbs and options."""
    from mindspeed_wan_converters import cli
    from mindspeed_wan_converters.verbs import CONVERTERS, VERBS

    verbs = [f"| `{verb.name}` | {cell(verb.help)} |" for verb in VERBS.values()]
    parser = cli._parser()
    return "\n".join([
        "# mm-convert\n", _MADE, "How it is used: [converting weights](../converters.md).\n",
        "```\n" + parser.format_usage().strip() + "\n```\n",
        "## Verbs\n", "| verb | does |", "|---|---|", *verbs, "",
        f"Converters, which may be left out: {', '.join(f'`{name}`' for name in CONVERTERS)}.\n",
        "## Options\n", *_option_table(parser), "",
    ])  # fmt: skip


def commands_page() -> str:
    """Return every sub-command of mindspeed-wan with its options."""
    from mindspeed_wan.cli.main import available_commands

    parts = ["# mindspeed-wan\n", _MADE]
    for name, (module, text) in available_commands().items():
        parser = argparse.ArgumentParser(prog=f"mindspeed-wan {name}")
        importlib.import_module(module).add_arguments(parser)
        parts += [f"## {name}\n", f"{text[0].upper()}{text[1:]}.\n", *_command(parser)]
    return "\n".join(parts)


def config_page() -> str:
    """Return the keys of a run's resolved configuration."""
    from mindspeed_wan.config.schema import RunConfig

    return "\n".join([
        "# The resolved configuration\n", _MADE,
        "A run writes `config.json` into its save folder: every setting with the value it has after files, flags and "
        "defaults. `--dry-run` prints the same. Flags and files set these keys; see [flags and files](flags.md).\n",
        key_table(RunConfig), "",
    ])  # fmt: skip


def cluster_page() -> str:
    """Return the keys of the cluster description."""
    from mindspeed_wan.planning.cluster.spec import ClusterSpec

    return "\n".join(["# The cluster description\n", _MADE,
                      "What `mindspeed-wan cluster --spec` reads; see [clusters](../cluster.md).\n",
                      key_table(ClusterSpec), ""])


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a command, then those of its verbs."""
    if rows := _option_table(parser):
        yield from (*rows, "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for verb, below in action.choices.items():
                yield from (f"### {parser.prog.removeprefix('mindspeed-wan ')} {verb}\n", f"{helps.get(verb, '')}\n",
                            *_command(below))


def _option_table(parser: argparse.ArgumentParser) -> list[str]:
    rows = [_option_row(parser, action) for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            and action.help != argparse.SUPPRESS]
    return ["| option | meaning |", "|---|---|", *rows] if rows else []


def _option_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    metavar = action.metavar or action.dest.upper()
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        usage = value if action.choices or action.metavar else action.dest
    else:
        usage = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text and action.nargs != 0:
        text = f"{text} (default: {action.default})" if text else f"default: {action.default}"
    return f"| `{cell(usage)}` | {cell(text)} |"


def main(argv: list[str] | None = None) -> int:
    """Write everything below the folder named on the command line."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError("one folder is needed", fix="python -m mindspeed_wan.cli.reference docs")
    for name, text in pages().items():
        write_file(Path(words[0]) / name, text)
    return 0


if __name__ == "__main__":
    run_main(main)
