"""What an I2V model is told about the frames it is given: mask, conditioning latents, and how images become frames.

The DiT reads 20 extra channels: 4 of mask and 16 of latents. The latents are those of a video that shows the known
frames and mid-grey (0 in [-1, 1]) everywhere else; the mask is 1 where a frame is known. Four mask channels, because
one latent frame stands for four video frames; the first latent frame stands for one, which is repeated four times.

Pure maths on tensors and images: training, cached features and inference all use these functions, so the three agree
bit for bit. Sources: Wan2.2 ``wan/image2video.py``, diffusers ``pipeline_wan_i2v.py``, VideoX-Fun
``pipeline_wan2_2_fun_inpaint.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_wan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

Recipe = Literal["official", "diffusers", "videox"]
"""Whose image resizing: ``official`` bicubic on the tensor, without antialiasing, to the picture's own shape within an
area; ``diffusers`` Lanczos and ``videox`` bicubic of PIL, to exactly the given size."""

TEMPORAL = 4
SPATIAL = 8
CHANNELS = 20
"""Extra input channels: 4 of mask, 16 of latents."""


# ---- which frames are known ----------------------------------------------------------------------------------------


def known_frames(num_frames: int, *, start: int = 1, last: bool = False) -> Tensor:
    """Return [F] bool: the first ``start`` frames are known, and the last one if asked for.

    Raises:
        ConfigError: not 4k+1 frames, or more known frames than there are.
    """
    if num_frames < 1 or num_frames % TEMPORAL != 1:
        raise ConfigError(f"{num_frames} frames are not 4k+1")
    if start < 0 or start + last > num_frames:
        raise ConfigError(f"{start} start frames{' and a last one' if last else ''} do not fit {num_frames} frames")
    known = torch.zeros(num_frames, dtype=torch.bool)
    known[:start] = True
    if last:
        known[-1] = True
    return known


def fold_mask(known: Tensor) -> Tensor:
    """Fold a mask over video frames [F, ...] into latent frames [4, f, ...]; the first frame fills its four slots.

    Raises:
        DataError: the number of frames is not 4k+1.
    """
    frames = known.shape[0]
    if frames % TEMPORAL != 1:
        raise DataError(f"a mask of {frames} frames; Wan needs 4k+1")
    repeated = torch.cat([known[:1].expand(TEMPORAL, *known.shape[1:]), known[1:]])
    return repeated.reshape(-1, TEMPORAL, *known.shape[1:]).transpose(0, 1).float()


def mask_channels(known: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Return the mask [4, f, h, w] fp32 of known video frames or pixels.

    Args:
        known: [F] for whole frames, or [F, H, W] in [0, 1] for pixels (inpainting); 1 is known.
        latent_size: (h, w). Pixel masks are resized bilinearly, frame by frame.
    """
    folded = fold_mask(known)
    if known.dim() == 1:
        return folded[..., None, None].expand(*folded.shape, *latent_size).contiguous()
    return F.interpolate(folded, size=latent_size, mode="bilinear", align_corners=False)


# ---- the conditioning latents ----------------------------------------------------------------------------------------


def visible_video(video: Tensor, known: Tensor) -> Tensor:
    """Return ``video`` [..., 3, F, H, W] in [-1, 1] with what is not known replaced by mid-grey.

    ``known`` is [F] or [F, H, W]; a pixel counts as known from 0.5 up.
    """
    seen = (known.float() >= 0.5).to(video.device)
    seen = seen[:, None, None] if seen.dim() == 1 else seen
    return torch.where(seen, video, torch.zeros((), dtype=video.dtype, device=video.device))


