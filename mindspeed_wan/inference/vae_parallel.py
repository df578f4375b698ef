"""The Wan VAE spread over ranks by rows and columns of the picture, equal to the single-device VAE.

Every rank owns a rectangle of latent pixels and, at each scale, the same rectangle times that scale: nothing is
blended and nothing overlaps. What a layer needs from beyond the rectangle's edge comes from the neighbour: one row
(and column) for a 3x3 convolution, all keys and values for the mid-block attention. Everything else in
``AutoencoderKLWan`` (RMS norm over channels, nearest upsampling, the causal cache over time) is local, so the
library's own module tree runs unchanged with three of its forwards replaced on a copy that shares the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_wan.errors import ConfigError

SPATIAL_FACTOR = 8
"""Pixels per latent pixel, each way."""


def partition(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into ``parts`` contiguous [start, end) pieces whose sizes differ by at most one."""
    return [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def choose_grid(ranks: int, latent_height: int, latent_width: int) -> tuple[int, int] | None:
    """Return the (rows, columns) of ranks with the shortest halos, or None when the picture has too few pixels.

    The largest rectangle sets the pace, so the cost of a grid is (its area, the length of its sides that have a
    neighbour).
    """
    best: tuple[tuple[int, int], tuple[int, int]] | None = None
    for rows in range(1, ranks + 1):
        columns = ranks // rows
        if rows * columns != ranks or rows > latent_height or columns > latent_width:
            continue
        height, width = -(-latent_height // rows), -(-latent_width // columns)
        halo = min(2, rows - 1) * width + min(2, columns - 1) * height
        cost = (height * width, halo)
        if best is None or cost < best[0]:
            best = (cost, (rows, columns))
    return best[1] if best else None


@dataclass
class _Layout:
    """Who owns what in the call at hand: rectangles in latent pixels, in the order of the group's ranks."""

    group: Any
    grid: tuple[int, int]
    rows: list[tuple[int, int]]
    columns: list[tuple[int, int]]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def position(self) -> tuple[int, int]:
        return divmod(self.rank, self.grid[1])

    def rectangle(self, rank: int, scale: int = 1) -> tuple[slice, slice]:
        """Return the (rows, columns) slices of ``rank`` at ``scale`` pixels per latent pixel."""
        row, column = divmod(rank, self.grid[1])
        (top, bottom), (left, right) = self.rows[row], self.columns[column]
        return slice(top * scale, bottom * scale), slice(left * scale, right * scale)

    def area(self, rank: int) -> int:
        rows, columns = self.rectangle(rank)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def neighbour(self, axis: int, step: int) -> int | None:
        """Return the group rank next to this one along ``axis`` (0 rows, 1 columns), or None at the edge."""
        position = list(self.position)
        position[axis] += step
        if not 0 <= position[axis] < self.grid[axis]:
            return None
        return position[0] * self.grid[1] + position[1]


def _with_halo(x: Tensor, layout: _Layout, before: int, after: int) -> Tensor:
    """Extend [..., H, W] by ``before``/``after`` rows and columns of the neighbours, zeros beyond the picture.

    Rows first, then columns of the extended tensor, so the corners arrive without messages to diagonal ranks.
    """
    for axis in (0, 1):
        x = _extend(x, layout, axis, (before, after))
    return x


def _extend(x: Tensor, layout: _Layout, axis: int, halo: tuple[int, int]) -> Tensor:
    (before, after), dim = halo, x.dim() - 2 + axis
    previous, following = layout.neighbour(axis, -1), layout.neighbour(axis, +1)
    shape = list(x.shape)

    def empty(size: int) -> Tensor:
        return x.new_zeros([*shape[:dim], size, *shape[dim + 1 :]])

    from_previous, from_following = empty(before), empty(after)
    operations: list[dist.P2POp] = []

    def add(operation: Callable[..., Any], tensor: Tensor, peer: int) -> None:
        peer_rank = dist.get_global_rank(layout.group, peer) if layout.group is not None else peer
        operations.append(dist.P2POp(operation, tensor, peer_rank, layout.group))

    # My first rows are what the previous rank lacks after its last one, and the other way round.
    if previous is not None:
        if after:
            add(dist.isend, x.narrow(dim, 0, after).contiguous(), previous)
        if before:
            add(dist.irecv, from_previous, previous)
    if following is not None:
        if before:
            add(dist.isend, x.narrow(dim, shape[dim] - before, before).contiguous(), following)
        if after:
            add(dist.irecv, from_following, following)
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    pieces = [piece for piece in (from_previous, x, from_following) if piece.shape[dim]]
    return torch.cat(pieces, dim) if len(pieces) > 1 else x


def _causal_conv3d(conv: nn.Conv3d, state: _State, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Run a causal 3x3x3 convolution on [B, C, T, h, w]; ``cache_x`` holds the frames before ``x``, local as well."""
    missing_frames = state.frames_before[conv]
    if cache_x is not None and missing_frames:
        x = torch.cat([cache_x.to(x.device), x], dim=2)
        missing_frames -= cache_x.shape[2]
    x = _with_halo(x, state.current, 1, 1)
    if missing_frames:
        x = F.pad(x, (0, 0, 0, 0, missing_frames, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride)


def _conv2d(conv: nn.Conv2d, state: _State, x: Tensor) -> Tensor:
    return F.conv2d(_with_halo(x, state.current, 1, 1), conv.weight, conv.bias, conv.stride)


def _pad_bottom_right(state: _State, x: Tensor) -> Tensor:
    # The strided convolution that follows reads rows 2i .. 2i+2: only the next rank's first row is missing, because
    # every rectangle starts at a multiple of the stride.
    return _with_halo(x, state.current, 0, 1)


def _attention(block: Any, state: _State, x: Tensor) -> Tensor:
    """Single-head attention of the local pixels over all pixels of the frame; x [B, C, T, h, w]."""
    batch, channels, frames, height, width = x.shape
    images = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
    qkv = block.to_qkv(block.norm(images)).flatten(2).transpose(1, 2)  # [B*T, h*w, 3C]
    query, key_value = qkv[..., :channels], qkv[..., channels:].contiguous()
    key_value = state.gather_tokens(key_value)
    key, value = key_value.chunk(2, dim=-1)
    out = F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)
    out = block.proj(out.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return x + out.view(batch, frames, channels, height, width).permute(0, 2, 1, 3, 4)


class _State:
    """What the replaced forwards share: the current call's layout, and the zero frames each convolution starts with."""

    def __init__(self) -> None:
        self.layout: _Layout | None = None
        self.frames_before: dict[nn.Module, int] = {}

    @property
    def current(self) -> _Layout:
        if self.layout is None:
            raise RuntimeError("the halo VAE's modules only run inside ParallelVAE.encode or .decode")
        return self.layout

    def gather_tokens(self, tokens: Tensor) -> Tensor:
        """Concatenate [N, local tokens, C] of all ranks; rectangles may differ in size."""
        layout = self.current
        ranks = layout.grid[0] * layout.grid[1]
        # A layer at any scale sees every rectangle enlarged alike, so sizes follow from the latent areas.
        scale = tokens.shape[1] // layout.area(layout.rank)
        counts = [layout.area(rank) * scale for rank in range(ranks)]
        padded = F.pad(tokens, (0, 0, 0, max(counts) - tokens.shape[1]))
        pieces = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(pieces, padded.contiguous(), group=layout.group)
        return torch.cat([piece[:, :count] for piece, count in zip(pieces, counts)], dim=1)


class ParallelVAE:
    """``AutoencoderKLWan`` over the ranks of ``group``; every rank passes the same input and gets the whole result.

    Args:
        autoencoder: diffusers' ``AutoencoderKLWan`` (Wan2.1's, 16 latent channels), weights on this rank's device.
        group: process group of the ranks that share one video; ``None`` is the default group.
        grid: (rows, columns) of ranks; chosen for each picture size when ``None``.

    Raises:
        ConfigError: a grid that does not match the group, or an autoencoder with layers this file does not know.
    """

    def __init__(self, autoencoder: Any, group: Any = None, *, grid: tuple[int, int] | None = None) -> None:
        self.group, self.grid = group, grid
        self.ranks = dist.get_world_size(group)
        if grid is not None and grid[0] * grid[1] != self.ranks:
            raise ConfigError(f"VAE grid {grid[0]}x{grid[1]} does not cover the {self.ranks} ranks of its group")
        if getattr(autoencoder.config, "is_residual", False):
            raise ConfigError(
                "this is the 48-channel VAE of TI2V-5B; A14B and Wan2.1 use Wan2.1's VAE with 16 latent channels"
            )
        self._state = _State()
        self._whole = autoencoder
        self._local = _shared_copy(autoencoder)
        self._local.use_tiling = False
        _replace_forwards(self._local, self._state)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode un-normalised latents [B, z, f, h, w] to a video [B, 3, F, 8h, 8w] in [-1, 1]."""
        layout = self._layout(latents.shape[-2], latents.shape[-1])
        if layout is None:
            return self._whole.decode(latents, return_dict=False)[0]
        rows, columns = layout.rectangle(layout.rank)
        local = self._run(layout, lambda x: self._local.decode(x, return_dict=False)[0], latents[..., rows, columns])
        return _gather(local, layout, SPATIAL_FACTOR)

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video [B, 3, F, H, W] to the posterior's mean and log-variance [B, 2z, f, H/8, W/8]."""
        height, width = video.shape[-2:]
        if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
            raise ConfigError(f"video size {height}x{width} is not a multiple of {SPATIAL_FACTOR}")
        layout = self._layout(height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        if layout is None:
            return self._whole.encode(video, return_dict=False)[0].parameters
        rows, columns = layout.rectangle(layout.rank, SPATIAL_FACTOR)
        local = self._run(
            layout, lambda x: self._local.encode(x, return_dict=False)[0].parameters, video[..., rows, columns]
        )
        return _gather(local, layout, 1)

    def _layout(self, height: int, width: int) -> _Layout | None:
        grid = self.grid or choose_grid(self.ranks, height, width)
        if self.ranks == 1 or grid is None or grid[0] > height or grid[1] > width:
            return None
        return _Layout(self.group, grid, partition(height, grid[0]), partition(width, grid[1]))

    def _run(self, layout: _Layout, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._state.layout = layout
        try:
            return function(x.contiguous())
        finally:
            self._state.layout = None


def _shared_copy(module: nn.Module) -> Any:
    """Copy a module tree without copying its parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _replace_forwards(autoencoder: nn.Module, state: _State) -> None:
    """Point the forwards that look beyond a pixel at this file's functions, and refuse layers it does not know.

    Instances keep their class: the library counts its causal convolutions by type to size the cache over time.
    """
    for name, module in autoencoder.named_modules():
        if type(module).__name__ == "WanAttentionBlock":
            module.forward = partial(_attention, module, state)
        elif isinstance(module, nn.ZeroPad2d):
            _replace_padding(name, module, state)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and max(module.kernel_size[-2:]) > 1:
            _replace_convolution(name, module, state)


def _replace_padding(name: str, padding: Any, state: _State) -> None:
    if tuple(padding.padding) != (0, 1, 0, 1):
        raise ConfigError(f"padding {padding.padding} is not the Wan encoder's", where=name)
    padding.forward = partial(_pad_bottom_right, state)


def _replace_convolution(name: str, conv: Any, state: _State) -> None:
    spatial, in_time = (tuple(conv.kernel_size[-2:]), tuple(conv.stride[-2:])), len(conv.kernel_size) == 3
    if spatial == ((3, 3), (2, 2)) and not in_time and tuple(conv.padding) == (0, 0):
        return  # its padding comes from the ZeroPad2d before it
    if spatial != ((3, 3), (1, 1)):
        raise ConfigError(f"convolution {spatial} has no halo rule", where=name)
    if in_time:
        # The library keeps (left, right, top, bottom, frames before, frames after) and convolves without padding.
        left, right, top, bottom, frames, _ = conv._padding
        if (left, right, top, bottom) != (1, 1, 1, 1):
            raise ConfigError(f"padding {conv._padding} has no halo rule", where=name)
        state.frames_before[conv] = frames
        conv.forward = partial(_causal_conv3d, conv, state)
    else:
        if tuple(conv.padding) != (1, 1):
            raise ConfigError(f"padding {conv.padding} has no halo rule", where=name)
        conv.forward = partial(_conv2d, conv, state)


def _gather(local: Tensor, layout: _Layout, scale: int) -> Tensor:
    """Assemble [..., H, W] from every rank's rectangle at ``scale`` pixels per latent pixel."""
    ranks = layout.grid[0] * layout.grid[1]
    height, width = layout.rows[-1][1] * scale, layout.columns[-1][1] * scale
    largest = max(layout.area(rank) for rank in range(ranks)) * scale * scale
    flat = local.flatten(-2)
    padded = F.pad(flat, (0, largest - flat.shape[-1])).contiguous()
    pieces = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(pieces, padded, group=layout.group)
    whole = local.new_empty([*local.shape[:-2], height, width])
    for rank, piece in enumerate(pieces):
        rows, columns = layout.rectangle(rank, scale)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        whole[..., rows, columns] = piece[..., : shape[0] * shape[1]].unflatten(-1, shape)
    return whole
