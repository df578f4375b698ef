"""Forward passes of one step: on a whole model, or over pipeline stages with both guidance branches under way at once.

Over stages, every rank runs the solver on the same latents; the first stage embeds them, the last one gives every
stage the velocities (8 MB at 480p). Between stages travels ``models.wan.stages``' wire without text: each stage
computed its own blocks' keys and values of the prompt beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.models.wan.model import BlockRunner, TextContext, WanDiT
from mindspeed_wan.models.wan.stages import Grid, Inputs, image_rows, run_chunk, wire_of
from mindspeed_wan.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        branch: ``cond`` or ``uncond``.
        text: keys and values of the prompt for this rank's blocks.
        around: what runs instead of the blocks (a step cache), if anything.
        done: called when the blocks have run, or have been replaced.
    """

    branch: str
    text: TextContext
    around: Callable[[Tensor, BlockRunner], Tensor] | None = None
    done: Callable[[], None] = lambda: None


class Runner(Protocol):
    """Runs the passes of a step."""

    def begin(self, expert: str, step: int) -> None:
        """Tell which step comes, and whose."""

    def time_modulation(self, model: WanDiT, timestep: Tensor) -> Tensor:
        """Return the modulation of ``timestep``, as ``WanDiT.time_modulation``. Collective."""
        ...

    def encode_text(self, model: WanDiT, text: Tensor, image_embeds: Tensor | None) -> TextContext:
        """Return the keys and values of this rank's blocks, as ``WanDiT.encode_text``. Collective."""
        ...

    def run(self, model: WanDiT, latents: Tensor, timestep: Tensor, passes: Sequence[Pass]) -> list[Tensor]:
        """Return the velocity of each pass, whole, on every rank. Collective."""
        ...


class WholeModel:
    """This rank has all blocks."""

    def begin(self, expert: str, step: int) -> None:
        """Nothing is kept from step to step."""

    def time_modulation(self, model: WanDiT, timestep: Tensor) -> Tensor:
        """Embed."""
        return model.time_modulation(timestep)

    def encode_text(self, model: WanDiT, text: Tensor, image_embeds: Tensor | None) -> TextContext:
        """Encode."""
        return model.encode_text(text, image_embeds)

    def run(self, model: WanDiT, latents: Tensor, timestep: Tensor, passes: Sequence[Pass]) -> list[Tensor]:
        """Run one after the other."""
        velocities = []
        for each in passes:
            velocities.append(model(latents, timestep, text_context=each.text, around_blocks=each.around))
            each.done()
        return velocities


class StagedModel:
    """This rank has some of the blocks; neighbours in ``groups.pp`` have those before and after."""

    def __init__(self, groups: ParallelGroups) -> None:
        assert groups.pp is not None
        self.group, self.stage = groups.pp, groups.pp_rank
        self._ranks = dist.get_process_group_ranks(groups.pp)
        self.sent: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_first(self) -> bool:
        """This stage embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """This stage projects."""
        return self.stage == len(self._ranks) - 1

    def begin(self, expert: str, step: int) -> None:
        """Nothing is kept from step to step."""

    def time_modulation(self, model: WanDiT, timestep: Tensor) -> Tensor:
        """Embed on the first stage, which alone has the weights, and share."""
        if self.is_first:
            return self.from_stage(0, model.time_modulation(timestep))
        return self.from_stage(0, torch.empty(len(timestep), 6, model.config.dim, device=timestep.device))

    def encode_text(self, model: WanDiT, text: Tensor, image_embeds: Tensor | None) -> TextContext:
        """Embed on the first stage, share, and project for this stage's blocks."""
        config, image = model.config, None
        if self.is_first:
            hidden, image = model.embed_text(text, image_embeds)
        else:
            hidden = text.new_empty((config.text_len, text.shape[0], config.dim), dtype=model.dtype)
            if config.has_image_embedder:
                image = hidden.new_empty((image_rows(config), text.shape[0], config.dim))
        return model.project_text(self.from_stage(0, hidden), None if image is None else self.from_stage(0, image))

    def run(self, model: WanDiT, latents: Tensor, timestep: Tensor, passes: Sequence[Pass]) -> list[Tensor]:
        """Send each pass on as soon as it is done: the stages work on different passes at the same time."""
        grid = model.grid(latents)
        outputs = [self._pass(model, grid, latents, timestep, each) for each in passes]
        self.finish_sends()
        return self.share_velocities(model, latents, outputs)

    def _pass(self, model: WanDiT, grid: Grid, latents: Tensor, timestep: Tensor, each: Pass) -> Tensor | None:
        wire, (chunk,) = wire_of(model, grid, latents.shape[0], with_text=False), model.chunks
        source: Inputs | Tensor
        if self.is_first:
            source = Inputs(latents, timestep)
        else:
            source = self.receive((wire.rows, wire.batch, wire.dim), wire.dtype, latents.device)
        output = run_chunk(model, chunk, wire, grid, source, each.text, each.around)
        each.done()
        if self.is_last:
            return output
        self.send(output)
        return None

    # ---- messages ------------------------------------------------------------------------------------------------

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what the stage before sends next."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(tensor, self._ranks[self.stage - 1], group=self.group)
        return tensor

    def send(self, tensor: Tensor) -> None:
        """Send to the next stage without waiting; ``finish_sends`` does."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._ranks[self.stage + 1], group=self.group)
        assert work is not None
        self.sent.append((work, tensor))

    def finish_sends(self) -> None:
        """Wait until everything has left."""
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()

    def from_stage(self, stage: int, tensor: Tensor) -> Tensor:
        """Return ``tensor`` of ``stage`` on every stage. Collective."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self._ranks[stage], group=self.group)
        return tensor

    def share_velocities(self, model: WanDiT, latents: Tensor, outputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Give every stage the velocities that the last one has. Collective."""
        batch, _, *size = latents.shape
        shape = (len(outputs), batch, model.config.out_channels, *size)
        present = [output for output in outputs if output is not None]
        whole = torch.stack(present) if self.is_last else torch.empty(shape, device=latents.device)
        return list(self.from_stage(len(self._ranks) - 1, whole).unbind())
