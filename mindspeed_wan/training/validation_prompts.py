"""What validation videos should show: the prompts file, and what the model is told about each line of it."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import DataError
from mindspeed_wan.models import conditioning
from mindspeed_wan.models.image_encoder import ImageEncoder
from mindspeed_wan.models.text_encoder import TextEncoder, pad_states
from mindspeed_wan.models.vae import WanVAE, latent_shape
from mindspeed_wan.training.encoders import DTYPES, tiling

_KEYS = {"prompt", "image"}


@dataclass(frozen=True)
class ValidationPrompt:
    """One line of the file: what to show and, for I2V, the image to start from."""

    prompt: str
    image: str | None = None


def read_prompts(path: str | Path, *, task: str) -> list[ValidationPrompt]:
    """Read a prompts file: one prompt a line, or a JSON object a line; empty lines and those after # are left out.

    Args:
        path: the file.
        task: an ``i2v`` line needs an image, a ``t2v`` line has none. Relative images lie beside the file.

    Raises:
        DataError: with the line of every mistake.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None
    prompts: list[ValidationPrompt] = []
    problems: list[str] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        try:
            prompts.append(_line(line, path.parent, task))
        except DataError as error:
            problems.append(f"{path}:{number}: {error.message}")
    if problems:
        raise DataError("the prompts cannot be used:\n  " + "\n  ".join(problems),
                        fix='write a prompt a line, or {"prompt": "...", "image": "..."} for I2V')
    if not prompts:
        raise DataError("holds no prompt", where=str(path))
    return prompts


def _line(line: str, folder: Path, task: str) -> ValidationPrompt:
    values: dict[str, Any] = {"prompt": line}
    if line.startswith("{"):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})") from None
    if set(values) - _KEYS or not isinstance(values.get("prompt"), str):
        raise DataError(f"has the keys {', '.join(sorted(values))} instead of prompt and image")
    image = values.get("image")
    if (image is not None) != (task == "i2v"):
        raise DataError("has no image to start from" if image is None else "has an image, but the task is t2v")
    if image is None:
        return ValidationPrompt(values["prompt"])
    place = folder / str(image)
    if not place.is_file():
        raise DataError(f"image {place} does not exist")
    return ValidationPrompt(values["prompt"], str(place))


def encode_texts(config: RunConfig, texts: Sequence[str]) -> list[Tensor]:
    """Return the states [L_i, text_dim] of each text, on the host, where UMT5 runs once and is then dropped."""
    section = config.model.text_encoder
    encoder = TextEncoder.from_pretrained(str(section.path), DTYPES[section.dtype], "cpu",
                                          tokenizer=section.tokenizer_path)
    limit = min(section.max_length, config.model.wan.text_len)
    states = encoder.encode(list(texts), limit, clean=config.data.clean_captions)
    del encoder
    gc.collect()
    return states


@dataclass(frozen=True)
class Told:
    """What the model is told besides the text: I2V's channels [1, 20, f, h, w] and CLIP states [1, 257, 1280]."""

    channels: Tensor | None = None
    image_embeds: Tensor | None = None


def encode_images(config: RunConfig, prompts: Sequence[ValidationPrompt], device: torch.device) -> list[Told]:
    """Return what each prompt's image tells the model, on the host; the encoders are loaded for this and dropped."""
    if config.model.task == "t2v":
        return [Told()] * len(prompts)
    size = (config.data.num_frames, config.data.max_height, config.data.max_width)
    vae = open_vae(config, device)
    clip = None
    if config.model.wan.image_dim is not None:
        section = config.model.image_encoder
        clip = ImageEncoder.from_pretrained(str(section.path), DTYPES[section.dtype], device)
    told = []
    for prompt in prompts:
        image = conditioning.open_image(str(prompt.image))
        video, known = conditioning.place_frames(conditioning.image_to_frame(image, size[1:], "official"), size[0])
        mask = conditioning.mask_channels(known, latent_shape(*size)[1:])
        channels = conditioning.condition_channels(mask, vae.encode(video[None])).cpu()
        embeds = None if clip is None else clip.encode(conditioning.clip_pixels([image], "official", clip.side)).cpu()
        told.append(Told(channels, embeds))
    return told


def open_vae(config: RunConfig, device: torch.device) -> WanVAE:
    """Load the run's VAE."""
    section = config.model.vae
    return WanVAE.from_pretrained(str(section.path), DTYPES[section.dtype], device, tiling=tiling(section))


def as_batch(states: Tensor, device: torch.device) -> Tensor:
    """Return one prompt's states as the model wants them, [1, L, text_dim]."""
    return pad_states([states], states.shape[0]).to(device)
