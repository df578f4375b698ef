"""LoRA runs: what is trained, where the base weights and the adapter start, and the adapter file beside each save.

The base is frozen and stored in the compute type (bf16 under ``--bf16``: no masters, no moments, no gradients), or its
blocks in 8 bits (``--base-dtype fp8`` or ``int8``); the factors are fp32. Checkpoints hold the factors and their
moments only. Where things come from:

================================== ============================================ ==================================
flags                              base weights                                 adapter
================================== ============================================ ==================================
``--load BASE``                    BASE                                         fresh (A random, B zero)
``--load-base-model BASE``         BASE                                         fresh
``... --load-base-model BASE``     BASE                                         ``--load``: a run's checkpoint goes
``    --load ADAPTER``                                                          on; a file of any format starts one
``--from-scratch``                 random (to try things out)                   fresh
================================== ============================================ ==================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.dcp import view_like
from mindspeed_wan.checkpoint.manifest import TRACKER_NAME, checkpoint_folder
from mindspeed_wan.config.schema import LoraSection, RunConfig
from mindspeed_wan.diffusion import randomness
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.lora import apply
from mindspeed_wan.lora.formats import LoraFile, read_lora, write_lora
from mindspeed_wan.lora.spec import LoraSpec
from mindspeed_wan.models.quantization import quantize_layers
from mindspeed_wan.models.quantization_spec import QuantizationSpec
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.views import global_views
from mindspeed_wan.parallel.agreement import all_or_none, is_first
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.step import TrainStep

ADAPTER_FILE = "adapter.safetensors"
"""In each iteration's folder: the adapter in the format of ``--lora-format``."""
EMA_FILE = "adapter_ema.safetensors"
METADATA_KEY = "mindspeed_wan.training"
"""Metadata of these files: JSON with the task, expert, boundary, shift and iteration."""


def lora_spec(section: LoraSection) -> LoraSpec:
    """Return what the configuration's ``lora`` section asks for."""
    return LoraSpec(rank=section.r, alpha=section.alpha, dropout=section.dropout, targets=section.target_modules,
                    rslora=section.rslora, rank_pattern=section.rank_pattern)


def modifier(config: RunConfig) -> Callable[[WanDiT], None] | None:
    """Return what ``build_wan`` does to the model before it is cut: 8-bit layers, fp32 adapters, the rest frozen."""
    if config.lora is None:
        return None
    spec, eight_bits = lora_spec(config.lora), base_quantization(config.lora)
    return lambda model: _modify(model, spec, eight_bits)


def _modify(model: WanDiT, spec: LoraSpec, eight_bits: QuantizationSpec | None) -> None:
    if eight_bits is not None:
        quantize_layers(model, eight_bits)
    apply.add_adapter(model, spec, dtype=torch.float32)


def base_quantization(section: LoraSection) -> QuantizationSpec | None:
    """Return which layers of the base are held in 8 bits."""
    if section.base_dtype not in ("fp8", "int8"):
        return None
    return QuantizationSpec(f"{section.base_dtype}_weight_only", section.base_keep)


def base_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype that parameters are stored in: fp32, but a frozen base in the type it computes in."""
    frozen = config.lora is not None and config.lora.base_dtype != "fp32" and config.training.precision == "bf16"
    return torch.bfloat16 if frozen else torch.float32


def trained_views(config: RunConfig, model: WanDiT, groups: ParallelGroups) -> dict[str, Tensor]:
    """Return the global views that checkpoints of this run hold."""
    return global_views(model, groups) if config.lora is None else apply.adapter_views(model, groups)


def card_entries(config: RunConfig) -> dict[str, Any]:
    """Return what ``wan.json`` says about the adapters; nothing for a full run."""
    if config.lora is None:
        return {}
    eight_bits = base_quantization(config.lora)
    return {"lora": lora_spec(config.lora).to_dict(),
            **({"base_quantization": eight_bits.to_dict()} if eight_bits is not None else {})}


def check_same_kind(card: Mapping[str, Any], config: RunConfig, where: str) -> None:
    """Require that a checkpoint to be resumed was saved by the same kind of run.

    Raises:
        CheckpointError: adapters against all weights, another rank, alpha, dropout or other targets, or a base that
            was rounded in another way.
    """
    entries = card_entries(config)
    stored, wanted = card.get("lora"), entries.get("lora")
    if (stored is None) != (wanted is None):
        held, asked = ("all weights", "trains adapters") if stored is None else ("adapters", "trains all weights")
        raise CheckpointError(f"holds {held}, but this run {asked}", where=where,
                              fix="choose another --save, or the flags the run was started with")
    if stored is None or wanted is None:
        return
    if card.get("base_quantization") != entries.get("base_quantization"):
        raise CheckpointError(f"was trained on a base held in {_held(card)}, this run holds it in {_held(entries)}",
                              where=where, fix="use the --base-dtype and --base-keep the run was started with, or "
                              "another --save")
    changed = [f"{key} {stored.get(key)} instead of {value}" for key, value in wanted.items()
               if stored.get(key) != value]
    if changed:
        raise CheckpointError("was saved with other adapters: " + "; ".join(changed), where=where,
                              fix="use the --lora-* flags the run was started with, or another --save")


def _held(entries: Mapping[str, Any]) -> str:
    eight_bits = entries.get("base_quantization")
    if not eight_bits:
        return "its compute type"
    kept = f" but {', '.join(eight_bits['keep'])}" if eight_bits["keep"] else ""
    return f"{eight_bits['mode'].removesuffix('_weight_only')}{kept}"


# ---- where a run starts ------------------------------------------------------------------------------------------


def start_adapter(config: RunConfig, model: WanDiT, groups: ParallelGroups) -> None:
    """Fill the adapter's factors: from ``--load`` beside ``--load-base-model``, else fresh. Collective."""
    path = adapter_path(config)
    if path is None:
        apply.init_adapter(model, config.training.seed, groups)
        return
    all_or_none(lambda: apply.fill_adapter(model, read_lora(path, model.config), groups))
    if is_first():
        print(f" adapter started from {path}", flush=True)


