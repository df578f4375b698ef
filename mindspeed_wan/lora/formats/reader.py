"""Reads an adapter file of any format into a :class:`LoraFile`: every key resolved, paired and checked, or refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.safe_load import read_safetensors_header, safe_torch_load
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora.formats import alpha as alphas
from mindspeed_wan.lora.formats.bias import to_difference
from mindspeed_wan.lora.formats.file import Adapter, LoraFile
from mindspeed_wan.lora.formats.grammar import DIFF_LEAF, FORMATS, Role, detect, other_method, split_key
from mindspeed_wan.lora.names import NameTable
from mindspeed_wan.models.wan.config import WanConfig

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter.safetensors")
"""What to look for in a folder."""
_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ANOTHER_ALPHA = "'mindspeed-wan lora convert --alpha-override ALPHA' writes one that you know"
MAX_NAMED = 10


def read_lora(
    path: str | Path,
    config: WanConfig,
    *,
    alpha_override: float | None = None,
    alpha_default: float | None = None,
    allow_unmatched: bool = False,
) -> LoraFile:
    """Read the adapter file (or the folder that holds one) at ``path`` for the model ``config``.

    Args:
        alpha_override: use this alpha for every module, whatever the file says; VideoX-Fun's ``--use_peft_lora``
            files carry none, although trained at alpha / rank = 32 / 64.
        alpha_default: the alpha of modules for which the file says none, instead of their rank.
        allow_unmatched: keep going when keys name nothing in the model; they are listed in ``LoraFile.unmatched``.

    Raises:
        CheckpointError: not an adapter file, damaged, for another model, or with keys that name nothing.
    """
    file = find_file(path)
    tensors, metadata = read_tensors(file)
    return parse(tensors, metadata, config, where=str(file), file=file, alpha_override=alpha_override,
                 alpha_default=alpha_default, allow_unmatched=allow_unmatched)


def find_file(path: str | Path) -> Path:
    """Return ``path``, or the adapter file inside it when it is a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    shown = ", ".join(file.name for file in found[:MAX_NAMED]) or "none"
    raise CheckpointError(f"a folder with {len(found)} safetensors files ({shown})", where=str(path),
                          fix=f"name the file, or call it {FILE_NAMES[0]}")


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (mapped, not copied, for safetensors) and metadata of a file, integrity checked."""
    if file.suffix in _TORCH_SUFFIXES:
        content = safe_torch_load(file)
        for wrapper in ("state_dict", "model", "module"):
            if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError("holds something else than a dict of tensors", where=str(file))
        return dict(content), {}
    from safetensors.torch import load_file

    table = read_safetensors_header(file)
    return load_file(str(file)), dict(table.metadata)


def parse(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: WanConfig,
    *,
    where: str = "lora",
    file: Path | None = None,
    alpha_override: float | None = None,
    alpha_default: float | None = None,
    allow_unmatched: bool = False,
) -> LoraFile:
    """Turn a file's tensors (any device, meta included) into a :class:`LoraFile`; see :func:`read_lora`."""
    names = NameTable(config)
    parts, unmatched, format_name = _collect(tensors, names, where)
    if not parts:
        raise CheckpointError(f"none of its {len(tensors)} keys belongs to an adapter of this model; the first is "
                              f"{next(iter(tensors), 'missing')!r}", where=where,
                              fix="is this a LoRA for Wan, and not the weights of a whole model?")
    if unmatched and not allow_unmatched:
        shown = ", ".join(unmatched[:MAX_NAMED])
        raise CheckpointError(f"{len(unmatched)} keys match nothing in the model: {shown}", where=where,
                              fix="is it for another model? 'mindspeed-wan lora convert --allow-unmatched' leaves them "
                                  "out")
    scales = _AlphaSource(metadata, file, names, format_name, where, alpha_override, alpha_default)
    adapters: dict[str, Adapter] = {}
    diffs: dict[str, Tensor] = {}
    for mm in sorted(parts, key=_model_order(names)):
        roles = parts[mm]
        if roles.keys() & {"down", "up", "up_bias", "alpha"}:
            adapters[mm] = _adapter(mm, roles, names, scales, where)
        if "up_bias" in roles and (bias := _up_bias(mm, roles, names, where)) is not None:
            diffs[f"{mm}.bias"] = to_difference(bias, adapters[mm].scale)
        for role in ("diff", "diff_b", "diff_m"):
            if role in roles:
                name, diff = _diff(mm, role, roles[role], names, where)
                diffs[name] = diff
    return LoraFile(adapters, diffs, dict(metadata), format_name, scales.source(), tuple(unmatched))


