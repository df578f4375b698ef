"""MindSpeed-MM's file spellings to ``RunConfig`` sections. Each spelling is translated here and nowhere else.

The functions return plain dicts (the sections' keyword arguments) and append to a ``Report``: errors with file and
line, and notes for values that mean nothing here or were changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_wan.config.documents import Document, KeyPath
from mindspeed_wan.config.mm_files import AeFile, DataFile, ModelFile, PredictorFile, PreprocessFile, TilingFile
from mindspeed_wan.config.paths import is_placeholder, resolve_path
from mindspeed_wan.errors import ConfigError

DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}
LATENT_PIXELS = 8
"""Pixels per latent unit of the VAE, each way."""
SIZE_STEP = 16
"""Pixels per token, each way: 8 of the VAE times 2 of the patch."""


@dataclass
class Report:
    """What was found while reading: errors, notes, and the sections that cannot be trusted because of errors."""

    errors: list[ConfigError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)

    def fail(self, message: str, document: Document, keys: KeyPath, fix: str | None = None) -> None:
        """Record an error at a key of a file."""
        self.errors.append(ConfigError(message, where=document.where(keys), fix=fix))

    def note(self, text: str) -> None:
        """Record a note once."""
        if text not in self.notes:
            self.notes.append(text)


def path_value(value: str | None, document: Document, keys: KeyPath, report: Report) -> str | None:
    """Return an absolute path; a placeholder is an error."""
    if value is None or not value.strip():
        return None
    if is_placeholder(value):
        key = str(keys[-1])
        fix = f"put the real path of '{keys[-2]}' there" if key == "from_pretrained" else "put the real path there"
        report.fail(f"the path {value!r} was not filled in", document, keys, fix)
        return None
    return resolve_path(value, Path(document.path).resolve().parent)


def model_section(file: ModelFile, document: Document, report: Report) -> dict[str, Any]:
    """Return the keyword arguments of ``ModelSection`` (all but the tokenizer, which data.json names)."""
    predictor, ae, text = file.predictor, file.ae, file.text_encoder
    _check_model_type(file, document, report)
    _check_first_frame_tiling(ae, document, report)
    if file.patch:
        report.note("model 'patch' has no effect: nothing is monkeypatched here")
    if document.has(("predictor", "use_fused_rmsnorm")) or document.has(("predictor", "fa_layout")):
        report.note("predictor.use_fused_rmsnorm and fa_layout have no effect: the device chooses its kernels")
    return {
        "task": file.task,
        "wan": wan_section(predictor),
        "fp32_residual": predictor.fp32_calculate,
        "pipeline_num_layers": _stages(predictor.pipeline_num_layers),
        "vae": {
            "path": path_value(ae.from_pretrained, document, ("ae", "from_pretrained"), report),
            "dtype": DTYPES[ae.dtype],
            "tiling": ae.enable_tiling,
            "do_sample": ae.do_sample,
            **_tiles(ae, document, report),
        },
        "text_encoder": {
            "path": path_value(text.from_pretrained, document, ("text_encoder", "from_pretrained"), report),
            "dtype": DTYPES[text.dtype],
        },
        **_image_side(ae, document, report),
        "load_video_features": file.load_video_features,
        "load_text_features": file.load_text_features,
        "encoder_offload_interval": file.encoder_offload_interval,
        "enable_encoder_dp": file.enable_encoder_dp,
    }


def _image_side(ae: AeFile, document: Document, report: Report) -> dict[str, Any]:
    """Return what I2V reads besides the clip: CLIP and the known frames."""
    processor = ae.i2v_processor
    if processor is None:
        return {}
    found: dict[str, Any] = {"conditioning": processor.conditioning}
    if processor.image_encoder is not None:
        keys: KeyPath = ("ae", "i2v_processor", "image_encoder", "from_pretrained")
        found["image_encoder"] = {
            "path": path_value(processor.image_encoder.from_pretrained, document, keys, report),
            "dtype": DTYPES[processor.image_encoder.dtype],
        }
    return found


def wan_section(predictor: PredictorFile) -> dict[str, Any]:
    """Return the keyword arguments of ``WanSection``. CLIP belongs to Wan2.1's i2v and flf2v only."""
    has_clip = predictor.model_type in ("i2v", "flf2v")
    return {
        "num_layers": predictor.num_layers,
        "dim": predictor.hidden_size,
        "ffn_dim": predictor.ffn_dim,
        "num_heads": predictor.num_heads,
        "in_channels": predictor.in_dim,
        "out_channels": predictor.out_dim,
        "patch_size": predictor.patch_size,
        "text_dim": predictor.text_dim,
        "text_len": predictor.text_len,
        "freq_dim": predictor.freq_dim,
        "eps": predictor.eps,
        "rope_max_len": predictor.max_seq_len,
        "image_dim": predictor.img_dim if has_clip else None,
        "pos_embed_len": 514 if predictor.model_type == "flf2v" else None,
    }


