"""Networks that judge videos, from local folders only: CLIP (text and frames) and VideoMAE (motion).

Folders are in transformers' layout with safetensors weights; nothing is downloaded, and no file that could run code
when it is opened (pickle, TorchScript) is read. Frames are [T, H, W, 3] uint8, RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.conditioning import clip_pixels
from mindspeed_wan.models.frozen_weights import read_config, weight_files

CLIP, VIDEOMAE = "clip", "videomae"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which VideoMAE was trained with."""
_BATCH = 16


def model_kind(folder: str | Path) -> str:
    """Return ``clip`` or ``videomae``.

    Raises:
        CheckpointError: no folder of one of them, or weights that are not safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("is not a folder", where=str(folder),
                              fix="give a transformers folder with config.json and safetensors weights; TorchScript "
                              "and pickle files can run code when they are opened and are not read")
    kind = str(read_config(folder).get("model_type"))
    if kind not in (CLIP, VIDEOMAE):
        raise CheckpointError(f"model_type is {kind!r}", where=str(folder / "config.json"),
                              fix="use a CLIP or a VideoMAE model")
    weight_files(folder)
    return kind


def _load(library_class: Any, folder: Path, device: torch.device) -> Any:
    """Return the frozen fp32 model; a weight that the file lacks is an error, not a random number."""
    try:
        model, report = library_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True,
                                                      output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot be loaded: {error}", where=str(folder)) from None
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing or report["mismatched_keys"]:
        wrong = missing[:5] or sorted(map(str, report["mismatched_keys"]))[:5]
        raise CheckpointError(f"weights are missing or of another shape: {', '.join(wrong)}", where=str(folder),
                              fix="download the folder again")
    return model.to(device, torch.float32).eval().requires_grad_(False)


class ClipScorer:
    """CLIP's image and text towers.

    Args:
        folder: transformers' CLIP folder, tokenizer included.
        device: where it runs.

    Raises:
        CheckpointError: another model, unsafe or incomplete weights.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = Path(folder)
        if model_kind(folder) != CLIP:
            raise CheckpointError("is not a CLIP model", where=str(folder), fix="--features takes VideoMAE folders")
        self._device = torch.device(device)
        self._model = _load(CLIPModel, folder, self._device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"its tokenizer cannot be loaded: {error}", where=str(folder)) from None
        self._side = int(self._model.config.vision_config.image_size)
        self._length = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def frames(self, frames: np.ndarray) -> Tensor:
        """Return unit vectors of frames, [T, d] fp32 on the CPU; short side scaled, middle cut out."""
        from PIL import Image

        parts = []
        for start in range(0, len(frames), _BATCH):
            images = [Image.fromarray(frame) for frame in frames[start : start + _BATCH]]
            pixels = clip_pixels(images, "diffusers", self._side).to(self._device)
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            parts.append(self._model.visual_projection(pooled).float().cpu())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors of texts (cut to the model's length), [N, d] fp32 on the CPU."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._length,
                                 return_tensors="pt").to(self._device)
        pooled = self._model.text_model(input_ids=tokens["input_ids"],
                                        attention_mask=tokens["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(self._model.text_projection(pooled).float().cpu(), dim=-1)


class VideoFeatures:
    """Features for a Frechet distance: of windows of frames (VideoMAE), or of single frames (CLIP).

    Args:
        folder: a transformers folder of either.
        device: where it runs.

    Raises:
        CheckpointError: another model, unsafe or incomplete weights.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder = Path(folder)
        self.kind = model_kind(folder)
        self._device = torch.device(device)
        self._clip = ClipScorer(folder, device) if self.kind == CLIP else None
        if self.kind == VIDEOMAE:
            from transformers import VideoMAEModel

            self._model = _load(VideoMAEModel, folder, self._device)
            self._frames = int(self._model.config.num_frames)
            self._side = int(self._model.config.image_size)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """Return [n, d] fp32: one row a window (a shorter clip is one window with repeated frames), or one a frame."""
        if self._clip is not None:
            return self._clip.frames(frames)
        rows = []
        for window in windows(len(frames), self._frames):
            pixels = _pixels(frames[window], self._side).to(self._device)
            rows.append(self._model(pixel_values=pixels[None]).last_hidden_state.mean(dim=1).float().cpu())
        return torch.cat(rows)


def windows(num_frames: int, length: int) -> list[np.ndarray]:
    """Return the frame numbers of each whole window; of a clip shorter than one, its frames spread over the length."""
    if num_frames < length:
        return [np.linspace(0, num_frames - 1, length).round().astype(int)]
    return [np.arange(start, start + length) for start in range(0, num_frames - length + 1, length)]


def _pixels(frames: np.ndarray, side: int) -> Tensor:
    """Return frames [T, 3, side, side] as VideoMAE wants them: short side scaled, middle cut out, normalised."""
    from PIL import Image

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    cut = []
    for frame in frames:
        image = Image.fromarray(frame)
        scale = side / min(image.size)
        image = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))),
                             Image.Resampling.BILINEAR)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cut.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return (torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255 - mean) / std