def _collect(
    tensors: Mapping[str, Tensor], names: NameTable, where: str
) -> tuple[dict[str, dict[Role, Tensor]], list[str], str]:
    """Sort the tensors by module and role; return them, the unmatched keys and the format's name."""
    parts: dict[str, dict[Role, Tensor]] = {}
    unmatched: list[str] = []
    formats: Counter[str] = Counter()
    adapter_names: set[str] = set()
    for key, tensor in tensors.items():
        method = other_method(key)
        if method:
            raise CheckpointError(f"{key!r} belongs to {method}; only LoRA is supported", where=where)
        split = split_key(key)
        found = names.resolve(split[0]) if split else None
        if split is None or found is None:
            unmatched.append(key)
            continue
        _, role, adapter_name = split
        if role in parts.setdefault(found.mm, {}):
            raise CheckpointError(f"{key!r} gives the {role} of {found.mm} a second time", where=where)
        parts[found.mm][role] = tensor
        formats[detect(found.prefix, found.layout, key)] += role != "alpha"
        adapter_names.update([adapter_name] if adapter_name else [])
    if len(adapter_names) > 1:
        raise CheckpointError(f"holds several adapters: {', '.join(sorted(adapter_names))}", where=where,
                              fix="save one adapter per file")
    return parts, unmatched, formats.most_common(1)[0][0] if formats else "mm"


def _model_order(names: NameTable) -> Any:
    order = {name.rpartition(".")[0]: i for i, name in reversed(list(enumerate(names.params)))}
    order.update({name: i for i, name in enumerate(names.params)})
    return lambda mm: order[mm]


def _adapter(
    mm: str, roles: Mapping[Role, Tensor], names: NameTable, scales: _AlphaSource, where: str
) -> Adapter:
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        raise CheckpointError(f"{mm} has no {' and no '.join(missing)} matrix", where=where, fix="the file is damaged")
    param = names.params.get(f"{mm}.weight")
    if param is None or len(param.shape) < 2:
        raise CheckpointError(f"{mm} is not a linear layer, but has a low-rank pair", where=where)
    down = _matrix(mm, "down", _without_kernel(roles["down"], param.shape), where)
    up = _matrix(mm, "up", roles["up"], where)
    if down.shape[0] != up.shape[1]:
        raise CheckpointError(f"{mm}: ranks of down {list(down.shape)} and up {list(up.shape)} differ", where=where)
    if down.shape[0] == 0:
        raise CheckpointError(f"{mm}: rank is 0", where=where)
    out_features, in_features = param.shape[0], math.prod(param.shape[1:])
    if (up.shape[0], down.shape[1]) != (out_features, in_features):
        raise CheckpointError(f"{mm}: made for a layer of {up.shape[0]} x {down.shape[1]}, this model's is "
                              f"{out_features} x {in_features}", where=where, fix="it belongs to another Wan model")
    if down.dtype != up.dtype:
        raise CheckpointError(f"{mm}: down is {down.dtype}, up is {up.dtype}", where=where)
    return Adapter(*scales.unfold(mm, down, up), scales.of(mm, down.shape[0], roles.get("alpha")))