def data_section(file: DataFile, document: Document, report: Report) -> dict[str, Any]:
    """Return the keyword arguments of ``DataSection``."""
    dataset, loader = file.dataset_param, file.dataloader_param
    basic, frames = dataset.basic_parameters, dataset.preprocess_parameters
    root: KeyPath = ("dataset_param", "preprocess_parameters")
    base: KeyPath = ("dataset_param", "basic_parameters")
    is_feature = dataset.dataset_type == "feature" or bool(dataset.use_feature_data)
    if basic.data_storage_mode == "standard":
        report.fail("data_storage_mode 'standard' is not supported", document, (*base, "data_storage_mode"),
                    "write a data.txt with the line 'folder,annotation.json' and use 'combine'")  # fmt: skip
    if loader.sampler_type != "LengthGroupedSampler" or not (loader.group_data or loader.group_frame):
        report.note("clips of one size and length always share a batch, whatever sampler_type and group_* say")
    return {
        "kind": "feature" if is_feature else "video",
        "data_path": path_value(basic.data_path, document, (*base, "data_path"), report),
        "data_folder": path_value(basic.data_folder, document, (*base, "data_folder"), report),
        **{name: getattr(frames, name) for name in _SAME_NAME},
        "hw_stride": _stride(frames, document, (*root, "hw_stride"), report),
        "caption_dropout": frames.cfg,
        "clean_captions": dataset.enable_text_preprocessing and dataset.text_preprocess_methods != [],
        "reader": _READERS.get(frames.video_reader_type, "auto"),
        **_pipeline(frames, document, root, report),
        "shuffle": loader.shuffle,
        "drop_last": loader.drop_last,
        "balance_tokens": loader.balance_tokens,
        "pin_memory": loader.pin_memory,
    }


_READERS = {name: name for name in ("pyav", "decord", "torchcodec")}
"""Readers that a file may ask for; MindSpeed-MM's own names leave the choice to this package."""

_SAME_NAME = (
    "num_frames",
    "min_num_frames",
    "frame_interval",
    "auto_interval",
    "max_height",
    "max_width",
    "max_hxw",
    "min_hxw",
    "force_resolution",
    "hw_aspect_thr",
    "train_fps",
    "speed_factor",
    "drop_short_ratio",
    "frame_choice",
    "size_buckets",
    "frame_buckets",
    "max_bad_fraction",
)
"""Keys of preprocess_parameters that mean the same under the same name."""


def tokenizer(file: DataFile, document: Document, report: Report) -> dict[str, Any]:
    """Return the tokenizer keys of ``TextEncoderSection``."""
    configs = file.dataset_param.tokenizer_config
    is_list = isinstance(configs, list)
    keys: KeyPath = ("dataset_param", "tokenizer_config", *((0,) if is_list else ()))
    if isinstance(configs, list):
        if len(configs) != 1:
            report.fail(f"{len(configs)} tokenizers are given, Wan has one text encoder", document, keys[:2])
            return {}
        configs = configs[0]
    path = path_value(configs.from_pretrained, document, (*keys, "from_pretrained"), report)
    return {"tokenizer_path": path, "max_length": configs.model_max_length}


def _check_model_type(file: ModelFile, document: Document, report: Report) -> None:
    kind = file.predictor.model_type
    if kind is None:
        return
    implied = "t2v" if kind.endswith("t2v") else "i2v"
    if implied != file.task:
        keys = ("predictor", "model_type")
        report.fail(f"predictor.model_type {kind!r} contradicts task {file.task!r}", document, keys,
                    "make both t2v or both i2v")  # fmt: skip


