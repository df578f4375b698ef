"""Adapters of a whole model: put them on before training, load several at once for inference, weigh, unload, export.

Training: ``add_adapter`` inside ``build_wan(modify=...)`` (meta device, before FSDP2), then load the base weights into
``split_views(...)[0]``, then ``init_adapter`` or ``fill_adapter``. Inference: ``load_adapter`` on the finished model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_wan.diffusion import randomness
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora.formats.file import Adapter, LoraFile
from mindspeed_wan.lora.layers import LORA_A, LORA_B, LoraHook, Setting, adapt, hook_of
from mindspeed_wan.lora.spec import AdapterSize, LinearModule, LoraSpec, linear_modules, patch_embedding
from mindspeed_wan.models.quantization import QuantizedLinear
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.views import global_view, global_views, local_slices
from mindspeed_wan.parallel.groups import ParallelGroups

DEFAULT_NAME = "default"
View = TypeVar("View")
_FACTOR = re.compile(rf"^(?P<module>.+)\.({LORA_A}|{LORA_B})\.(?P<adapter>[^.]+)\.weight$")


# ---- training ---------------------------------------------------------------------------------------------------


def add_adapter(
    model: WanDiT, spec: LoraSpec, name: str = DEFAULT_NAME, *, dtype: torch.dtype | None = None
) -> dict[str, AdapterSize]:
    """Put trainable adapters on ``model`` and freeze everything else; returns their sizes by module.

    The factors take the device (usually meta) of the layer's weight, and its dtype (the one it computes in, of a layer
    in 8 bits) unless ``dtype`` is given (fp32 factors on a frozen bf16 model), and are not initialised.
    """
    held = linear_modules_of(model)
    sizes = {mm: size for mm, size in spec.resolve(model.config).items() if mm in held}
    if not sizes:
        raise ConfigError("no module of this pipeline stage gets an adapter",
                          fix="name modules of every block in --lora-target-modules, or use fewer stages")
    _check_name(model, name)
    model.requires_grad_(False)
    for mm, size in sizes.items():
        module, hook = _adapted(model, mm)
        weight: Tensor = module.weight  # type: ignore[assignment]
        down, up = (torch.empty(shape, dtype=dtype or _factor_dtype(module), device=weight.device)
                    for shape in hook.local_shapes(size.rank))
        hook.add(module, name, down, up, Setting(size.scale, dropout=spec.dropout), trainable=True)
        _register_layout(model, mm, name, hook)
    return sizes


@torch.no_grad()
def init_adapter(model: WanDiT, seed: int, groups: ParallelGroups | None = None, name: str = DEFAULT_NAME) -> None:
    """Initialise an adapter as PEFT does: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B zero.

    The values depend on (seed, module name) only, never on the layout.
    """
    for parameter, view in adapter_views(model, groups, name).items():
        local, index = local_slices(view)
        if f".{LORA_B}." in parameter:
            local.zero_()
        elif local.numel():
            rank, in_features = view.shape
            uniform = randomness.uniform(rank * in_features, seed=seed, sample_index=0, stream=f"lora/{parameter}")
            values = (uniform * 2 - 1).reshape(rank, in_features) / in_features**0.5
            local.copy_(values[index])


@torch.no_grad()
def fill_adapter(
    model: WanDiT, lora: LoraFile, groups: ParallelGroups | None = None, name: str = DEFAULT_NAME
) -> None:
    """Start training from an adapter file: it must have exactly the modules and ranks of the run.

    A file's scale may differ from the run's: B is multiplied by the ratio, so the model computes the same.
    """
    hooks = dict(_hooks(model, name))
    elsewhere = linear_modules(model.config).keys() - linear_modules_of(model).keys()
    given = {mm: adapter for mm, adapter in lora.adapters.items() if mm not in elsewhere}
    if hooks.keys() != given.keys():
        extra, missing = sorted(given.keys() - hooks.keys()), sorted(hooks.keys() - given.keys())
        raise CheckpointError(f"the adapter file and the run have other modules: {len(extra)} only in the file "
                              f"{extra[:3]}, {len(missing)} only in the run {missing[:3]}",
                              fix="set --lora-target-modules as the adapter was trained")
    if lora.diffs:
        raise CheckpointError("an adapter with plain differences cannot be trained further", fix="merge it first")
    views = adapter_views(model, groups, name)
    for mm, adapter in given.items():
        ratio = adapter.scale / hooks[mm].settings[name].scale
        for part, tensor in ((LORA_A, adapter.down), (LORA_B, adapter.up * ratio if ratio != 1.0 else adapter.up)):
            view = views[f"{mm}.{part}.{name}.weight"]
            if view.shape != tensor.shape:
                raise CheckpointError(f"{mm}: rank {adapter.rank} in the file, another one in the run "
                                      f"({list(view.shape)} instead of {list(tensor.shape)})",
                                      fix="set --lora-r as the adapter was trained")
            local, index = local_slices(view)
            local.copy_(tensor[index])


def seed_dropout(model: WanDiT, seed: int, name: str = DEFAULT_NAME) -> None:
    """Name the dropout masks of the next forward pass; each module draws its own from ``seed`` and its name."""
    for mm, hook in _hooks(model, name):
        setting = hook.settings[name]
        if setting.dropout:
            setting.seed = randomness.generator(seed, 0, stream=f"dropout/{mm}").initial_seed()


def adapter_views(model: WanDiT, groups: ParallelGroups | None = None, name: str | None = None) -> dict[str, Tensor]:
    """Return the factors (of one adapter, or of all) as pieces of their global tensors: what checkpoints hold."""
    return {
        parameter: view
        for parameter, view in global_views(model, groups).items()
        if is_factor(parameter) and (name is None or _FACTOR.match(parameter)["adapter"] == name)  # type: ignore[index]
    }


def split_views(views: Mapping[str, View]) -> tuple[dict[str, View], dict[str, View]]:
    """Split ``global_views`` (or ``weight_views``) into (base parameters, adapter factors)."""
    base = {name: view for name, view in views.items() if not is_factor(name)}
    return base, {name: view for name, view in views.items() if name not in base}


def is_factor(parameter: str) -> bool:
    """Tell whether a parameter name is an adapter's factor."""
    return _FACTOR.match(parameter) is not None


