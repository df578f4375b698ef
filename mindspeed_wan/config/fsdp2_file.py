"""fsdp2_config.yaml in its two dialects, to ``Fsdp2Section``.

MindSpeed-MM names modules by dotted path (``predictor.blocks.{*}``) and treats a null sharding_size as 1. MindSpeed's
own class of the same name lists import paths of classes (``pkg.module.WanDiTBlock``) and treats null as all ranks.
A file is of the second dialect when its module lists hold class names.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from mindspeed_wan.config.base import Section
from mindspeed_wan.config.documents import Document
from mindspeed_wan.config.translate import DTYPES, Report

BLOCKS = "predictor.blocks.{*}"
_PATTERN = re.compile(r"^[A-Za-z_]\w*(\.\w+)*(\.\{(\*|\d+(-\d+)?(,\d+(-\d+)?)*)\}(\.\w+)*)?$")
_CLASS_PATH = re.compile(r"^[\w.]+\.[A-Z]\w*$")

DTypeName = Literal["fp32", "float32", "bf16", "bfloat16"]


class Fsdp2File(Section):
    """The YAML file of --fsdp2-config-path, key for key as MindSpeed-MM has it."""

    sharding_size: int | Literal["auto"] | None = None
    """Ranks that share one copy of the parameters; auto is all of data x context."""
    sub_modules_to_wrap: list[str] | None = None
    """Modules that become one unit each."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass."""
    param_dtype: DTypeName | None = None
    """Compute type."""
    reduce_dtype: DTypeName | None = "fp32"
    """Type gradients are reduced in; null is the compute type."""
    output_dtype: DTypeName | None = None
    """Type of unit outputs."""
    cast_forward_inputs: bool = True
    """No effect: the model casts its inputs where its numerics want it."""
    ignored_modules: list[str] | None = None
    """Modules left alone."""
    recompute_modules: list[str] | None = None
    """Modules whose activations are recomputed."""
    use_reentrant: bool = True
    """No effect: recomputation is non-reentrant."""
    num_to_forward_prefetch: int | None = Field(default=1, ge=0)
    """Units gathered ahead, forward."""
    num_to_backward_prefetch: int | None = Field(default=1, ge=0)
    """Units gathered ahead, backward."""
    offload_to_cpu: bool = False
    """Keep parameters and optimizer state on the host."""
    pin_memory: bool = True
    """Page-lock them."""
    align_fsdp_param_groups: Literal[False] | None = None
    """Mixture-of-experts models only."""
    expert_parallel_size: Literal[1] | None = None
    """Mixture-of-experts models only."""
    reshard_local_experts: bool | None = None
    """Mixture-of-experts models only."""
    moe_modules: list[str] | None = Field(default=None, max_length=0)
    """Mixture-of-experts models only."""


FSDP2_WHY = {
    "align_fsdp_param_groups": "Wan's A14B has two dense experts, no mixture-of-experts layers",
    "expert_parallel_size": "Wan's A14B has two dense experts, no mixture-of-experts layers",
    "moe_modules": "Wan's A14B has two dense experts, no mixture-of-experts layers",
}


def fsdp2_section(file: Fsdp2File, document: Document, report: Report) -> dict[str, Any]:
    """Return the keyword arguments of ``Fsdp2Section``."""
    wrapped = [*(file.sub_modules_to_wrap or []), *(file.recompute_modules or [])]
    is_class_dialect = any(_CLASS_PATH.match(name) for name in wrapped)
    size = file.sharding_size
    if isinstance(size, int) and size < 1:
        report.fail(f"sharding_size {size} is less than 1", document, ("sharding_size",), "write auto")
        size = "auto"
    if size is None:
        size = "auto" if is_class_dialect else None
        if size is None:
            report.note(f"{document.path}: sharding_size is not set, so parameters are replicated; auto shards them")
    if document.has(("use_reentrant",)) and file.use_reentrant:
        report.note("use_reentrant has no effect: recomputation is non-reentrant, with the same gradients")
    if not file.cast_forward_inputs:
        report.note("cast_forward_inputs has no effect: the model casts its inputs where its numerics want it")
    section: dict[str, Any] = {
        "sharding_size": size,
        "sub_modules_to_wrap": _patterns(file.sub_modules_to_wrap, "sub_modules_to_wrap", document, report),
        "recompute_modules": _patterns(file.recompute_modules, "recompute_modules", document, report),
        "ignored_modules": tuple(file.ignored_modules or ()),
        "use_reentrant": False,
        "num_to_forward_prefetch": file.num_to_forward_prefetch or 0,
        "num_to_backward_prefetch": file.num_to_backward_prefetch or 0,
    }
    for name in ("param_dtype", "reduce_dtype", "output_dtype"):
        value = getattr(file, name)
        section[name] = DTYPES[value] if value else None
    for name in ("reshard_after_forward", "cast_forward_inputs", "offload_to_cpu", "pin_memory"):
        section[name] = getattr(file, name)
    return section


def _patterns(names: list[str] | None, key: str, document: Document, report: Report) -> tuple[str, ...]:
    """Return the names as they are, malformed ones reported; ``parallel.patterns`` finds the modules they mean."""
    result: list[str] = []
    for index, name in enumerate(names or ()):
        if _CLASS_PATH.match(name):
            result.append(name)  # the model knows which of its modules that class made
        elif not _PATTERN.match(name):
            report.fail(f"{key}: {name!r} is not a module pattern", document, (key, index),
                        f"write a dotted path with at most one {{*}} or {{0-20,25}}, like {BLOCKS}")  # fmt: skip
        else:
            result.append(name)
    return tuple(dict.fromkeys(result))
