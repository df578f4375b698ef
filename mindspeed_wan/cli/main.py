"""`mindspeed-wan`: one command whose sub-commands are imported only when they are called.

A sub-command is a module in this package with ``add_arguments(parser)`` and ``run(args) -> int | None``, and a line in
``COMMANDS``. ``--help`` imports neither torch nor any of them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from mindspeed_wan import __version__
from mindspeed_wan.errors import ConfigError, did_you_mean, nearest_option, run_main

COMMANDS = {
    "doctor": ("mindspeed_wan.cli.doctor", "what this machine can run, and the fix for what it cannot"),
    "demo": ("mindspeed_wan.cli.demo", "the main job on a tiny model: convert, pretrain, export, generate"),
    "world": ("mindspeed_wan.cli.world", "learn a small world: pretrain, I2V, LoRA, evaluate (about an hour)"),
    "config": ("mindspeed_wan.cli.config", "check a run's configuration and print it with every default"),
    "plan": ("mindspeed_wan.cli.plan", "memory and time of a run before it starts"),
    "data": ("mindspeed_wan.cli.data", "check annotations and clips, count what a run would use"),
    "features": ("mindspeed_wan.cli.features", "encode clips and captions once, for training from cached features"),
    "import": ("mindspeed_wan.cli.import_", "another trainer's command line as our configuration and launcher"),
    "lora": ("mindspeed_wan.cli.lora", "inspect, convert and merge LoRA files"),
    "eval": ("mindspeed_wan.cli.eval", "score generated videos, compare models"),
    "accelerate": ("mindspeed_wan.cli.accelerate", "what faster ways of generating cost, measured; a quality gate"),
    "schema": ("mindspeed_wan.cli.schema", "JSON Schema files for editors: model.json, data.json, fsdp2, cluster ..."),
    "report": ("mindspeed_wan.cli.report", "one HTML file about training runs"),
    "cluster": ("mindspeed_wan.cli.cluster", "job files for Slurm, Volcano, Kubeflow and ModelArts"),
}
"""Name -> (module, help). A command whose module is not part of the installation is not offered."""


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with our errors; parsers of sub-commands are of the same kind."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving, with the nearest option for a typo."""
        actions = _actions(self)
        if actions is not None and message == f"the following arguments are required: {actions.metavar}":
            raise ConfigError("no action is given", where=self.prog, fix=_choices(actions))
        raise ConfigError(message, where=self.prog, fix=nearest_option(message, list(_options(self))) or
                          f"{self.prog} --help lists what it takes")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Say what a command with actions takes, where argparse would speak of an invalid choice."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise ConfigError(f"'{value}' is not an action", where=self.prog,
                              fix=f"{did_you_mean(value, list(action.choices))} {_choices(action)}".strip())
        super()._check_value(action, value)


def _actions(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[Any] | None:
    return next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)


def _choices(actions: argparse._SubParsersAction[Any]) -> str:
    """Return the actions of a command, and what it takes without one where its ``help`` says so."""
    return f"actions: {', '.join(actions.choices)}" + (f"; {actions.help}" if actions.help else "")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its sub-commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _options(inner)


def available_commands() -> dict[str, tuple[str, str]]:
    """Return the commands whose module exists, without importing it."""
    return {name: entry for name, entry in COMMANDS.items() if importlib.util.find_spec(entry[0]) is not None}


def overview(commands: dict[str, tuple[str, str]]) -> str:
    """Return the help text of the command itself."""
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in commands.items()]
    return "\n".join([
        "usage: mindspeed-wan COMMAND [options]",
        "",
        "Train and run Wan2.2 A14B on Ascend NPU, CUDA and CPU.",
        "",
        "commands:",
        *lines,
        "",
        "  mindspeed-wan COMMAND --help   the options of a command",
        "  mindspeed-wan --version        the version",
        "",
        "Training and generation start from the launchers under examples/wan2.2, weights convert with mm-convert.",
    ])  # fmt: skip


def dispatch(argv: Sequence[str]) -> int | None:
    """Run the sub-command named by ``argv[0]`` and return its exit code.

    Raises:
        ConfigError: no such command (with the nearest name).
    """
    commands = available_commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(commands), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    if name in ("-V", "--version", "version"):
        print(f"mindspeed-wan {__version__}")
        return 0
    if name not in commands:
        raise ConfigError(
            f"'{name}' is not a command",
            where="mindspeed-wan",
            fix=f"{did_you_mean(name, tuple(commands))} commands: {', '.join(commands)}".strip(),
        )
    module_name, text = commands[name]
    module = importlib.import_module(module_name)
    parser = CommandParser(prog=f"mindspeed-wan {name}", description=text)
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def main() -> None:
    """Entry point of the console script."""
    run_main(lambda: dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()
