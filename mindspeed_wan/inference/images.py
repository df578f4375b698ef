"""I2V's side of a generation: from image files to the DiT's extra channels and CLIP states.

Only the replica's first rank opens files and encodes (all ranks do when the VAE is parallel); the others receive the
tensors, so a missing image is one message and never a hang.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mindspeed_wan.inference.options import GenerateOptions, VideoJob
from mindspeed_wan.inference.runtime import DTYPES, Runtime
from mindspeed_wan.inference.sources import ModelFolder
from mindspeed_wan.models import conditioning
from mindspeed_wan.models.image_encoder import ImageEncoder
from mindspeed_wan.models.vae import WanVAE, latent_shape

if TYPE_CHECKING:
    from PIL import Image

_VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")


class ImageConditions:
    """Makes the conditions of I2V models; ``None`` everywhere for T2V.

    Args:
        vae: gives the VAE, loading it on first use.
    """

    def __init__(self, folder: ModelFolder, runtime: Runtime, vae: Callable[[], WanVAE]) -> None:
        self._folder, self._runtime, self._vae = folder, runtime, vae
        self._clip: ImageEncoder | None = None

    def size(self, job: VideoJob, options: GenerateOptions) -> tuple[int, int]:
        """Return the video's (height, width): what was asked for, or the official fit to the image's shape."""
        if job.image is None or self._folder.config.task == "t2v" or options.conditioning != "official":
            return options.size
        image = job.image
        height, width = self._runtime.lead(lambda: self._images(image, 1)[0].size[::-1])
        return conditioning.fit_area((height, width), options.size[0] * options.size[1])

    def channels(self, job: VideoJob, options: GenerateOptions) -> Tensor | None:
        """Return [1, 20, f, h, w] on the device; ``options.size`` is the video's size. Collective."""
        if self._folder.config.task == "t2v":
            return None
        assert options.num_frames is not None
        latent = latent_shape(options.num_frames, *options.size)
        if job.image is None:  # Fun-InP from text alone; other I2V tasks were refused without an image
            return conditioning.nothing_known(latent).unsqueeze(0).to(self._runtime.device)

        def frames() -> tuple[Tensor, Tensor]:
            return self._frames(job, options)

        if self._runtime.layout.vae_parallel and self._runtime.replica_group is not None:
            video, known = self._runtime.lead(frames)
            latents = self._runtime.agree(self._vae).encode(video[None])
            mask = conditioning.mask_channels(known, latent[1:])
            return conditioning.condition_channels(mask, latents)

        def encoded() -> Tensor:
            video, known = frames()
            mask = conditioning.mask_channels(known, latent[1:])
            return conditioning.condition_channels(mask, self._vae().encode(video[None])).cpu()

        return self._runtime.lead(encoded).to(self._runtime.device)

    def embeds(self, job: VideoJob, options: GenerateOptions) -> Tensor | None:
        """Return Wan2.1's CLIP states [1, 257, 1280] ([2, ...] for its first-last-frame model). Collective."""
        if not self._folder.config.has_image_embedder or job.image is None:
            return None
        first = job.image
        last = job.last_image if self._folder.config.pos_embed_len is not None else None

        def encoded() -> Tensor:
            images = [self._images(path, 1)[0] for path in (first, last) if path is not None]
            if self._clip is None:
                assert self._folder.image_encoder is not None
                dtype = DTYPES[options.text_dtype or options.dtype]
                self._clip = ImageEncoder.from_pretrained(self._folder.image_encoder, dtype, self._runtime.device)
            pixels = conditioning.clip_pixels(images, options.conditioning, self._clip.side)  # type: ignore[arg-type]
            return self._clip.encode(pixels).cpu()

        return self._runtime.lead(encoded).to(self._runtime.device)

    def _frames(self, job: VideoJob, options: GenerateOptions) -> tuple[Tensor, Tensor]:
        """Return the visible video [3, F, H, W] and its known frames [F]."""
        import torch

        assert job.image is not None and options.num_frames is not None

        def resized(image: Image.Image) -> Tensor:
            return conditioning.image_to_frame(image, options.size, options.conditioning)  # type: ignore[arg-type]

        start = torch.stack([resized(image) for image in self._images(job.image, options.start_frames)], dim=1)
        last = None if job.last_image is None else resized(self._images(job.last_image, 1)[0])
        return conditioning.place_frames(start, options.num_frames, last)

    @staticmethod
    def _images(path: str, count: int) -> list[Image.Image]:
        """Return the first ``count`` frames of a clip, or the one image of an image file."""
        if Path(path).suffix.lower() in _VIDEOS:
            from PIL import Image as Pillow

            from mindspeed_wan.data.video import read_frames

            return [Pillow.fromarray(frame) for frame in read_frames(Path(path), range(count))]
        if count > 1:
            from mindspeed_wan.errors import ConfigError

            raise ConfigError(f"--start_frames {count} needs a clip, this is one image", where=path)
        return [conditioning.open_image(path)]
