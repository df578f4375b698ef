"""The frozen Wan VAE: video in [-1, 1] to normalised latents and back.

The network is diffusers' ``AutoencoderKLWan``; what is added is strict loading from either release layout, the
official normalisation (per-channel mean and std), the deterministic posterior mean, tiling, and clear refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mindspeed_wan.errors import CheckpointError, ConfigError, DataError
from mindspeed_wan.models import frozen_weights, original_names

SPATIAL_FACTOR = 8
"""Pixels per latent pixel, each way."""
TEMPORAL_FACTOR = 4
"""Frames per latent frame after the first: f = 1 + (F - 1) / 4."""


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles, in pixels: less memory, slightly different values where tiles are blended."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < SPATIAL_FACTOR or value % SPATIAL_FACTOR:
                raise ConfigError(f"VAE tile {name} is {value}; it must be a positive multiple of {SPATIAL_FACTOR}")
        if self.stride_height > self.height or self.stride_width > self.width:
            raise ConfigError(f"VAE tile stride {self.stride_height}x{self.stride_width} is larger than the tile "
                              f"{self.height}x{self.width}: pixels between tiles would be lost")


class VaeRunner(Protocol):
    """Something that runs the network over several ranks (``inference.vae_parallel.ParallelVAE``)."""

    def encode(self, video: Tensor) -> Tensor:
        """Return the posterior's mean and log-variance [B, 2z, f, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the video [B, 3, F, H, W] of un-normalised latents."""