def _check_first_frame_tiling(ae: AeFile, document: Document, report: Report) -> None:
    """The first frame is encoded by the same VAE in the same way as the clips."""
    for name in ("i2v_vae_encode_tiling", "i2v_vae_encod_tiling"):
        value = getattr(ae.i2v_processor, name, None)
        if value not in (None, "auto", ae.enable_tiling):
            report.fail(
                f"{name} {str(value).lower()} differs from enable_tiling {str(ae.enable_tiling).lower()}",
                document,
                ("ae", "i2v_processor", name),
                "the first frame is encoded like the clips; write auto and set enable_tiling",
            )


def _stages(stages: list[int] | list[list[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Return one row per virtual chunk: ``[20, 20]`` is one row, ``[[10, 10], [10, 10]]`` two."""
    if not stages:
        return ()
    rows = [row for row in stages if isinstance(row, list)] or [[n for n in stages if isinstance(n, int)]]
    return tuple(tuple(row) for row in rows)


def _tiles(ae: AeFile, document: Document, report: Report) -> dict[str, Any]:
    """Return tile sizes in pixels from either spelling of tiling_param."""
    given: TilingFile = ae.tiling_param
    sample = (given.tile_sample_min_height, given.tile_sample_min_width)
    stride = (given.tile_sample_stride_height, given.tile_sample_stride_width)
    has_pixels, has_latent = any(sample) or any(stride), bool(given.tile_size or given.tile_stride)
    if has_pixels and has_latent:
        report.fail("tiles are given in pixels and in latent units", document, ("ae", "tiling_param"),
                    "keep tile_sample_* or tile_size/tile_stride")  # fmt: skip
        return {}
    tiles: dict[str, Any] = {}
    if has_latent:
        if given.tile_size:
            tiles["tile_size"] = tuple(side * LATENT_PIXELS for side in given.tile_size)
        if given.tile_stride:
            tiles["tile_stride"] = tuple(side * LATENT_PIXELS for side in given.tile_stride)
    else:
        if any(sample):
            tiles["tile_size"] = tuple(side or 256 for side in sample)
        if any(stride):
            tiles["tile_stride"] = tuple(side or 192 for side in stride)
    return tiles


def _stride(frames: PreprocessFile, document: Document, keys: KeyPath, report: Report) -> int:
    """Return hw_stride as a multiple of 16; MindSpeed-MM's files say 8, which the patch size cannot use."""
    stride = frames.hw_stride
    if SIZE_STEP % stride == 0:
        if stride != SIZE_STEP:
            report.note(f"hw_stride {stride} is raised to {SIZE_STEP}: 8 pixels of the VAE times 2 of the patch")
        return SIZE_STEP
    if stride % SIZE_STEP:
        nearest = max(SIZE_STEP, round(stride / SIZE_STEP) * SIZE_STEP)
        report.fail(f"hw_stride {stride} is not a multiple of {SIZE_STEP}", document, keys, f"use {nearest}")
        return SIZE_STEP
    return stride


def _pipeline(frames: PreprocessFile, document: Document, root: KeyPath, report: Report) -> dict[str, Any]:
    """Return crop and filter from train_pipeline.video; other normalisations and sizes are refused."""
    result: dict[str, Any] = {}
    for index, step in enumerate(frames.train_pipeline.video):
        keys: KeyPath = (*root, "train_pipeline", "video", index)
        if step.trans_type == "RandomCropVideo":
            result["crop"] = "random"
        elif step.trans_type == "norm_fun":
            for name in ("mean", "std"):
                value = getattr(step.param, name)
                if any(part != 0.5 for part in (value if isinstance(value, list) else [value])):
                    report.fail(f"norm_fun {name} {value} is not 0.5", document, (*keys, "param", name),
                                "the VAE expects frames in [-1, 1]: mean 0.5, std 0.5")  # fmt: skip
        elif step.trans_type == "ResizeVideo":
            result["interpolation"] = step.param.interpolation_mode
        size = step.param.size if step.param.transform_size == "auto" else step.param.transform_size
        if size != "auto" and not _same_size(size, frames):
            report.fail(f"transform_size {size} differs from max_height x max_width "
                        f"({frames.max_height} x {frames.max_width})", document, (*keys, "param"),
                        "write \"auto\" and set max_height and max_width")  # fmt: skip
    return result


def _same_size(size: Any, frames: PreprocessFile) -> bool:
    if isinstance(size, dict):
        size = [size.get("height", size.get("max_height")), size.get("width", size.get("max_width"))]
    return bool(size == [frames.max_height, frames.max_width])