def adapter_path(config: RunConfig) -> Path | None:
    """Return the adapter file that ``--load`` names beside ``--load-base-model``; ``None`` for a fresh adapter."""
    section = config.checkpoint
    if section.load_base_model is None or section.load is None:
        return None
    path = Path(section.load)
    if not path.exists():
        raise CheckpointError("does not exist", where=str(path), fix="set --load to an adapter, or leave it out")
    if (path / TRACKER_NAME).is_file():
        path = checkpoint_folder(path, section.ckpt_step)
    return path / ADAPTER_FILE if (path / ADAPTER_FILE).is_file() else path


def check_adapter(config: RunConfig, wan: WanConfig) -> str:
    """Check targets and the adapter to start from without a model (``--dry-run``); returns a description.

    Raises:
        ConfigError: a target or a kept layer that names nothing.
        CheckpointError: an adapter file that does not fit.
    """
    assert config.lora is not None
    sizes = lora_spec(config.lora).resolve(wan)
    eight_bits = base_quantization(config.lora)
    held = f" on a base with {len(eight_bits.layers(wan))} layers in 8 bits" if eight_bits is not None else ""
    path = adapter_path(config)
    start = "fresh" if path is None else f"{read_lora(path, wan).num_values} values from {path}"
    return f"{len(sizes)} modules{held}, {start}"


# ---- what is saved besides the checkpoint ------------------------------------------------------------------------


class AdapterFiles:
    """Writes the adapter, and its moving average, into each iteration's folder.

    Args:
        config: of a LoRA run.
        model: with its adapters on.
        groups: its layout.
        ema: the average, if there is one.
    """

    def __init__(self, config: RunConfig, model: WanDiT, groups: ParallelGroups, ema: Ema | None) -> None:
        assert config.lora is not None
        self._format, self._model, self._groups, self._ema = config.lora.format, model, groups, ema
        diffusion = config.diffusion
        self._origin = {"task": config.model.task, "expert": diffusion.expert, "boundary": diffusion.boundary,
                        "shift": diffusion.shift}

    def take(self, iteration: int) -> Callable[[Path], None]:
        """Copy the factors as they are now; returns what writes them into a folder. Collective."""
        files = {ADAPTER_FILE: apply.export_adapter(self._model, self._groups)}
        if self._ema is not None:
            averages = self._ema.averages
            views = {name: view_like(view, averages[name])
                     for name, view in apply.adapter_views(self._model, self._groups).items()}
            files[EMA_FILE] = apply.export_adapter(self._model, self._groups, views=views)
        return partial(self._write, files if is_first() else {}, iteration)

    def _write(self, files: Mapping[str, LoraFile], iteration: int, folder: Path) -> None:
        told = {METADATA_KEY: json.dumps({**self._origin, "iteration": iteration}, sort_keys=True)}
        for name, lora in files.items():
            write_lora(lora, folder / name, self._model.config, self._format, metadata=told)


# ---- dropout -----------------------------------------------------------------------------------------------------


class DropoutStep(TrainStep):
    """A step whose dropout masks belong to the samples: recomputation, tensor ranks and resumed runs agree on them."""

    def losses(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Name the masks of this micro-batch, then do what every step does."""
        index, epoch = batch.keys[0]
        stream = f"lora.dropout/{self.groups.cp_rank}"  # context ranks hold different tokens
        seed = randomness.generator(self.objective.seed, index, epoch, stream).initial_seed()
        assert isinstance(self.model, WanDiT)
        apply.seed_dropout(self.model, seed)
        return super().losses(batch)
