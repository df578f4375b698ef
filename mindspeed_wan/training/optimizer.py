"""AdamW over local shards, with fp32 master weights where the parameters are not fp32.

The optimizer never sees a DTensor: every update is element-wise, so it runs on ``to_local()`` of what FSDP2 shards
and on Megatron's plain TP-local tensors alike. Its state is one value per moment and parameter element, shaped like the
local shard, which ``checkpoint.dcp`` views as global tensors exactly like the parameter.

Where the moments live between steps, and in what form, is a ``States``: on the device in fp32 (``ResidentStates``), in
host memory (``host_states``) or in 8 bits (``byte_states``). The update itself is the same kernel on the same fp32
values, and checkpoints hold fp32 moments in all three cases, so a run may be resumed with another choice.

Weight decay follows Megatron's rule: one-dimensional parameters (biases, norm weights) are not decayed; everything
else is, the [1, 6, D] modulation tables included (as in MindSpeed-MM, which uses Megatron's groups).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from mindspeed_wan.parallel.dtensor import local
from mindspeed_wan.parallel.grads import drop_gradient, gradient

BATCH_BYTES = 256 << 20
"""States that do not live on the device in fp32 are brought there for about so many bytes at a time."""


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

    @classmethod
    def fresh(cls, shard: Tensor, device: torch.device | None = None) -> Moments:
        """Return zero moments for ``shard``, and its fp32 copy if it is not fp32 itself; on ``device``."""
        zeros = torch.zeros_like(shard, dtype=torch.float32, device=device)
        # A copy even of fp32 would be wrong here: an fp32 parameter is its own master.
        master = None if shard.dtype == torch.float32 else shard.to(device=device, dtype=torch.float32)
        return cls(zeros, torch.zeros_like(zeros), master)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are there."""
        return [t for t in (self.exp_avg, self.exp_avg_sq, self.master) if t is not None]


class States(Protocol):
    """Keeps every parameter's Adam state between steps."""

    def batches(self, names: Sequence[str], step: int) -> Iterator[dict[str, Moments]]:
        """Yield the states of ``names`` some at a time, as fp32 on the parameters' device.

        What the caller does to them in place is taken back when it asks for the next ones. ``step`` counts from 1.
        """
        ...

    def masters(self) -> dict[str, Tensor]:
        """Return name -> live fp32 master, for parameters that are not fp32."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return name -> {"exp_avg", "exp_avg_sq"} in fp32: the live tensors, or copies in host memory."""
        ...

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what was written into the tensors of ``moments()``."""
        ...


class ResidentStates:
    """fp32 on the parameters' device: nothing to bring, nothing to take back."""

    def __init__(self, shards: Mapping[str, Tensor]) -> None:
        self._states = {name: Moments.fresh(shard) for name, shard in shards.items()}

    def batches(self, names: Sequence[str], step: int) -> Iterator[dict[str, Moments]]:
        """Yield all of them."""
        yield {name: self._states[name] for name in names}

    def masters(self) -> dict[str, Tensor]:
        """Return the live masters."""
        return {n: s.master for n, s in self._states.items() if s.master is not None}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live moments."""
        return {n: {"exp_avg": s.exp_avg, "exp_avg_sq": s.exp_avg_sq} for n, s in self._states.items()}

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """They are the live ones."""


class AdamW:
    """AdamW (Loshchilov & Hutter) by torch's functional update.

    Args:
        parameters: name -> parameter; frozen ones (``requires_grad`` false) are left out.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        fused: use torch's fused kernel; the default is the foreach form (one launch per list of tensors).
        states: makes the keeper of the moments from name -> local shard.
    """

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], *, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, fused: bool = False,
                 states: Callable[[Mapping[str, Tensor]], States] = ResidentStates) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.betas, self.eps, self.fused = betas, eps, fused
        self.steps = 0
        self.states = states({name: local(p.detach()) for name, p in self.parameters.items()})

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Update every parameter that has a gradient; gradients are read as fp32 and not modified."""
        self.steps += 1
        # An uneven shard may be empty on this rank; kernels get only tensors with elements.
        names = [n for n, p in self.parameters.items() if gradient(p) is not None and local(p).numel()]
        for states in self.states.batches(names, self.steps):
            for decay in (True, False):
                part = {n: s for n, s in states.items() if decays(self.parameters[n]) == decay}
                if part:
                    self._update(part, learning_rate, weight_decay if decay else 0.0)

    def _update(self, states: Mapping[str, Moments], learning_rate: float, weight_decay: float) -> None:
        shards = {n: local(self.parameters[n].detach()) for n in states}
        weights = [shards[n] if s.master is None else s.master for n, s in states.items()]
        device = weights[0].device if self.fused else torch.device("cpu")
        counts = torch.full((len(weights),), float(self.steps - 1), device=device)  # the update adds one to each
        adamw(
            weights,
            [local(cast(Tensor, gradient(self.parameters[n]))).to(torch.float32) for n in states],
            [s.exp_avg for s in states.values()],
            [s.exp_avg_sq for s in states.values()],
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
        for name, state in states.items():
            if state.master is not None:
                shards[name].copy_(state.master)

    def zero_grad(self) -> None:
        """Drop every gradient (freed, not zeroed)."""
        for parameter in self.parameters.values():
            drop_gradient(parameter)

    # ---- what a checkpoint holds -----------------------------------------------------------------------------

    def masters(self) -> dict[str, Tensor]:
        """Return name -> fp32 local weights: the masters, or the parameters where these are fp32 themselves."""
        masters = self.states.masters()
        return {n: masters[n] if n in masters else local(p.detach()) for n, p in self.parameters.items()}

    @torch.no_grad()
    def masters_to_parameters(self) -> None:
        """Round the masters into the parameters (after a checkpoint was read into the masters)."""
        for name, master in self.states.masters().items():
            local(self.parameters[name].detach()).copy_(master)

    @torch.no_grad()
    def parameters_to_masters(self) -> None:
        """Take the parameters as masters (after weights alone were loaded)."""
        for name, master in self.states.masters().items():
            master.copy_(local(self.parameters[name].detach()))

    def moments(self) -> Mapping[str, dict[str, Tensor]]:
        """Return name -> {"exp_avg", "exp_avg_sq"}, local shards, fp32: the live tensors, or copies on the host."""
        return self.states.moments()

    @torch.no_grad()
    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what a checkpoint wrote into the tensors of ``moments()``."""
        self.states.take_moments(moments)


def in_batches(sizes: Mapping[str, int], limit: int = BATCH_BYTES) -> list[list[str]]:
    """Cut names into runs of at most ``limit`` bytes (a larger tensor is a run of its own); order is kept.

    Tensors are never cut: a kernel's rounding at the end of a vector register must not depend on the batches.
    """
    batches: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not batches or filled + size > limit:
            batches.append([])
            filled = 0
        batches[-1].append(name)
        filled += size
    return batches
