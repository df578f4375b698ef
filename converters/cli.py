"""The command line of ``mm-convert`` (also ``wan-convert``): MindSpeed-MM's grammar and a short one.

    mm-convert [Converter] verb SOURCE TARGET [options]
    mm-convert [Converter] verb --cfg.source_path SOURCE --cfg.target_path TARGET [options]
    mm-convert --config conversion.yaml [--print_config]

The converter may be left out; a YAML file holds the same keys, nested as ``--print_config`` prints them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mindspeed_wan.errors import ConfigError, did_you_mean, nearest_option, run_main
from mindspeed_wan_converters.verbs import CONVERTERS, ELSEWHERE, VERBS, run_verb

_DTYPES = ("fp32", "bf16", "fp16")

# option name in the file and on the command line -> attribute of the parsed arguments
_CFG_KEYS = {
    "source_path": "source_path", "target_path": "target_path", "hf_dir": "hf_dir", "lora_path": "lora_path",
    "target_parallel_config.tp_size": "tp_size", "target_parallel_config.pp_layers": "pp_layers",
    "target_parallel_config.ep_size": "ep_size",
}
_OPTIONS = ("expert", "dtype", "max_shard_size", "workers", "dry_run", "overwrite", "resume", "verify", "quiet", "json",
            "lora_rank", "lora_alpha", "use_npu")


def main() -> None:
    """Entry point of ``mm-convert`` and ``wan-convert``."""
    run_main(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return the exit code; errors are raised as ``WanError``."""
    argv = ["--print_config" if word.startswith("--print_config=") else word for word in argv]
    names, rest = _split_names(argv)
    _check_name(names[-1] if names else "hf_to_mm")
    parser = _parser()
    if not argv or (rest[:1] in (["-h"], ["--help"]) and not names):
        parser.print_help()
        return 0
    args = parser.parse_args(rest)
    file = _read_config(args.config) if args.config else {}
    converter, verb = _resolve_names(names, file)
    merged = _merge(args, _section(file, converter, verb, args.config))
    if merged.print_config:
        _print_config(merged, converter, verb)
        return 0
    return run_verb(VERBS[verb], converter, merged)


# ---- names ---------------------------------------------------------------------------------------------------