class WanVAE:
    """The 16-channel Wan2.1 VAE, which every A14B model uses.

    Attributes:
        model: diffusers' ``AutoencoderKLWan``, frozen.
        config: its configuration (``z_dim``, ``latents_mean``, ``latents_std`` ...).
        runner: when set, encodes and decodes instead of ``model`` (the same network over several ranks).
    """

    def __init__(self, model: Any, *, tiling: Tiling | None = None, where: str = "vae") -> None:
        original_names.check_latent_channels(model.config.z_dim, where=where)
        self.model = model
        self.config = model.config
        self.runner: VaeRunner | None = None
        self.set_tiling(tiling)
        statistics = torch.tensor([self.config.latents_mean, self.config.latents_std]).view(2, 1, -1, 1, 1, 1)
        self._mean, self._inverse_std = statistics[0], 1.0 / statistics[1]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        tiling: Tiling | None = None,
    ) -> WanVAE:
        """Load a VAE strictly.

        Args:
            path: a pipeline folder of either layout, a Diffusers ``vae/`` folder, or the file ``Wan2.1_VAE.pth``.
            dtype: precision of the network; fp32 officially. Latents come out in fp32 either way.
            device: where it runs.
            tiling: ``None`` runs whole frames.

        Raises:
            CheckpointError: nothing to load, damaged, another network, or the 48-channel VAE of TI2V-5B.
        """
        source = locate_vae(path)
        config, tensors = _read_original(source) if source.is_file() else _read_diffusers(source)
        original_names.check_latent_channels(config.get("z_dim", 16), where=str(source))
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(config)
        frozen_weights.load_strict(model, frozen_weights.cast_floating(tensors, dtype), where=str(source))
        frozen_weights.freeze(model)
        return cls(model.to(device), tiling=tiling, where=str(source))

    # ---- pixels to latents -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, video: Tensor, *, do_sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encode a video to normalised latents.

        Args:
            video: [B, 3, F, H, W]; F is 4k+1, H and W are multiples of 8. Floating in [-1, 1], or uint8 in [0, 255].
            do_sample: draw from the posterior instead of taking its mean (the official model takes the mean).
            generator: CPU generator of the draw, so that it is the same on every device.

        Returns:
            fp32 [B, 16, 1 + (F-1)/4, H/8, W/8] on the VAE's device: (z - mean) / std per channel.
        """
        check_video_shape(video.shape)
        inputs = unit_range(video.to(self.device)).to(self.dtype)
        if self.runner is not None:
            moments = self.runner.encode(inputs).float()
        else:
            moments = self.model.encode(inputs, return_dict=False)[0].parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        if do_sample:
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        return self.normalise(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [B, 16, f, h, w] to a video [B, 3, 4(f-1)+1, 8h, 8w] in [-1, 1], fp32."""
        if latents.dim() != 5 or latents.shape[1] != 16:
            raise DataError(f"latents of shape {list(latents.shape)}; the VAE decodes [B, 16, f, h, w]")
        inputs = self.denormalise(latents.to(self.device)).to(self.dtype)
        if self.runner is not None:
            return self.runner.decode(inputs).float()
        return self.model.decode(inputs, return_dict=False)[0].float()

    def normalise(self, latents: Tensor) -> Tensor:
        """Return (z - mean) / std per channel, fp32; [B, 16, ...]."""
        mean, inverse_std = self._statistics(latents)
        return (latents.float() - mean) * inverse_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo ``normalise``, fp32."""
        mean, inverse_std = self._statistics(latents)
        return latents.float() / inverse_std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self._mean.to(latents.device), self._inverse_std.to(latents.device)

    # ---- where and how it runs ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> WanVAE:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def set_tiling(self, tiling: Tiling | None) -> None:
        """Switch tiling on with these sizes, or off with ``None``."""
        self.tiling = tiling
        self.model.use_tiling = tiling is not None
        if tiling is not None:
            self.model.enable_tiling(tiling.height, tiling.width, tiling.stride_height, tiling.stride_width)


def unit_range(video: Tensor) -> Tensor:
    """Scale uint8 [0, 255] to fp32 [-1, 1] with the official operations; floating tensors pass unchanged."""
    if video.dtype != torch.uint8:
        return video
    return video.to(torch.float32).div_(255.0).sub_(0.5).div_(0.5)


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return (latent frames, latent height, latent width) of a video."""
    return 1 + (num_frames - 1) // TEMPORAL_FACTOR, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def check_video_shape(shape: Sequence[int]) -> None:
    """Refuse what the VAE would silently cut: frames that are not 4k+1, sides that are not multiples of 8.

    Raises:
        DataError: names the shape and the nearest one that works.
    """
    if len(shape) != 5 or shape[1] != 3:
        raise DataError(f"video of shape {list(shape)}; the VAE encodes [B, 3, frames, height, width]")
    frames, height, width = shape[2:]
    if frames % TEMPORAL_FACTOR != 1:
        nearest = max(1, (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
        raise DataError(f"{frames} frames; Wan's VAE encodes 4k+1 frames", fix=f"use {nearest} or {nearest + 4}")
    if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
        raise DataError(f"frame size {height}x{width}; both sides must be multiples of {SPATIAL_FACTOR}")


def locate_vae(path: str | Path) -> Path:
    """Return the VAE's folder or file for a pipeline folder, a component folder or a file.

    Raises:
        CheckpointError: nothing that looks like a VAE there.
    """
    root = Path(path).expanduser()
    if root.is_file() or (root / "config.json").is_file():
        return root
    for candidate in (root / "vae", root / original_names.VAE_FILE):
        if candidate.exists():
            return candidate
    if not root.exists():
        raise CheckpointError("no such file or folder", where=str(root))
    raise CheckpointError(
        "no VAE here", where=str(root),
        fix=f"give a Diffusers vae/ folder, a pipeline folder, or the file {original_names.VAE_FILE}",
    )


def vae_files(path: str | Path) -> list[Path]:
    """Return the weight files of the VAE at ``path`` (their content names what a latent cache was made with)."""
    source = locate_vae(path)
    return [source] if source.is_file() else frozen_weights.weight_files(source)


def _read_diffusers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = frozen_weights.read_config(folder)
    name = config.get("_class_name")
    if name != "AutoencoderKLWan":
        raise CheckpointError(f"_class_name is {name!r}, not AutoencoderKLWan", where=str(folder / "config.json"))
    return config, frozen_weights.read_safetensors(frozen_weights.weight_files(folder))


def _read_original(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read ``Wan2.1_VAE.pth`` (or the same names as safetensors) and derive the configuration from its shapes."""
    is_safetensors = file.suffix == ".safetensors"
    state = frozen_weights.read_safetensors([file]) if is_safetensors else frozen_weights.read_pth(file)
    config = original_names.vae_structure({k: tuple(v.shape) for k, v in state.items()}, where=str(file))
    table = original_names.vae_names(
        num_stages=len(config["dim_mult"]), num_res_blocks=config["num_res_blocks"]
    )
    return config, original_names.renamed(state, table, where=str(file))
