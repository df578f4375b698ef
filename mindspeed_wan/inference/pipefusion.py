"""PipeFusion: patches of one video travel through the pipeline stages, with keys and values of the step before.

After some whole ("warm-up") steps the tokens are cut into patches that follow each other through the stages. A patch
attends to fresh keys and values of itself and of the patches before it, and to those of the last step for the patches
behind it: neighbouring steps differ little (Fang et al., arXiv:2405.14430). Approximate; one patch, or warm-up at every
step, is exact. Differences from xDiT's form: all patches of a step are done before the solver takes it, so every
solver works as it is, at the price of (stages - 1) patch times per step; and the warm-up begins anew with each expert.

Each stage keeps keys and values of its blocks for all tokens and both guidance branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_wan.inference.pipeline_stages import Pass, StagedModel
from mindspeed_wan.models.wan.embeddings import unpatchify
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.stages import Grid, Stream, Wire, pack, unpack, wire_of
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms import ops


@dataclass
class _Place:
    """Where the pass under way is: which guidance branch, and which rows of the tokens (``None``: all)."""

    branch: str = ""
    rows: slice | None = None


@dataclass
class PatchAttention:
    """One block's self-attention of a patch to all tokens; keeps keys and values ``[L, B, N, d]`` of each branch."""

    traceable = False
    place: _Place
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
        """Return attention of the queries here over all tokens, the patch's own keys and values being fresh."""
        if self.place.rows is None:
            self.kept[self.place.branch] = k, v.contiguous()
        else:
            keys, values = self.kept[self.place.branch]
            keys[self.place.rows], values[self.place.rows] = k, v
        keys, values = self.kept[self.place.branch]
        return ops.attention(q, keys, values, kv_length=length)


class PipeFusion(StagedModel):
    """``StagedModel`` that cuts passes into patches once a branch has run whole ``warmup`` times.

    Args:
        groups: the layout; context ranks are not supported.
        patches: pieces of the token axis.
        warmup: whole passes of each branch and expert.
    """

    def __init__(self, groups: ParallelGroups, *, patches: int, warmup: int) -> None:
        super().__init__(groups)
        self._patches, self._warmup = patches, warmup
        self._expert, self._whole_passes = "", dict[str, int]()
        self._place = _Place()
        self._attention: dict[nn.Module, PatchAttention] = {}

    def begin(self, expert: str, step: int) -> None:
        """Warm up again with each video and expert, without the keys and values of the one before."""
        if expert != self._expert or step == 0:
            self._whole_passes.clear()
            self._attention.clear()
        self._expert = expert

    def run(self, model: WanDiT, latents: Tensor, timestep: Tensor, passes: Sequence[Pass]) -> list[Tensor]:
        """Send whole passes or patches on as soon as they are done."""
        grid, outputs = model.grid(latents), []
        with self._patch_attention(model):
            for each in passes:
                done = self._whole_passes.get(each.branch, 0)
                self._place.branch, self._place.rows = each.branch, None
                if done < self._warmup or self._patches == 1:
                    outputs.append(self._pass(model, grid, latents, timestep, each))
                else:
                    outputs.append(self._patched(model, grid, latents, timestep, each))
                self._whole_passes[each.branch] = done + 1
        self.finish_sends()
        return self.share_velocities(model, latents, outputs)

    @contextmanager
    def _patch_attention(self, model: WanDiT) -> Iterator[None]:
        """Attend through this runner; the model's own attention is back afterwards, for calls without PipeFusion."""
        attentions: list[Any] = [block.self_attn for block in model.blocks]
        before = [attention.attend for attention in attentions]
        for attention in attentions:
            attention.attend = self._attention.setdefault(attention, PatchAttention(self._place))
        try:
            yield
        finally:
            for attention, attend in zip(attentions, before):
                attention.attend = attend

    def _patched(self, model: WanDiT, grid: Grid, latents: Tensor, timestep: Tensor, each: Pass) -> Tensor | None:
        """Run one pass patch by patch; returns the velocity on the last stage."""
        whole = wire_of(model, grid, latents.shape[0], with_text=False)
        embedded = self._embed(model, latents, timestep) if self.is_first else None
        heads = []
        for number in range(self._patches):
            rows = slice(number * whole.tokens // self._patches, (number + 1) * whole.tokens // self._patches)
            if rows.start == rows.stop:
                continue
            self._place.rows = rows
            wire = replace(whole, tokens=rows.stop - rows.start)
            stream = self._stream(model, wire, rows, embedded, latents.device)
            x = model.run_blocks(model.blocks, stream.x, stream.modulation, each.text.blocks, None, grid, rows)
            if self.is_last:
                heads.append(model.head(x, stream.time))
            else:
                self.send(pack(replace(stream, x=x), wire))
        each.done()
        return unpatchify(torch.cat(heads), grid, model.config.patch_size) if self.is_last else None

    @staticmethod
    def _embed(model: WanDiT, latents: Tensor, timestep: Tensor) -> Stream:
        time, modulation = model.embed_time(timestep)
        return Stream(model.embed_video(latents), time, modulation)

    def _stream(
        self, model: WanDiT, wire: Wire, rows: slice, embedded: Stream | None, device: torch.device
    ) -> Stream:
        if embedded is not None:
            return replace(embedded, x=embedded.x[rows])
        return unpack(self.receive((wire.rows, wire.batch, wire.dim), wire.dtype, device), wire, model.dtype)
