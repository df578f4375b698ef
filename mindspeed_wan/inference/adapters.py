"""The adapters of a generation: read once, checked against the experts, then beside their weights or merged in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.inference.lora_options import LoraOptions
from mindspeed_wan.inference.runtime import Runtime
from mindspeed_wan.lora.apply import load_adapter, unload
from mindspeed_wan.lora.expert import expert_of, told_expert
from mindspeed_wan.lora.formats import LoraFile, read_lora
from mindspeed_wan.lora.layers import Factor
from mindspeed_wan.lora.merge import change_of_rows, touched_parameters
from mindspeed_wan.lora.merge_model import merge_into_model
from mindspeed_wan.models.quantization import Change, quantized_layers
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT

Chosen = list[tuple[LoraFile, float]]


@dataclass
class ExpertAdapters:
    """What each expert gets. ``attach`` it after its weights are in the model, ``detach`` before others are.

    ``on`` names the adapters that are on a model now, by the model's id.
    """

    files: dict[str, Chosen]
    merge: bool
    runtime: Runtime
    on: dict[int, list[str]] = field(default_factory=dict)

    def change(self, expert: str) -> Change | None:
        """Return what merging adds to a weight while it is read; ``None`` when nothing is merged."""
        chosen = self.files.get(expert, [])
        if not (self.merge and chosen):
            return None
        return lambda name, rows, columns, shape, device: change_of_rows(name, rows, columns, shape, chosen, device)

    def attach(self, model: WanDiT, expert: str) -> None:
        """Put the expert's adapters on ``model``, or merge them and say what the weights' dtype kept of them.

        Weights in 8 bits were merged while they were read (``change``); the rest is merged here.
        """
        chosen, groups = self.files.get(expert, []), self.runtime.groups
        if not chosen:
            return
        if self.merge:
            before = {f"{name}.weight" for name, _ in quantized_layers(model)} & touched_parameters(chosen).keys()
            report = merge_into_model(model, chosen, groups, skip=before)
            if self.runtime.rank == 0:
                rounded = f"; into {len(before)} more in fp32, before they were rounded to 8 bits" if before else ""
                print(f"{expert} expert: {len(chosen)} adapters merged into {len(report.losses)} parameters: "
                      f"{report.total}{rounded}", flush=True)
            return
        names = [f"adapter_{place}" for place in range(len(chosen))]
        for name, (lora, weight) in zip(names, chosen):
            load_adapter(model, lora, name, weight=weight, groups=groups)
        self.on[id(model)] = names

    def detach(self, model: WanDiT) -> None:
        """Take them off again; the parameters are bit for bit what they were. Merged ones stay."""
        for name in reversed(self.on.pop(id(model), [])):
            unload(model, name)

    def describe(self) -> list[str]:
        """Return one line per file for the log."""
        how = "merged" if self.merge else "beside the weights"
        return [f"{expert} expert: {len(lora.adapters)} modules, rank {'/'.join(map(str, lora.ranks))}, {lora.format}, "
                f"weight {weight:g}, {how}" for expert, chosen in self.files.items() for lora, weight in chosen]


def read_adapters(
    options: LoraOptions, config: WanConfig, experts: tuple[str, ...], runtime: Runtime
) -> ExpertAdapters | None:
    """Read every adapter file; ``None`` when there is none. Collective over the replica.

    A model with one expert takes the low expert's files too: ``--lora_path`` is the only one people give then.

    Raises:
        CheckpointError: a file is damaged, of another model, or of the other expert.
    """
    if not options:
        return None
    chosen: dict[str, list[tuple[Path, float]]] = {expert: options.of(expert) for expert in experts}
    if len(experts) == 1:
        chosen = {experts[0]: [*options.of("high"), *options.of("low")]}

    def read(path: Path, expert: str) -> LoraFile:
        lora = read_lora(path, config, alpha_default=options.alpha, allow_unmatched=options.allow_unmatched)
        if lora.unmatched and runtime.rank == 0:
            print(f"warning: {len(lora.unmatched)} keys of {path} match nothing in the model and are left out, first "
                  f"{lora.unmatched[0]}", flush=True)
        if len(experts) > 1:
            _check_expert(path, lora, expert)
        return lora

    files = {expert: runtime.agree(lambda c=c, e=expert: [(read(path, e), weight) for path, weight in c])  # type: ignore[misc]
             for expert, c in chosen.items()}
    return ExpertAdapters(files, options.merge, runtime)


def _check_expert(path: Path, lora: LoraFile, expert: str) -> None:
    """Our own files know their expert; of others a name may say so, which is worth a warning."""
    known = told_expert(lora.metadata)
    if known is not None and known != expert:
        flag, other = ("--lora_path", "--lora_high_path") if expert == "low" else ("--lora_high_path", "--lora_path")
        raise CheckpointError(f"was trained on the {known}-noise expert, but {flag} puts it on the {expert}-noise one",
                              where=str(path), fix=f"give it with {other}")
    guess = expert_of(lora.metadata, path)
    if guess is not None and guess != expert:
        print(f"warning: {path.name} looks like an adapter of the {guess}-noise expert; it is put on the "
              f"{expert}-noise one", flush=True)


def move_factors(model: nn.Module, device: torch.device) -> None:
    """Put adapters on the device while the weights beside them stay on the host (streamed blocks)."""
    for module in model.modules():
        if isinstance(module, Factor):
            module.weight = nn.Parameter(module.weight.detach().to(device), requires_grad=False)