def place_frames(start: Tensor, num_frames: int, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a video [3, F, H, W] that shows the given frames and grey between, and its known frames [F].

    Args:
        start: [3, H, W] or [3, k, H, W] in [-1, 1]: the frames the video begins with.
        num_frames: F = 4k+1.
        last: [3, H, W]: the frame it ends with.

    Raises:
        ConfigError: too many frames, or first and last of different size.
    """
    start = start.unsqueeze(1) if start.dim() == 3 else start
    known = known_frames(num_frames, start=start.shape[1], last=last is not None)
    video = start.new_zeros(3, num_frames, *start.shape[2:])
    video[:, : start.shape[1]] = start
    if last is not None:
        if last.shape[1:] != start.shape[2:]:
            raise ConfigError(f"the last frame is {_size(last)}, the first {_size(start)}", fix="resize both alike")
        video[:, -1] = last
    return video, known


def condition_channels(mask: Tensor, latents: Tensor) -> Tensor:
    """Return [..., 20, f, h, w]: mask [4, f, h, w] before normalised latents [..., 16, f, h, w].

    Raises:
        DataError: they do not cover the same latent frames and pixels.
    """
    if mask.shape[1:] != latents.shape[-3:]:
        raise DataError(
            f"the mask covers {tuple(mask.shape[1:])} latent frames and pixels, the latents {tuple(latents.shape[-3:])}"
        )
    mask = mask.to(latents.device, latents.dtype)
    return torch.cat([mask.expand(*latents.shape[:-4], *mask.shape), latents], dim=-4)


def nothing_known(latent_shape: tuple[int, int, int]) -> Tensor:
    """Return Fun-InP's [20, f, h, w] for text alone: exact zeros, not an encoded grey video."""
    return torch.zeros(CHANNELS, *latent_shape)


# ---- images ----------------------------------------------------------------------------------------------------------


def fit_area(image_size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """Return the official I2V (height, width) for an image: its shape, about ``max_area`` pixels, multiples of 16.

    >>> fit_area((1080, 1920), 720 * 1280)
    (720, 1280)
    """
    ratio = image_size[0] / image_size[1]
    # As the official code does it: divided by 8 and by 2 with floor division, which for floats still floors.
    height = round(math.sqrt(max_area * ratio) // SPATIAL // 2 * 2)
    width = round(math.sqrt(max_area / ratio) // SPATIAL // 2 * 2)
    return max(2, height) * SPATIAL, max(2, width) * SPATIAL


def image_to_frame(image: Image.Image, size: tuple[int, int], recipe: Recipe) -> Tensor:
    """Return an image as a frame [3, H, W] fp32 in [-1, 1], resized to (height, width) as ``recipe`` does."""
    rgb = image.convert("RGB")
    if recipe == "official":
        pixels = _pixels(rgb)[None]
        return F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)[0]
    from PIL import Image as Pillow

    kernel = Pillow.Resampling.LANCZOS if recipe == "diffusers" else Pillow.Resampling.BICUBIC
    return _pixels(rgb.resize((size[1], size[0]), kernel))


def open_image(path: str) -> Image.Image:
    """Open an image file, its EXIF rotation applied.

    Raises:
        DataError: missing, or not an image.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DataError("the image does not exist", where=path) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as an image: {error}", where=path) from None


def clip_pixels(images: Sequence[Image.Image], recipe: Recipe, side: int = 224) -> Tensor:
    """Return CLIP's input [B, 3, side, side], normalised.

    ``official`` (and ``videox``) stretches the whole image; ``diffusers`` scales the short side and cuts the middle.
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    frames = []
    for image in images:
        rgb = image.convert("RGB")
        if recipe == "diffusers":
            unit = (_pixels(_short_side_and_crop(rgb, side)) + 1) / 2
        else:
            resized = F.interpolate(_pixels(rgb)[None], size=(side, side), mode="bicubic", align_corners=False)[0]
            unit = resized * 0.5 + 0.5
        frames.append((unit - mean) / std)
    return torch.stack(frames)


def _short_side_and_crop(image: Image.Image, side: int) -> Image.Image:
    from PIL import Image as Pillow

    width, height = image.size
    short = min(width, height)
    scaled = image.resize((int(side * width / short), int(side * height / short)), Pillow.Resampling.BICUBIC)
    left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as [3, H, W] fp32 in [-1, 1]."""
    import numpy as np

    array = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy())
    return array.permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def _size(frame: Tensor) -> str:
    return f"{frame.shape[-2]}x{frame.shape[-1]}"
