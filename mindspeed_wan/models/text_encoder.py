"""The frozen UMT5 text encoder: prompts to states, unpadded.

transformers builds the network and the tokenizer. Weights are loaded here, strictly, because some versions of
transformers (5.0.x) leave ``encoder.embed_tokens`` at zero for UMT5: every prompt then looks alike and nothing fails.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_wan.errors import CheckpointError, ResourceError
from mindspeed_wan.models import frozen_weights, original_names

MAX_LENGTH = 512
"""Tokens of a prompt that every Wan release attends to."""

_EMBEDDING = "shared.weight"
_TIED = "encoder.embed_tokens.weight"


def clean_prompt(text: str) -> str:
    """Clean a prompt as the official model does: repair mojibake, undo HTML escapes twice, collapse white space.

    Raises:
        ResourceError: ftfy is not installed. (Skipping it silently would give other tokens for the same prompt.)
    """
    try:
        import ftfy
    except ImportError:
        raise ResourceError(
            "ftfy is not installed; without it prompts are cleaned differently from the official model",
            fix="pip install 'mindspeed-wan[train]' (or pip install ftfy)",
        ) from None
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip()


@dataclass(frozen=True)
class TextSource:
    """Where the encoder (a folder or ``.pth`` file) and its tokenizer (a folder) are."""

    encoder: Path
    tokenizer: Path


class TextEncoder:
    """UMT5 with its tokenizer.

    Attributes:
        model: transformers' ``UMT5EncoderModel``, frozen.
        tokenizer: the tokenizer.
        text_dim: width of the states (4096 for UMT5-xxl).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_dim: int = model.config.d_model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        *,
        tokenizer: str | Path | None = None,
    ) -> TextEncoder:
        """Load UMT5 strictly.

        Args:
            path: a pipeline folder of either layout, a Diffusers ``text_encoder/`` folder, or the file
                ``models_t5_umt5-xxl-enc-bf16.pth``.
            dtype: precision of the network; bf16 officially.
            device: where it runs.
            tokenizer: tokenizer folder; ``None`` looks beside ``path``.

        Raises:
            CheckpointError: nothing to load, damaged, another network, or embeddings that are zero.
        """
        source = locate_text_encoder(path, tokenizer)
        read = _read_original if source.encoder.is_file() else _read_transformers
        fields, tensors = read(source.encoder)
        model = _build(fields, frozen_weights.cast_floating(tensors, dtype), where=str(source.encoder))
        return cls(model.to(device), load_tokenizer(source.tokenizer))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int = MAX_LENGTH, *, clean: bool = True) -> list[Tensor]:
        """Encode prompts to states without padding.

        Each prompt runs by itself at its own length, so its states depend on nothing but the prompt: not on the batch,
        the rank or the padding. (The model is bound by reading its weights; batching short prompts gains little.)

        Args:
            prompts: any strings; the empty one gives the end-of-sequence token alone.
            max_length: tokens kept, the end-of-sequence token included.
            clean: apply ``clean_prompt`` first.

        Returns:
            one [L_i, text_dim] tensor a prompt, in the network's dtype, on its device.
        """
        states = []
        for prompt in prompts:
            ids = torch.tensor([self.token_ids(prompt, max_length, clean=clean)], device=self.device)
            states.append(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0])
        return states

    def token_ids(self, prompt: str, max_length: int | None = MAX_LENGTH, *, clean: bool = True) -> list[int]:
        """Return the prompt's token ids, cut to ``max_length`` (``None``: all of them), the end token included."""
        text = clean_prompt(prompt) if clean else prompt
        options: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length else {}
        return list(self.tokenizer(text, add_special_tokens=True, **options)["input_ids"])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns self."""
        self.model.to(device)
        return self


def pad_states(states: Sequence[Tensor], length: int = MAX_LENGTH) -> Tensor:
    """Stack states [L_i, C] to [B, length, C], zeros after each prompt's end, as the DiT expects them."""
    out = states[0].new_zeros(len(states), length, states[0].shape[-1])
    for row, state in zip(out, states):
        row[: min(length, state.shape[0])] = state[:length]
    return out


