"""Tiny but complete Wan folders in the Diffusers layout: every file of the real release, a few megabytes, no download.

diffusers' own pipelines load and run what is written here, so the folders serve as the demo's model and as the
oracle of the tests. Every parameter is drawn anew, norms, biases and modulation tables included: with default
initialisation (weights 1, biases 0) a port that swaps two norms or drops a bias still gives the right answer.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mindspeed_wan.demo.tokenizer import write_tokenizer
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.config import BOUNDARY, WanConfig

if TYPE_CHECKING:
    import torch

FolderTask = Literal["t2v", "i2v", "wan2.1-t2v", "wan2.1-i2v"]
_TASKS = ("t2v", "i2v", "wan2.1-t2v", "wan2.1-i2v")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of everything in the folder; the defaults keep TP 2, CP 2 and CP 4 legal and the whole under 4 MB."""

    num_layers: int = 2
    num_heads: int = 4
    head_dim: int = 12
    ffn_dim: int = 96
    text_dim: int = 32
    freq_dim: int = 32
    text_layers: int = 2
    text_heads: int = 4
    vae_base_dim: int = 8
    vae_res_blocks: int = 1
    image_dim: int = 32
    text_len: int = 512
    vocab_size: int = 384

    def wan_config(self, task: FolderTask) -> WanConfig:
        """Return the DiT's configuration for ``task``."""
        return WanConfig(
            num_layers=self.num_layers,
            dim=self.num_heads * self.head_dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_heads,
            in_channels=36 if task.endswith("i2v") else 16,
            text_dim=self.text_dim,
            text_len=self.text_len,
            freq_dim=self.freq_dim,
            image_dim=self.image_dim if task == "wan2.1-i2v" else None,
        )


def write_model_folder(
    path: str | Path,
    *,
    task: FolderTask = "t2v",
    seed: int = 0,
    dtype: str = "float32",
    flow_shift: float = 3.0,
    shard_size: str = "10GB",
    captions: Sequence[str] = (),
    trainable: bool = False,
    **sizes: Any,
) -> Path:
    """Write a tiny Wan pipeline folder that diffusers' ``from_pretrained`` loads and runs.

    Args:
        path: the folder; created, existing files are overwritten.
        task: ``t2v`` and ``i2v`` are Wan2.2 A14B's shape (two experts, boundary 0.875 / 0.9), ``wan2.1-*`` one DiT;
            ``wan2.1-i2v`` has the CLIP image encoder as well.
        seed: names the random weights; the same seed gives the same files.
        dtype: stored type of DiT and text encoder; the VAE stays fp32 as in the release.
        flow_shift: written to the scheduler's config (3.0 is what Diffusers' own conversions carry).
        shard_size: largest safetensors shard of DiT and text encoder, e.g. ``"200KB"`` to get a sharded index.
        captions: texts whose words become tokens of their own.
        trainable: give the experts Wan's initial weights, from which they learn, instead of perturbed ones.
        **sizes: fields of ``TinySizes``.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        ConfigError: unknown task or dtype, or illegal sizes.
    """
    import torch

    if task not in _TASKS:
        raise ConfigError(f"unknown task {task!r}; one of {', '.join(_TASKS)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; one of {', '.join(_DTYPES)}")
    root, tiny = Path(path), TinySizes(**sizes)
    root.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(root / "tokenizer", vocab_size=tiny.vocab_size, sentences=captions)
    components: dict[str, Any] = _components(task, tiny, vocab, seed, flow_shift)
    if trainable:
        for name in ("transformer", "transformer_2"):
            if name in components:
                initialise(components[name], seed=seed, salt=name)
    with _quiet_libraries():
        for name, component in components.items():
            if name in ("transformer", "transformer_2", "text_encoder"):
                _cast(component, getattr(torch, dtype))
                component.save_pretrained(root / name, max_shard_size=shard_size)
            else:
                component.save_pretrained(root / name)
    _write_index(root, task, components)
    return root


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter (``module.to`` would let diffusers keep some in fp32 and warn about it)."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' progress bars for a few kilobytes off the terminal."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _components(task: FolderTask, tiny: TinySizes, vocab: int, seed: int, flow_shift: float) -> dict[str, Any]:
    """Return the pipeline's components by folder name, with fresh perturbed weights."""
    config = tiny.wan_config(task)
    parts: dict[str, Any] = {
        "text_encoder": _text_encoder(tiny, vocab),
        "vae": _vae(tiny),
        "transformer": _transformer(config),
        "scheduler": _scheduler(flow_shift),
    }
    if not task.startswith("wan2.1"):
        parts["transformer_2"] = _transformer(config)
    if task == "wan2.1-i2v":
        parts.update(image_encoder=_image_encoder(tiny), image_processor=_image_processor())
    for name in ("text_encoder", "vae", "transformer", "transformer_2", "image_encoder"):
        if name in parts:
            perturb(parts[name], seed=seed, salt=name)
    return parts


