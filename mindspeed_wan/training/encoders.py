"""From micro-batches of clips and captions to what the DiT reads: latents, text states, conditions.

Encoders are frozen and whole on every rank. By default each rank of a tensor/context group encodes the same samples
(no communication, identical results); ``enable_encoder_dp`` lets the ranks of a group share that work.
``encoder_offload_interval`` encodes several micro-batches at once and keeps UMT5 in host memory in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.config.schema import RunConfig, VaeSection
from mindspeed_wan.data.loader import MicroBatch
from mindspeed_wan.diffusion import randomness
from mindspeed_wan.models import conditioning
from mindspeed_wan.models.image_encoder import ImageEncoder
from mindspeed_wan.models.text_encoder import TextEncoder, pad_states
from mindspeed_wan.models.vae import Tiling, WanVAE, latent_shape, unit_range
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.conditions import known_pixels
from mindspeed_wan.training.objective import SampleKey

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Features:
    """One encoded micro-batch on the device.

    ``latents`` [B, 16, f, h, w] fp32 normalised; ``text`` [B, Lt, text_dim], zero rows after each prompt;
    ``condition`` [B, 20, f, h, w] (mask and latents of what is known) for I2V; ``image_embeds`` [B, 257, 1280] CLIP
    states for Wan2.1 I2V ([2B, ...] with a last frame); ``keys`` (sample index, epoch).
    """

    latents: Tensor
    text: Tensor
    keys: list[SampleKey]
    condition: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass(frozen=True)
class SampleFeatures:
    """One encoded sample: ``latents`` [16, f, h, w], unpadded ``text`` [L, text_dim], and where the model wants them
    ``condition`` [20, f, h, w] and ``image_embeds`` [1 or 2, 257, 1280]."""

    latents: Tensor
    text: Tensor
    condition: Tensor | None = None
    image_embeds: Tensor | None = None


def assemble(samples: Sequence[SampleFeatures], keys: list[SampleKey], device: torch.device) -> Features:
    """Return the micro-batch of these samples on ``device``; prompts are padded to the longest one."""
    conditions = [sample.condition for sample in samples if sample.condition is not None]
    images = [sample.image_embeds for sample in samples if sample.image_embeds is not None]
    texts = [sample.text for sample in samples]
    return Features(
        latents=torch.stack([sample.latents for sample in samples]).to(device),
        text=pad_states(texts, max(text.shape[0] for text in texts)).to(device),
        keys=keys,
        condition=torch.stack(conditions).to(device) if conditions else None,
        image_embeds=torch.cat(images).to(device) if images else None,
    )


class Encoders:
    """The frozen VAE and UMT5 of a run; either is absent when the data hold its features already.

    Args:
        config: the resolved configuration.
        groups: the layout; ``enable_encoder_dp`` shares work over its tensor and context ranks.
        platform: where they run.

    Raises:
        CheckpointError: an encoder's folder is missing, damaged or of another model.
    """

    def __init__(self, config: RunConfig, groups: ParallelGroups, platform: Platform) -> None:
        model = config.model
        self.device = platform.device()
        self.interval, self.is_i2v = model.encoder_offload_interval, model.task == "i2v"
        self.seed, self.do_sample, self.clean = config.training.seed, model.vae.do_sample, config.data.clean_captions
        self.max_length = model.text_encoder.max_length
        self._sharing = _Sharing(groups, self.device) if model.enable_encoder_dp else None
        self._offload_text = self.interval > 1 and platform.device_type != "cpu"
        self.known = model.conditioning
        self.image_count = 0 if model.wan.image_dim is None else 1 + (model.wan.pos_embed_len is not None)
        self.clip: ImageEncoder | None = None
        self.vae: WanVAE | None = None
        self.text: TextEncoder | None = None
        if not model.load_video_features:
            self.vae = WanVAE.from_pretrained(str(model.vae.path), DTYPES[model.vae.dtype], self.device,
                                              tiling=tiling(model.vae))
        if self.image_count:
            self.clip = ImageEncoder.from_pretrained(str(model.image_encoder.path), DTYPES[model.image_encoder.dtype],
                                                     self.device)
        if not model.load_text_features:
            section = model.text_encoder
            self.text = TextEncoder.from_pretrained(str(section.path), DTYPES[section.dtype],
                                                    "cpu" if self._offload_text else self.device,
                                                    tokenizer=section.tokenizer_path)

    def stream(self, batches: Iterator[MicroBatch]) -> Iterator[Features]:
        """Yield the features of ``batches`` in order, encoding ``encoder_offload_interval`` of them at a time."""
        while group := list(islice(batches, self.interval)):
            yield from self.encode(group)

    def encode(self, batches: Sequence[MicroBatch]) -> list[Features]:
        """Encode a few micro-batches. Samples are encoded one by one, so the result does not depend on the cut."""
        samples = iter(self.encode_samples(batches))
        return [assemble(list(islice(samples, len(batch))), batch.keys, self.device) for batch in batches]

    def encode_samples(self, batches: Sequence[MicroBatch]) -> list[SampleFeatures]:
        """Encode a few micro-batches and return their samples, in order."""
        latents, conditions = self._latents(batches), self._conditions(batches)
        texts, images = self._texts(batches), self._images(batches)
        return [
            SampleFeatures(latent[row], states[row], None if condition is None else condition[row],
                           None if image is None else image[row])
            for batch, latent, condition, states, image in zip(batches, latents, conditions, texts, images)
            for row in range(len(batch))
        ]

    # ---- video ---------------------------------------------------------------------------------------------------

    def _latents(self, batches: Sequence[MicroBatch]) -> Iterable[Tensor]:
        if self.vae is None:
            return [_given(batch.latents, "latents").to(self.device) for batch in batches]
        clips = [(clip, key) for batch in batches for clip, key in zip(_given(batch.video, "video"), batch.keys)]
        return _regroup(self._map(lambda item: self._encode_clip(*item), clips), batches)

    def _conditions(self, batches: Sequence[MicroBatch]) -> Iterable[Tensor | None]:
        """Return I2V's mask and conditioning latents, [B, 20, f, h, w]; ``None`` for T2V."""
        if not self.is_i2v:
            return [None] * len(batches)
        if self.vae is None:
            cached = [_given(batch.condition, "condition").to(self.device) for batch in batches]
            return [conditioning.condition_channels(_first_frame_mask(latents), latents) for latents in cached]
        clips = [(clip, key) for batch in batches for clip, key in zip(_given(batch.video, "video"), batch.keys)]
        return _regroup(self._map(lambda item: self._encode_condition(*item), clips), batches)

    def _images(self, batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """Return CLIP states of the first frame (and the last one for flf2v), [B, 1 or 2, 257, 1280]; else ``None``."""
        if self.clip is None:
            return [None] * len(batches)
        clips = [clip for batch in batches for clip in _given(batch.video, "video")]
        return _regroup(self._map(self._encode_images, clips), batches)

    def _encode_clip(self, clip: Tensor, key: SampleKey) -> Tensor:
        assert self.vae is not None
        generator = randomness.generator(self.seed, key[0], key[1], "vae") if self.do_sample else None
        return self.vae.encode(clip[None], do_sample=self.do_sample, generator=generator)[0]

    def _encode_condition(self, clip: Tensor, key: SampleKey) -> Tensor:
        """Return the channels [20, f, h, w] of what this sample's model is told of a clip [3, F, H, W]."""
        assert self.vae is not None
        frames, height, width = clip.shape[1:]
        known = known_pixels(self.known, (frames, height, width), self.seed, key)
        latent = latent_shape(frames, height, width)
        if known is None:
            return conditioning.nothing_known(latent).to(self.device)
        seen = conditioning.visible_video(unit_range(clip.to(self.device)), known)
        return conditioning.condition_channels(conditioning.mask_channels(known, latent[1:]),
                                               self.vae.encode(seen[None])[0])

    def _encode_images(self, clip: Tensor) -> Tensor:
        """Return CLIP states [1 or 2, 257, 1280] of a clip [3, F, H, W] uint8."""
        from PIL import Image

        assert self.clip is not None
        frames = [clip[:, index].permute(1, 2, 0).cpu().numpy() for index in (0, -1)[: self.image_count]]
        pixels = conditioning.clip_pixels([Image.fromarray(frame) for frame in frames], "official", self.clip.side)
        return self.clip.encode(pixels)

    # ---- text ----------------------------------------------------------------------------------------------------

    def _texts(self, batches: Sequence[MicroBatch]) -> list[list[Tensor]]:
        if self.text is None:
            return [_given(batch.text, "text") for batch in batches]
        if self._offload_text:
            self.text.to(self.device)
        encoder = self.text
        captions = [caption for batch in batches for caption in batch.captions]
        states = iter(self._map(lambda c: encoder.encode([c], self.max_length, clean=self.clean)[0], captions))
        result = [list(islice(states, len(batch))) for batch in batches]
        if self._offload_text:
            self.text.to("cpu")
        return result

    def _map(self, function: Callable[[T], Tensor], items: Sequence[T]) -> list[Tensor]:
        return self._sharing.map(function, items) if self._sharing is not None else [function(item) for item in items]


class _Sharing:
    """Spreads a list of samples over the tensor and context ranks of one data rank, which all need all results."""

    def __init__(self, groups: ParallelGroups, device: torch.device) -> None:
        self._groups = [group for group in (groups.tp, groups.cp) if group is not None]
        self._size = groups.dims.tensor * groups.dims.context
        self._rank = groups.cp_rank * groups.dims.tensor + groups.tp_rank
        self._device = device

    def map(self, function: Callable[[T], Tensor], items: Sequence[T]) -> list[Tensor]:
        """Apply ``function`` to every item, each on one rank, and return all results on all ranks. Collective."""
        results = {i: function(items[i]).cpu() for i in range(self._rank, len(items), self._size)}
        for group in self._groups:
            parts: list[dict[int, Tensor]] = [{} for _ in range(group.size())]
            dist.all_gather_object(parts, results, group=group)
            results = {i: tensor for part in parts for i, tensor in part.items()}
        return [results[i].to(self._device) for i in range(len(items))]


def _first_frame_mask(latents: Tensor) -> Tensor:
    """Return the mask [4, f, h, w] of cached conditions [B, 16, f, h, w], whose first frame is known."""
    frames = 4 * (latents.shape[2] - 1) + 1
    return conditioning.mask_channels(conditioning.known_frames(frames), (latents.shape[3], latents.shape[4]))


def tiling(section: VaeSection) -> Tiling | None:
    """Return the tiles that the configuration asks for."""
    return Tiling(*section.tile_size, *section.tile_stride) if section.tiling else None


def _given(value: T | None, name: str) -> T:
    assert value is not None, f"the loader gave no {name}"
    return value


def _regroup(tensors: Sequence[Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Stack per-sample tensors back into one tensor per micro-batch."""
    source = iter(tensors)
    return [torch.stack(list(islice(source, len(batch)))) for batch in batches]
