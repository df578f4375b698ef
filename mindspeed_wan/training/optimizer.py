"""AdamW over local shards, with fp32 master weights where the parameters are not fp32.

The optimizer never sees a DTensor: every update is element-wise, so it runs on ``to_local()`` of what FSDP2 shards
and on Megatron's plain TP-local tensors alike. Its state is one fp32 tensor per moment and parameter, shaped like the
local shard, which ``checkpoint.dcp`` views as global tensors exactly like the parameter.

Weight decay follows Megatron's rule: one-dimensional parameters (biases, norm weights) are not decayed; everything
else is, the [1, 6, D] modulation tables included (as in MindSpeed-MM, which uses Megatron's groups).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.adamw import adamw


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (shared storage), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decays(parameter: Tensor) -> bool:
    """Megatron's rule: only tensors of two or more dimensions are decayed."""
    return parameter.dim() > 1


@dataclass
class Moments:
    """Adam state of one parameter, fp32, shaped like its local shard.

    ``master`` is the fp32 weight the update works on; ``None`` when the parameter itself is fp32.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None = None


class AdamW:
    """AdamW (Loshchilov & Hutter) by torch's functional update.

    Args:
        parameters: name -> parameter; frozen ones (``requires_grad`` false) are left out.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        fused: use torch's fused kernel; the default is the foreach form (one launch per list of tensors).
    """

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], *, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, fused: bool = False) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.betas, self.eps, self.fused = betas, eps, fused
        self.steps = 0
        self.state = {name: self._fresh(p) for name, p in self.parameters.items()}

    @staticmethod
    def _fresh(parameter: Parameter) -> Moments:
        shard = local(parameter.detach())
        zeros = torch.zeros_like(shard, dtype=torch.float32)
        # clone() even of fp32 would be wrong here: an fp32 parameter is its own master.
        master = None if shard.dtype == torch.float32 else shard.float()
        return Moments(zeros, torch.zeros_like(zeros), master)

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Update every parameter that has a gradient; gradients are read as fp32 and not modified."""
        self.steps += 1
        for decay in (True, False):
            names = [n for n, p in self.parameters.items() if p.grad is not None and decays(p) == decay]
            if names:
                self._update(names, learning_rate, weight_decay if decay else 0.0)

    def _update(self, names: list[str], learning_rate: float, weight_decay: float) -> None:
        # An uneven shard may be empty on this rank; kernels get only tensors with elements.
        names = [n for n in names if local(self.parameters[n]).numel()]
        if not names:
            return
        states = [self.state[n] for n in names]
        shards = [local(self.parameters[n].detach()) for n in names]
        weights = [s.master if s.master is not None else shard for s, shard in zip(states, shards)]
        device = weights[0].device if self.fused else torch.device("cpu")
        counts = torch.full((len(names),), float(self.steps - 1), device=device)  # the update adds one to each
        adamw(
            weights,
            [local(cast(Tensor, self.parameters[n].grad)).to(torch.float32) for n in names],
            [s.exp_avg for s in states],
            [s.exp_avg_sq for s in states],
            [],
            list(counts.unbind()),
            foreach=not self.fused,
            fused=self.fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
        for state, shard in zip(states, shards):
            if state.master is not None:
                shard.copy_(state.master)

    def zero_grad(self) -> None:
        """Drop every gradient (freed, not zeroed)."""
        for parameter in self.parameters.values():
            parameter.grad = None

    # ---- what a checkpoint holds -----------------------------------------------------------------------------

    def masters(self) -> dict[str, Tensor]:
        """Return name -> fp32 local weights: the masters, or the parameters where these are fp32 themselves."""
        pairs = ((n, self.state[n].master, p) for n, p in self.parameters.items())
        return {n: local(p.detach()) if master is None else master for n, master, p in pairs}

    @torch.no_grad()
    def masters_to_parameters(self) -> None:
        """Round the masters into the parameters (after a checkpoint was read into the masters)."""
        for name, state in self.state.items():
            if state.master is not None:
                local(self.parameters[name].detach()).copy_(state.master)

    @torch.no_grad()
    def parameters_to_masters(self) -> None:
        """Take the parameters as masters (after weights alone were loaded)."""
        for name, state in self.state.items():
            if state.master is not None:
                state.master.copy_(local(self.parameters[name].detach()))

    def moments(self) -> Mapping[str, dict[str, Tensor]]:
        """Return name -> {"exp_avg", "exp_avg_sq"}, local shards, fp32, the live tensors."""
        return {n: {"exp_avg": s.exp_avg, "exp_avg_sq": s.exp_avg_sq} for n, s in self.state.items()}