def perturb(module: torch.nn.Module, *, seed: int, salt: str = "") -> None:
    """Redraw every parameter in place, each from a generator of its own (so one name never moves another).

    Matrices get std ``fan_in ** -0.5`` (signals keep their size through the layers), norm weights ``1 +- 0.1``,
    modulation tables std 0.2, biases std 0.05.
    """
    _redraw(module, seed, salt, _redrawn)


def initialise(transformer: torch.nn.Module, *, seed: int, salt: str = "") -> None:
    """Give a WanTransformer3DModel the variances of Wan's own initialisation; it predicts zero until it is trained."""
    _redraw(transformer, seed, salt, _initial)


def _redraw(module: torch.nn.Module, seed: int, salt: str, draw: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = zlib.crc32(f"{seed}/{salt}/{name}".encode())
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
            parameter.copy_(draw(name, noise).to(parameter.dtype))


def _initial(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Xavier for matrices, 0.02 for the text and time embedding, norms 1, biases and output projection 0."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "scale_shift_table":
        return noise * noise.shape[-1] ** -0.5
    if leaf == "bias" or name.startswith("proj_out."):
        return 0 * noise
    if noise.dim() < 2:
        return 0 * noise + 1
    if "condition_embedder" in name and "time_proj" not in name:
        return 0.02 * noise
    return noise * (2 / (noise.shape[0] + noise[0].numel())) ** 0.5


def _redrawn(name: str, noise: torch.Tensor) -> torch.Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("scale_shift_table", "position_embedding", "class_embedding") or "relative_attention_bias" in name:
        return 0.2 * noise
    if leaf == "bias":
        return 0.05 * noise
    if leaf == "gamma" or noise.dim() < 2:
        return 1.0 + 0.1 * noise
    if leaf == "weight" and ("shared" in name or "embed" in name) and noise.dim() == 2 and "linear" not in name:
        return noise
    return noise * noise[0].numel() ** -0.5


def _text_encoder(tiny: TinySizes, vocab: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab,
            d_model=tiny.text_dim,
            d_kv=tiny.text_dim // tiny.text_heads,
            d_ff=2 * tiny.text_dim,
            num_layers=tiny.text_layers,
            num_heads=tiny.text_heads,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ).eval()


def _vae(tiny: TinySizes) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=tiny.vae_base_dim, z_dim=16, num_res_blocks=tiny.vae_res_blocks)


def _transformer(config: WanConfig) -> Any:
    from diffusers import WanTransformer3DModel

    fields = {key: value for key, value in config.to_diffusers().items() if not key.startswith("_")}
    text_len = {key: fields.pop(key) for key in ("text_len",) if key in fields}  # ours; diffusers only keeps it
    model: Any = WanTransformer3DModel(**{**fields, "patch_size": tuple(fields["patch_size"])})
    model.register_to_config(**text_len)
    return model


def _scheduler(flow_shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )


def _image_encoder(tiny: TinySizes) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    # 224 / 14 gives the 257 tokens that Wan2.1 expects; the pipeline reads the last hidden state but one.
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=tiny.image_dim,
            intermediate_size=2 * tiny.image_dim,
            num_hidden_layers=3,
            num_attention_heads=16,  # as in ViT-H/14: the original file does not say
            image_size=224,
            patch_size=14,
            hidden_act="gelu",
            projection_dim=tiny.image_dim,
        )
    ).eval()


def _image_processor() -> Any:
    import transformers

    # transformers 5 without torchvision answers the plain name too, with a warning.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)()


def _write_index(root: Path, task: FolderTask, components: dict[str, Any]) -> None:
    """Write ``model_index.json`` with the class names that the released folders carry."""
    import diffusers

    image = task.endswith("i2v")
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None if task.startswith("wan2.1") else BOUNDARY["i2v" if image else "t2v"],
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if "transformer_2" in components else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image:
        clip = "image_encoder" in components
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    (root / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
