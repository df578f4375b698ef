"""Rules about what is trained: the expert, clips and sizes, cached features, paths. Each returns its mistakes."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.config.documents import nearby_files
from mindspeed_wan.config.rule import RuleRow, divisors, listed, mistake
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError

VAE_PIXELS = 8
"""Pixels per latent voxel, each way."""


def channels_match_task(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """T2V reads the noisy latent only; I2V also 4 mask and 16 conditioning channels."""
    model = config.model
    latent = model.wan.out_channels
    if 48 in (latent, model.wan.in_channels):
        message = "48 latent channels: this is TI2V-5B, which is out of scope"
        return mistake(message, "use Wan2.2 A14B or Wan2.1 14B, which have 16", key="model:predictor.in_dim")
    wanted = latent if model.task == "t2v" else 2 * latent + 4
    if model.wan.in_channels == wanted:
        return []
    message = f"in_dim {model.wan.in_channels} does not fit task {model.task}, which reads {wanted} channels"
    return mistake(message, f"set in_dim to {wanted}, or the other task", key="model:predictor.in_dim")


def widths_fit(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Heads divide the hidden size into an even number of channels; patches span one latent frame."""
    wan = config.model.wan
    if wan.patch_size[0] != 1:
        message = f"patch_size {list(wan.patch_size)}: Wan patches span one latent frame"
        return mistake(message, f"write {[1, *wan.patch_size[1:]]}", key="model:predictor.patch_size")
    key = "model:predictor.num_heads"
    if wan.dim % wan.num_heads:
        near = sorted(divisors(wan.dim), key=lambda heads: abs(heads - wan.num_heads))[:4]
        message = f"hidden_size {wan.dim} is not divisible by num_heads {wan.num_heads}"
        return mistake(message, f"num_heads that fit: {listed(sorted(near))}", key=key)
    if (wan.dim // wan.num_heads) % 2:
        message = f"{wan.dim // wan.num_heads} channels per head is odd; the rotary embedding turns pairs"
        return mistake(message, "change num_heads or hidden_size", key=key)
    return []


def frames_fit(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The VAE turns 4k+1 frames into k+1 latent frames."""
    data, found = config.data, []
    if data.num_frames % 4 != 1:
        lower = max(1, (data.num_frames - 1) // 4 * 4 + 1)
        message = f"num_frames {data.num_frames} is not 4k+1"
        found += mistake(message, f"use {lower} or {lower + 4}", key="data:num_frames")
    if data.min_num_frames > data.num_frames:
        message = f"min_num_frames {data.min_num_frames} is more than num_frames {data.num_frames}: no clip is left"
        found += mistake(message, "lower min_num_frames", key="data:min_num_frames")
    return found


def sizes_fit(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Height and width are multiples of a token's pixels (8 of the VAE x 2 of the patch)."""
    data, patch, found = config.data, config.model.wan.patch_size, []
    for name, size, voxels in (("max_height", data.max_height, patch[1]), ("max_width", data.max_width, patch[2])):
        step = VAE_PIXELS * voxels
        if size % step:
            lower = max(step, size // step * step)
            message = f"{name} {size} is not a multiple of {step}"
            found += mistake(message, f"use {lower} or {lower + step}", key=f"data:{name}")
    if data.min_pixels > data.max_pixels:
        message = f"min_hxw {data.min_pixels} is more than max_hxw {data.max_pixels}: no clip is left"
        found += mistake(message, "lower min_hxw", key="data:min_hxw")
    return found


def captions_fit(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """A caption gives no more text states than the model reads; a longer one would end the run when it comes."""
    length, most = config.model.text_encoder.max_length, config.model.wan.text_len
    if length <= most:
        return []
    message = f"model_max_length {length} is more than the {most} text states that the model reads (text_len)"
    return mistake(message, f"use {most}", key="data:model_max_length")


def features_agree(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The model file and the data file agree on whether clips are encoded here or were before."""
    is_cached = config.model.load_video_features or config.model.load_text_features
    if is_cached and config.data.kind != "feature":
        message = "the model file wants cached features, the data file gives clips"
        fix = "set dataset_type to feature, or load_video_features and load_text_features to false"
        return mistake(message, fix, key="data:dataset_type")
    if config.data.kind == "feature" and not is_cached:
        message = "the data file gives cached features, the model file encodes clips"
        fix = "set load_video_features and load_text_features to true in the model file"
        return mistake(message, fix, key="data:dataset_type")
    if config.model.load_video_features != config.model.load_text_features:
        message = "latents and text states are cached together"
        fix = "give load_video_features and load_text_features the same value"
        return mistake(message, fix, key="model:load_video_features")
    return []


def image_side_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Caches hold the first frame's latents only; a last frame's CLIP tokens need that frame."""
    model, given, found = config.model, config.model.conditioning, []
    key, online = "model:ae.i2v_processor.conditioning", "set load_video_features and load_text_features to false"
    if model.task == "t2v" and not given.is_default:
        found += mistake("conditioning is given, but task t2v has none", "remove it, or set task to i2v", key=key)
    if model.load_video_features and not given.is_default:
        message = "cached features hold the first frame's latents; other frames and masks are drawn while training"
        found += mistake(message, online, key=key)
    if given.mode == "frames" and max(given.start_frames) + (given.last_frame > 0) > config.data.num_frames:
        message = f"{max(given.start_frames)} start frames do not fit num_frames {config.data.num_frames}"
        found += mistake(message, "give fewer start frames or longer clips", key=key)
    if model.wan.image_dim is None:
        return found
    if model.load_video_features:
        message = "cached features hold no CLIP states, which Wan2.1 I2V reads"
        found += mistake(message, online, key="model:predictor.model_type")
    if given.mode == "masks":
        message = "Wan2.1 I2V reads CLIP states of its first frame, which random masks hide"
        found += mistake(message, "set mode to frames; Fun-A14B-InP (model_type wan2.2-i2v) trains with masks", key=key)
    if model.wan.pos_embed_len is not None and given.last_frame != 1.0:
        message = f"last_frame {given.last_frame:g}: flf2v always reads the last frame"
        found += mistake(message, "set last_frame to 1", key=key)
    return found


def paths_exist(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Every file or folder that is going to be read is there."""
    model, data = config.model, config.data
    wanted: list[tuple[str, str | None]] = [("data:data_path", data.data_path)]
    if data.data_folder:
        wanted.append(("data:data_folder", data.data_folder))
    if not model.load_video_features:
        wanted.append(("model:ae.from_pretrained", model.vae.path))
        if model.wan.image_dim is not None:
            wanted.append(("model:ae.i2v_processor.image_encoder.from_pretrained", model.image_encoder.path))
    if not model.load_text_features:
        wanted.append(("model:text_encoder.from_pretrained", model.text_encoder.path))
        if model.text_encoder.tokenizer_path:
            wanted.append(("data:tokenizer_config.from_pretrained", model.text_encoder.tokenizer_path))
    found = []
    for key, path in wanted:
        source, name = key.split(":")
        if path is None:
            if source in config.sources:
                found += mistake(f"{name} is not given", "name the file or folder there", key=key)
        elif not Path(path).exists():
            found += mistake(f"{name}: {path} does not exist", nearby_files(path), key=key)
    return found


def files_are_given(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """A run needs a model and a data file."""
    found = []
    for name in ("model", "data"):
        if name not in config.sources:
            found += mistake(f"--mm-{name} is missing", f"add --mm-{name} FILE; the launchers under examples/ do")
    return found


RULES: tuple[RuleRow, ...] = (
    (files_are_given, frozenset()),
    (channels_match_task, frozenset({"model"})),
    (widths_fit, frozenset({"model"})),
    (frames_fit, frozenset({"data"})),
    (sizes_fit, frozenset({"data", "model"})),
    (captions_fit, frozenset({"data", "model"})),
    (features_agree, frozenset({"data", "model"})),
    (image_side_fits, frozenset({"data", "model"})),
    (paths_exist, frozenset({"data", "model"})),
)
"""Every rule of this file, with the sections it reads."""