def load_tokenizer(folder: str | Path) -> Any:
    """Load a tokenizer from a local folder (never from the network).

    Raises:
        CheckpointError: no folder, or nothing transformers can read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("no tokenizer folder", where=str(folder),
                              fix="it holds tokenizer.json and tokenizer_config.json (tokenizer/ or google/umt5-xxl)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many types for a broken folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot read the tokenizer: {reason}", where=str(folder)) from None


def locate_text_encoder(path: str | Path, tokenizer: str | Path | None = None) -> TextSource:
    """Find encoder and tokenizer for a pipeline folder, a component folder or a file.

    Raises:
        CheckpointError: nothing that looks like a text encoder there.
    """
    root = Path(path).expanduser()
    beside = {
        "component": (root, root.parent / "tokenizer"),
        "pipeline": (root / "text_encoder", root / "tokenizer"),
        "original": (root / original_names.TEXT_FILE, root / original_names.TOKENIZER_FOLDER),
    }
    if root.is_file():
        encoder, default = root, root.parent / original_names.TOKENIZER_FOLDER
    elif (root / "config.json").is_file() and not (root / original_names.TEXT_FILE).is_file():
        encoder, default = beside["component"]
    elif (root / "text_encoder").is_dir():
        encoder, default = beside["pipeline"]
    elif (root / original_names.TEXT_FILE).is_file():
        encoder, default = beside["original"]
    elif not root.exists():
        raise CheckpointError("no such file or folder", where=str(root))
    else:
        raise CheckpointError(
            "no text encoder here", where=str(root),
            fix=f"give a Diffusers text_encoder/ folder, a pipeline folder, or the file {original_names.TEXT_FILE}",
        )
    return TextSource(encoder, Path(tokenizer).expanduser() if tokenizer else default)


def text_encoder_files(path: str | Path) -> list[Path]:
    """Return the weight files of the text encoder at ``path`` (their content names what a text cache was made with)."""
    source = locate_text_encoder(path)
    return [source.encoder] if source.encoder.is_file() else frozen_weights.weight_files(source.encoder)


# ---- loading ---------------------------------------------------------------------------------------------------------


def _read_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = frozen_weights.read_config(folder)
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"model_type is {config.get('model_type')!r}; Wan's text encoder is umt5", where=str(folder / "config.json")
        )
    tensors = frozen_weights.read_safetensors(frozen_weights.weight_files(folder))
    # A file may hold the encoder alone, or the whole translation model with its decoder.
    return config, {k: v for k, v in tensors.items() if not k.startswith(("decoder.", "lm_head."))}


def _read_original(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    is_safetensors = file.suffix == ".safetensors"
    state = frozen_weights.read_safetensors([file]) if is_safetensors else frozen_weights.read_pth(file)
    fields = original_names.umt5_structure({k: tuple(v.shape) for k, v in state.items()}, where=str(file))
    table = original_names.umt5_names(num_layers=fields["num_layers"])
    constant = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "relative_attention_max_distance": 128}
    return {**fields, **constant}, original_names.renamed(state, table, where=str(file))


def _build(fields: dict[str, Any], tensors: dict[str, Tensor], *, where: str) -> torch.nn.Module:
    """Build UMT5 around ``tensors`` and make sure that the encoder reads the embedding that the file holds."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_dict({k: v for k, v in fields.items() if k != "architectures"}))
    if _EMBEDDING not in tensors and _TIED in tensors:
        tensors = {**tensors, _EMBEDDING: tensors[_TIED]}
    if _EMBEDDING not in tensors:
        raise CheckpointError(f"no {_EMBEDDING}: the token embedding is missing", where=where)
    embedding = tensors[_EMBEDDING]
    if not bool(embedding.any()):
        raise CheckpointError(
            f"{_EMBEDDING} is all zeros: every prompt would look alike", where=where,
            fix="the folder was saved by a transformers version with a UMT5 bug (5.0.x); take the released files",
        )
    if _TIED in model.state_dict():
        tensors = {**tensors, _TIED: embedding}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if name != _TIED}
    frozen_weights.load_strict(model, tensors, where=where)
    model.encoder.embed_tokens.weight = model.shared.weight
    _check_embedding(model, embedding, where)
    frozen_weights.freeze(model)
    return model


def _check_embedding(model: Any, embedding: Tensor, where: str) -> None:
    """Look up one used row through the encoder's own embedding module and compare it with the file.

    Raises:
        CheckpointError: this version of transformers reads another embedding.
    """
    row = int(embedding.abs().sum(dim=1).argmax()) if embedding.shape[0] < 4096 else 1
    seen = model.encoder.get_input_embeddings()(torch.tensor([row]))[0]
    if not torch.equal(seen, embedding[row]):
        import transformers

        raise CheckpointError(
            f"transformers {transformers.__version__} does not use the file's token embedding for UMT5", where=where,
            fix="install another version of transformers (5.0.x has this bug)",
        )