def _split_names(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take converter and verb out of the leading positional arguments; options may stand before them."""
    names: list[str] = []
    rest = list(argv)
    at = 0
    while at < len(rest) and len(names) < 2:
        word = rest[at]
        if word == "--config":
            at += 2
        elif word.startswith("-"):
            at += 1
        elif word in CONVERTERS and not names:
            names.append(rest.pop(at))
        else:
            if word in VERBS or not _is_config_run(rest):
                names.append(rest.pop(at))
            break
    return names, rest


def _is_config_run(words: Sequence[str]) -> bool:
    return any(word == "--config" or word.startswith("--config=") for word in words)


def _resolve_names(names: list[str], file: Mapping[str, Any]) -> tuple[str, str]:
    converter = names.pop(0) if names and names[0] in CONVERTERS else None
    if converter is None:
        converter = next((name for name in file if name in CONVERTERS), "WanConverter")
    inside = file.get(converter, file)
    verb = names.pop(0) if names else next((name for name in inside if name in VERBS), None)
    if verb is None:
        raise ConfigError("no verb", fix=f"one of: {', '.join(VERBS)}")
    if verb in ELSEWHERE:
        raise ConfigError(f"{verb} is not a verb of mm-convert here", fix=ELSEWHERE[verb])
    if verb not in VERBS:
        _check_name(verb)
        raise ConfigError("no verb", fix=f"one of: {', '.join(VERBS)}")
    return converter, verb


def _check_name(name: str) -> None:
    known = [*VERBS, *CONVERTERS]
    if name not in known and name not in ELSEWHERE and not name.startswith("-"):
        raise ConfigError(f"unknown verb or converter {name!r}", fix=did_you_mean(name, known)
                          or f"one of: {', '.join(VERBS)}; converters: {', '.join(CONVERTERS)}")


# ---- options -------------------------------------------------------------------------------------------------


_PATTERN_FIX = ("give one source and one target; the shell turns a pattern like transformer* into two paths: give the "
                "pipeline folder instead, which converts both experts")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Turn argparse's exit into our error, with the nearest option for a typo."""
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments") and "--" not in message:
            raise ConfigError(message, fix=_PATTERN_FIX)
        raise ConfigError(message, fix=nearest_option(message, known) or "mm-convert --help lists the options")


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb.name:<20}{verb.help}" for verb in VERBS.values())
    parser = _Parser(
        prog="mm-convert", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mm-convert [Converter] verb SOURCE [TARGET] [options]",
        description=f"Convert Wan weights between formats, streamed and verified.\n\nverbs:\n{verbs}\n\n"
                    f"converters: {', '.join(CONVERTERS)} (the last two insist on the task)",
        epilog="Of a pipeline folder both experts are converted, into transformer/ and transformer_2/ of the target.\n"
               "Exit codes: 0 ok, 2 usage, 3 disk, 4 bad weights.")
    parser.add_argument("source", nargs="?", help="folder to read: one expert, a pipeline, or a checkpoint root")
    parser.add_argument("target", nargs="?", help="folder to write (verify: folder to compare with)")
    cfg = parser.add_argument_group("MindSpeed-MM's spelling")
    cfg.add_argument("--cfg.source_path", dest="source_path", metavar="SOURCE")
    cfg.add_argument("--cfg.target_path", dest="target_path", metavar="TARGET")
    cfg.add_argument("--cfg.hf_dir", dest="hf_dir", metavar="FOLDER",
                     help="Diffusers folder of the model: supplies what MM/DCP files do not tell; a pipeline folder "
                          "makes *_to_hf write a complete pipeline that links its other parts")
    cfg.add_argument("--cfg.target_parallel_config.tp_size", dest="tp_size", type=int, metavar="N")
    cfg.add_argument("--cfg.target_parallel_config.pp_layers", dest="pp_layers", type=_layers, metavar="LIST",
                     help="blocks per stage, '[10,10,10,10]'; with virtual stages '[[5,5],[5,5]]'")
    cfg.add_argument("--cfg.target_parallel_config.ep_size", dest="ep_size", type=int, metavar="1")
    cfg.add_argument("--cfg.lora_path", dest="lora_path", metavar="ADAPTER", help="merge_lora_to_base: the adapter")
    cfg.add_argument("--lora_rank", type=int, metavar="N", help="compared with the adapter's own rank")
    cfg.add_argument("--lora_alpha", type=float, metavar="A", help="for adapters that carry no alpha")
    cfg.add_argument("--use_npu", metavar="BOOL", help="accepted; merging is fp32 on the CPU, one weight at a time")
    add = parser.add_argument_group("options").add_argument
    add("--expert", choices=("high", "low"), help="convert one expert of a pipeline, or name the one given")
    add("--dtype", choices=_DTYPES, help="store in this precision (default: as in the source)")
    add("--max-shard-size", dest="max_shard_size", type=_size, metavar="SIZE", help="e.g. 5GB, the default")
    add("--workers", type=int, metavar="N", help="files written at the same time (default: CPU cores, at most 4)")
    add("--dry-run", dest="dry_run", action="store_true", default=None,
        help="print the plan, the table of names, bytes needed and free; write nothing")
    add("--overwrite", action="store_true", default=None, help="replace an earlier result, once the new one is whole")
    add("--resume", action="store_true", default=None, help="go on where an interrupted conversion stopped")
    add("--verify", action="store_true", default=None, help="read the result back and compare SHA-256")
    add("--quiet", action="store_true", default=None, help="no progress")
    add("--json", action="store_true", default=None, help="inspect: machine-readable output")
    add("--config", metavar="FILE", help="YAML file with these options; the command line overrides it")
    add("--print_config", action="store_true", help="print the options as YAML and exit")
    add("--version", action="version", version=f"mindspeed-wan {_version()}")
    return parser


