"""Which memory mode fits: both experts resident, one at a time, or blocks streamed from the host. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.errors import ResourceError
from mindspeed_wan.models.wan.config import WanConfig

GIB = float(1 << 30)
MARGIN = 0.92
"""Share of the free memory that is planned with; the rest is fragmentation and libraries' workspaces."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The mode and the numbers behind it, bytes per rank."""

    mode: str
    expert: float
    experts: int
    working: float
    free: float

    def describe(self) -> str:
        """Return one line for the log."""
        words = {"resident": "all experts on the device", "sequential": "one expert on the device at a time",
                 "block": "blocks streamed from the host"}
        return (
            f"memory: {self.mode} ({words[self.mode]}); {self.experts} x {self.expert / GIB:.2f} GiB weights + "
            f"{self.working / GIB:.2f} GiB working, {self.free / GIB:.1f} GiB free"
        )


def working_bytes(
    config: WanConfig, latent: tuple[int, int, int], *, element: int, context: int, tensor: int,
    dequantized: bool = False,
) -> float:
    """Estimate what a forward pass and the decode hold besides weights, in bytes.

    Per token of this rank: the residual and its modulated copies, q, k, v and the attention's output, and twice the
    feed-forward's hidden channels. The VAE's largest layer has 96 channels at full resolution for four frames, about
    six times over, in fp32; it runs when the DiT's activations are gone. ``dequantized``: weights are held in 8 bits
    and multiplied in ``element`` bytes, the largest one at a time.
    """
    tokens = -(-config.num_tokens(latent) // context)
    per_token = config.dim * (8 + 4 * element) + (5 * config.dim + 2 * config.ffn_dim) * element / tensor
    frames, height, width = latent
    pixels = 64 * height * width
    decode = 4 * pixels * (6 * 96 * 4 + 3 * 2 * 4 * frames)
    text = 2 * 2 * config.num_layers * config.text_len * config.dim * element / tensor
    weight = config.dim * max(config.dim, config.ffn_dim) * element / tensor if dequantized else 0
    return max(tokens * per_token + text + weight, decode)


def choose(
    asked: str, *, experts: int, expert: float, working: float, free: float, block_share: float, host: bool,
    fsdp: bool,
) -> MemoryPlan:
    """Choose a mode.

    Args:
        asked: the user's mode, or ``auto``.
        experts: experts of the model (2, or 1 for Wan2.1).
        expert, working, free: bytes; see above. ``free`` is before anything is loaded.
        block_share: share of an expert's bytes that is on the device in block mode.
        host: the device is the CPU, where moving weights saves nothing.
        fsdp: FSDP2 or pipeline stages divide the weights already; blocks are not streamed then.

    Raises:
        ResourceError: not even streamed blocks fit (only when ``asked`` is ``auto``).
    """
    def plan(mode: str) -> MemoryPlan:
        return MemoryPlan(mode=mode, expert=expert, experts=experts, working=working, free=free)

    if asked != "auto":
        return plan(asked)
    budget = free * MARGIN - working
    if host or experts * expert <= budget:
        return plan("resident")
    if expert <= budget:
        return plan("sequential")
    if not fsdp and expert * block_share <= budget:
        return plan("block")
    raise ResourceError(
        f"one expert needs {expert / GIB:.1f} GiB here and a forward pass about {working / GIB:.1f} GiB, but only "
        f"{free / GIB:.1f} GiB are free",
        fix="use more ranks (--ulysses_size, --tensor_size, --dit_fsdp), a smaller --size or fewer frames; "
        "--memory block runs it anyway",
    )