def _without_kernel(down: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the A of a convolution, which some files keep in its kernel's shape, as a matrix."""
    return down.flatten(1) if len(shape) > 2 and down.ndim == len(shape) else down


def _matrix(mm: str, role: str, tensor: Tensor, where: str) -> Tensor:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{mm}: {role} has dtype {tensor.dtype}", where=where, fix="expected floating point")
    while tensor.ndim > 2 and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    if tensor.ndim != 2:
        raise CheckpointError(f"{mm}: {role} has shape {list(tensor.shape)}, not two dimensions", where=where)
    return tensor


def _diff(mm: str, role: Role, tensor: Tensor, names: NameTable, where: str) -> tuple[str, Tensor]:
    name = mm if mm in names.params else f"{mm}.{DIFF_LEAF[role]}"
    param = names.params.get(name)
    if param is None:
        raise CheckpointError(f"{mm} has no {DIFF_LEAF[role]}, but a .{role}", where=where)
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{name}: the difference has dtype {tensor.dtype}", where=where)
    if _without_ones(tensor.shape) != _without_ones(param.shape):
        raise CheckpointError(f"{name}: the difference is {list(tensor.shape)}, the parameter {list(param.shape)}",
                              where=where, fix="it belongs to another Wan model")
    return name, tensor.reshape(param.shape)


def _up_bias(mm: str, roles: Mapping[Role, Tensor], names: NameTable, where: str) -> Tensor | None:
    """Return the bias of B, ``None`` when it is zero (PEFT writes one for every module)."""
    if "diff_b" in roles:
        raise CheckpointError(f"{mm} has a bias of B and a .diff_b", where=where, fix="the file mixes two formats")
    _, bias = _diff(mm, "diff_b", roles["up_bias"], names, where)
    return bias if bias.is_meta or bool(bias.any()) else None


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


class _AlphaSource:
    """Answers "what is alpha of this module", and remembers where the answers came from."""

    def __init__(
        self, metadata: Mapping[str, str], file: Path | None, names: NameTable, format_name: str, where: str,
        override: float | None, default: float | None,
    ) -> None:
        self.names, self.where, self.override, self.default = names, where, override, default
        self._modules: dict[str, list[str]] = {}
        self.own = None
        if alphas.OWN_KEY in metadata:
            self.own = alphas.load_json(metadata[alphas.OWN_KEY], f"metadata {alphas.OWN_KEY}", where)
        in_peft_terms = FORMATS[format_name].layout == "hf"
        self.peft = alphas.peft_settings(metadata, file, where) if in_peft_terms else None
        self.kohya = alphas.kohya_alpha(metadata)
        for given in (override, default):
            if given is not None and not (math.isfinite(given) and given > 0):
                raise ConfigError(f"alpha {given} is not positive")

    def unfold(self, mm: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Undo what our writer did for a loader that knows no scale: return A and B as they were."""
        name = alphas.folded_from(self.own or {}, mm, self.where)
        dtype = next((dtype for dtype in _DTYPES if str(dtype) == f"torch.{name}"), None)
        if dtype is None:
            return down, up
        return down.to(dtype), (up / (self._own_alpha(mm) / down.shape[0])).to(dtype)

    def of(self, mm: str, rank: int, stored: Tensor | None) -> float:
        """Return the effective alpha of module ``mm``."""
        if stored is not None:
            alpha, source = self._stored(mm, stored), "stored"
        elif self.own is not None and "alpha" in self.own:
            alpha, source = self._own_alpha(mm), "metadata"
        elif self.peft is not None:
            name = self.names.name_in(mm, "hf")
            alpha, source = alphas.peft_alpha(self.peft, name, rank, self.where), "metadata"
        elif self.kohya is not None:
            alpha, source = self.kohya, "metadata"
        elif self.default is not None:
            alpha, source = self.default, "given"
        else:
            alpha, source = float(rank), "default"
        if self.override is not None:
            alpha, source = self.override, "override"
        if not math.isfinite(alpha) or alpha <= 0:
            raise CheckpointError(f"{mm}: alpha is {alpha}", where=self.where, fix=_ANOTHER_ALPHA)
        self._modules.setdefault(source, []).append(mm)
        return alpha

    def source(self) -> str:
        """Return where every alpha came from; files with alphas for some of their modules are damaged."""
        if len(self._modules) > 1:
            missing = next(modules for source, modules in self._modules.items() if source != "stored")
            raise CheckpointError(f"alpha is stored for {len(self._modules['stored'])} modules but missing for "
                                  f"{len(missing)}, first {missing[0]}", where=self.where,
                                  fix=f"the file is damaged; or {_ANOTHER_ALPHA}")
        return next(iter(self._modules), "default")

    def _own_alpha(self, mm: str) -> float:
        assert self.own is not None
        return alphas.own_alpha(self.own, mm, self.where)

    def _stored(self, mm: str, stored: Tensor) -> float:
        if stored.numel() != 1:
            raise CheckpointError(f"{mm}: alpha has shape {list(stored.shape)}, not one value", where=self.where)
        return float(stored)
