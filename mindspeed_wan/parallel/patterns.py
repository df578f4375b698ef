"""Modules by name, as MindSpeed's FSDP2 files write them, in both dialects.

MindSpeed-MM: a dotted path with at most one brace pair, ``predictor.blocks.{*}`` or ``predictor.blocks.{0-20,25}``;
``predictor`` is the DiT itself. MindSpeed: the import path of a class, ``package.module.WanDiTBlock``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from mindspeed_wan.errors import ConfigError

ROOT_NAME = "predictor"
"""What MindSpeed-MM calls the DiT."""

CLASS_ALIASES = {"WanDiTBlock": "WanBlock", "WanTransformerBlock": "WanBlock", "WanAttentionBlock": "WanBlock"}
"""Class names of the same module in MindSpeed-MM, Diffusers and the original code."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def select_modules(model: nn.Module, patterns: Iterable[str], *, where: str) -> list[nn.Module]:
    """Return the modules that ``patterns`` name, in model order and without repeats.

    Raises:
        ConfigError: a pattern is malformed or matches nothing; ``where`` names the config key in the message.
    """
    chosen: set[nn.Module] = set()
    for pattern in patterns:
        found = matching(model, pattern, where=where)
        if not found:
            raise ConfigError(
                f"'{pattern}' matches no module of the model",
                where=where,
                fix=f"name one of {_examples(model)} or the class {type(_first_block(model)).__name__}",
            )
        chosen.update(found)
    return [module for module in model.modules() if module in chosen]


def matching(model: nn.Module, pattern: str, *, where: str) -> list[nn.Module]:
    """Return the modules one pattern names, possibly none."""
    last = pattern.rsplit(".", 1)[-1]
    if last[:1].isupper():
        name = CLASS_ALIASES.get(last, last)
        return [module for module in model.modules() if type(module).__name__ == name]
    path = pattern.removeprefix(f"{ROOT_NAME}.")
    if path == ROOT_NAME:
        return [model]
    braces = _BRACES.findall(path)
    if len(braces) > 1 or path.count("{") != len(braces) or path.count("}") != len(braces):
        raise ConfigError(f"'{pattern}' is malformed", where=where, fix="write one {*} or {0-20,25} at most")
    if not braces:
        return [module for name, module in model.named_modules() if name == path]
    indices = _indices(braces[0], pattern, where)
    before, after = path.split("{", 1)[0], path.split("}", 1)[1]
    name_of = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    hits = ((name_of.fullmatch(name), module) for name, module in model.named_modules())
    return [module for hit, module in hits if hit and (indices is None or int(hit[1]) in indices)]


def _indices(text: str, pattern: str, where: str) -> set[int] | None:
    """Return the numbers of ``0-20,25``; ``None`` stands for all of them."""
    if text.strip() == "*":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        hit = _RANGE.fullmatch(part.strip())
        if not hit or (hit[2] is not None and int(hit[2]) < int(hit[1])):
            raise ConfigError(f"'{{{text}}}' in '{pattern}' is malformed", where=where, fix="write {*} or {0-20,25}")
        chosen.update(range(int(hit[1]), int(hit[2] or hit[1]) + 1))
    return chosen


def _first_block(model: nn.Module) -> nn.Module:
    lists = [module for module in model.children() if isinstance(module, nn.ModuleList) and len(module)]
    return lists[0][0] if lists else model


def _examples(model: nn.Module) -> str:
    children = [
        f"{ROOT_NAME}.{name}" + (".{*}" if isinstance(child, nn.ModuleList) else "")
        for name, child in model.named_children()
    ]
    return ", ".join(children)