def _version() -> str:
    from mindspeed_wan import __version__

    return __version__


def _layers(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like [10,10] or [[5,5],[5,5]]") from None


def _size(text: str) -> int:
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(digits):].strip().upper()
    try:
        value = int(float(digits) * units[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return value


_DEFAULTS: dict[str, Any] = {"tp_size": 1, "pp_layers": [], "ep_size": 1, "max_shard_size": 5 * 10**9, "workers": 0,
                             "dry_run": False, "overwrite": False, "resume": False, "verify": False, "quiet": False,
                             "json": False}


# ---- configuration file --------------------------------------------------------------------------------------


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            value = yaml.safe_load(stream)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", where=path) from None
    if not isinstance(value, dict):
        raise ConfigError("is not a table of options", where=path, fix="see mm-convert ... --print_config")
    return value


def _section(file: Mapping[str, Any], converter: str, verb: str, path: str | None) -> dict[str, Any]:
    """Return attribute -> value for ``converter`` and ``verb`` out of a configuration file."""
    section: Any = file.get(converter, file)
    section = section.get(verb, section) if isinstance(section, dict) else section
    if not isinstance(section, dict):
        raise ConfigError(f"{converter}.{verb} is not a table of options", where=path)
    known = {**{f"cfg.{key}": name for key, name in _CFG_KEYS.items()}, **{name: name for name in _OPTIONS}}
    values: dict[str, Any] = {}
    for key, value in _flatten(section):
        name = known.get(key) or known.get(key.replace("-", "_"))
        if name is None:
            raise ConfigError(f"unknown key {key!r}", where=path, fix=did_you_mean(key, list(known)))
        values[name] = _checked(name, value, path)
    return values


def _checked(name: str, value: Any, path: str | None) -> Any:
    """Hold a value from the file to what the command line would take."""
    if name == "max_shard_size" and isinstance(value, str):
        return _size(value)
    kinds: dict[str, tuple[type, ...]] = {"tp_size": (int,), "ep_size": (int,), "workers": (int,), "pp_layers": (list,),
                                          "lora_rank": (int, type(None)), "lora_alpha": (int, float, type(None)),
                                          "use_npu": (bool, str, type(None)),
                                          "max_shard_size": (int,)}
    flags = ("dry_run", "overwrite", "resume", "verify", "quiet", "json")
    wanted = (bool,) if name in flags else kinds.get(name, (str, type(None)))
    choices = {"dtype": _DTYPES, "expert": ("high", "low")}.get(name)
    if not isinstance(value, wanted) or (choices and value is not None and value not in choices):
        raise ConfigError(f"{name} is {value!r}", where=path, fix=f"choose {' or '.join(choices)}" if choices else None)
    return value


def _flatten(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        pairs += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs


def _merge(args: argparse.Namespace, file: Mapping[str, Any]) -> argparse.Namespace:
    """Combine command line, file and defaults, in this order of precedence."""
    for short, name in (("source", "source_path"), ("target", "target_path")):
        given, long = getattr(args, short), getattr(args, name)
        if given is not None and long is not None:
            raise ConfigError(f"the {short} is given twice: {given!r} and --cfg.{name} {long!r}", fix=_PATTERN_FIX)
        setattr(args, name, given if given is not None else long)
    for name in (*_CFG_KEYS.values(), *_OPTIONS):
        if getattr(args, name, None) is None:
            setattr(args, name, file.get(name, _DEFAULTS.get(name)))
    return args


def _print_config(args: argparse.Namespace, converter: str, verb: str) -> None:
    import yaml

    cfg: dict[str, Any] = {"target_parallel_config": {}}
    for key, name in _CFG_KEYS.items():
        outer, _, inner = key.partition(".")
        if inner:
            cfg[outer][inner] = getattr(args, name)
        else:
            cfg[outer] = getattr(args, name)
    section = {"cfg": cfg, **{name: getattr(args, name) for name in _OPTIONS}}
    print(yaml.safe_dump({converter: {verb: section}}, sort_keys=False), end="")