# ---- inference --------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_adapter(
    model: WanDiT, lora: LoraFile, name: str, *, weight: float = 1.0, groups: ParallelGroups | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter file on a finished model, beside others; each tensor rank keeps its part.

    Args:
        name: handle for ``set_weight`` and ``unload``.
        weight: strength; plain differences are added to the parameters times this weight, rounded to their dtype.
        dtype: of the factors; default that of the layer's weight.
    """
    _check_name(model, name)
    _add_differences(model, lora, name, weight, groups)
    held = linear_modules_of(model)
    for mm, adapter in lora.adapters.items():
        if mm not in held:
            continue  # another pipeline stage's
        module, hook = _adapted(model, mm)
        base: Tensor = module.weight  # type: ignore[assignment]
        layouts = hook.layouts()
        parts = []
        for tensor, layout, shape in zip((adapter.down, adapter.up), layouts, hook.local_shapes(adapter.rank)):
            local = torch.empty(shape, dtype=dtype or _factor_dtype(module), device=_device(base))
            _, index = local_slices(global_view(local, layout, groups))
            parts.append(local.copy_(tensor[index]))
        down, up = parts
        hook.add(module, name, down, up, Setting(adapter.scale, weight), trainable=False)
        _register_layout(model, mm, name, hook)
    _forget_compiled()


@torch.no_grad()
def set_weight(model: WanDiT, name: str, weight: float) -> None:
    """Change the strength of a loaded adapter; 0 switches it off at no cost."""
    hooks, differences = list(_hooks(model, name)), _differences(model)
    if not hooks and name not in differences.of:
        raise _unknown(model, name)
    for _, hook in hooks:
        hook.settings[name].weight = weight
    if name in differences.of:
        differences.weights[name] = weight
        differences.put(model, differences.of[name])


@torch.no_grad()
def unload(model: WanDiT, name: str) -> None:
    """Take an adapter off; the model is bit for bit what it was before ``load_adapter``."""
    hooks, differences = list(_hooks(model, name)), _differences(model)
    if not hooks and name not in differences.of:
        raise _unknown(model, name)
    differences.put(model, differences.of.pop(name, {}))
    differences.weights.pop(name, None)
    for mm, hook in hooks:
        hook.remove(model.get_submodule(mm), name)
        for part in (LORA_A, LORA_B):
            model.param_layout.pop(f"{mm}.{part}.{name}.weight", None)
    _forget_compiled()


def adapter_names(model: WanDiT) -> list[str]:
    """Return the names of all adapters on the model, in loading order."""
    found = dict.fromkeys(name for _, hook in _all_hooks(model) for name in hook.settings)
    return list(dict.fromkeys([*found, *_differences(model).of]))


def export_adapter(
    model: WanDiT, groups: ParallelGroups | None = None, name: str = DEFAULT_NAME,
    views: Mapping[str, Tensor] | None = None,
) -> LoraFile:
    """Return an adapter in whole tensors on the CPU. A collective: every rank must call it, every rank gets it.

    ``views`` gives other values for the same factors (a moving average); default ``adapter_views``.
    """
    views = adapter_views(model, groups, name) if views is None else views
    if not views:
        raise _unknown(model, name)

    def whole(parameter: str) -> Tensor:
        view = views[parameter]
        return (view.full_tensor() if isinstance(view, DTensor) else view).detach().cpu().clone()

    adapters = {}
    for mm, hook in _hooks(model, name):
        down, up = whole(f"{mm}.{LORA_A}.{name}.weight"), whole(f"{mm}.{LORA_B}.{name}.weight")
        adapters[mm] = Adapter(down, up, hook.settings[name].scale * down.shape[0])
    return LoraFile(_of_all_stages(adapters, groups))


def _of_all_stages(adapters: dict[str, Adapter], groups: ParallelGroups | None) -> dict[str, Adapter]:
    """Return the adapters of every pipeline stage on each of them. Collective."""
    if groups is None or groups.pp is None:
        return adapters
    stages: list[dict[str, Adapter]] = [{} for _ in range(groups.pp.size())]
    dist.all_gather_object(stages, adapters, group=groups.pp)
    return {mm: adapter for stage in stages for mm, adapter in stage.items()}


# ---- plain differences ------------------------------------------------------------------------------------------


@dataclass
class Differences:
    """What adapters add to the model's parameters: this rank's parts, and the bits that were there before.

    A parameter is always its original plus everything that is on it, so adapters may share one, come off in any order
    and change their weight; with the last one off it has its original bits.
    """

    of: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def put(self, model: WanDiT, parameters: Iterable[str]) -> None:
        """Bring ``parameters`` in step with the adapters that are there now."""
        for parameter in parameters:
            local = _local(model.get_parameter(parameter))
            on_it = [(self.weights[name], diffs[parameter]) for name, diffs in self.of.items() if parameter in diffs]
            if not on_it:
                local.copy_(self.originals.pop(parameter))
                continue
            if parameter not in self.originals:
                self.originals[parameter] = local.clone()
            total = self.originals[parameter].to(torch.float32, copy=True)
            for weight, diff in on_it:
                total += diff.to(total.device, torch.float32) * weight
            local.copy_(total)


def _add_differences(model: WanDiT, lora: LoraFile, name: str, weight: float, groups: ParallelGroups | None) -> None:
    parts: dict[str, Tensor] = {}
    for parameter, diff in lora.diffs.items():
        if parameter not in model.param_layout:
            continue  # another pipeline stage's
        target = model.get_parameter(parameter)
        if not target.is_floating_point():
            raise ConfigError(f"an adapter changes {parameter} itself, which is held in 8 bits",
                              fix="merge it (--lora_merge), or keep that layer in high precision (--quantize_keep)")
        _, index = local_slices(global_view(target.detach(), model.param_layout[parameter], groups))
        parts[parameter] = diff[index]
    if parts:
        differences = _differences(model)
        differences.of[name], differences.weights[name] = parts, weight
        differences.put(model, parts)


def _differences(model: WanDiT) -> Differences:
    return model.__dict__.setdefault("_lora_differences", Differences())


# ---- shared -----------------------------------------------------------------------------------------------------


def _adapted(model: WanDiT, mm: str) -> tuple[nn.Module, LoraHook]:
    module = model.get_submodule(mm)
    return module, adapt(module, linear_modules_of(model)[mm], model.layers)


def linear_modules_of(model: WanDiT) -> dict[str, LinearModule]:
    """Return the modules of this rank that an adapter can sit on (kept with the model: the table has 407 rows)."""
    cached = model.__dict__.get("_lora_linear_modules")
    if cached is None:
        held = {name for name, _ in model.named_modules()}
        patches = patch_embedding(model.config)
        table = {patches.mm: patches, **linear_modules(model.config)}
        cached = model.__dict__["_lora_linear_modules"] = {mm: row for mm, row in table.items() if mm in held}
    return cached


def _all_hooks(model: WanDiT) -> Iterator[tuple[str, LoraHook]]:
    for mm in linear_modules_of(model):
        hook = hook_of(model.get_submodule(mm))
        if hook is not None:
            yield mm, hook


def _hooks(model: WanDiT, name: str) -> Iterator[tuple[str, LoraHook]]:
    return ((mm, hook) for mm, hook in _all_hooks(model) if name in hook.settings)


def _register_layout(model: WanDiT, mm: str, name: str, hook: LoraHook) -> None:
    for part, layout in zip((LORA_A, LORA_B), hook.layouts()):
        model.param_layout[f"{mm}.{part}.{name}.weight"] = layout


def _check_name(model: WanDiT, name: str) -> None:
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(f"adapter name {name!r}", fix="use letters, digits and underscores")
    if name in adapter_names(model):
        raise ConfigError(f"an adapter called {name!r} is already there", fix="unload it or choose another name")


def _unknown(model: WanDiT, name: str) -> ConfigError:
    return ConfigError(f"no adapter is called {name!r}", fix=f"loaded: {', '.join(adapter_names(model)) or 'none'}")


def _factor_dtype(module: nn.Module) -> torch.dtype:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return module.compute_dtype if isinstance(module, QuantizedLinear) else weight.dtype


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _device(tensor: Tensor) -> torch.device:
    return _local(tensor).device


def _forget_compiled() -> None:
    """Compiled blocks do not look for new hooks; make them trace again."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it costs 2 s; without it nothing is compiled
    if dynamo is not None:
        dynamo.reset()
