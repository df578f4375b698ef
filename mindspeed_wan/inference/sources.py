"""What a weights folder is, before anything large is read: layout, task, experts and encoders. No torch here.

Layouts: a Diffusers pipeline (``model_index.json``), Wan-AI's own (``high_noise_model/`` or shards at the top),
VideoX-Fun's (Wan-AI's names, but in ``transformer/`` lies the LOW expert), and checkpoints (``high/`` and ``low/``, or
one path per expert) in any format that ``checkpoint.sources`` knows. Experts given one by one replace the folder's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.checkpoint import sources as checkpoints
from mindspeed_wan.config.translate import wan_section
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.inference.options import GenerateOptions
from mindspeed_wan.lora.expert import guess_expert
from mindspeed_wan.models import original_names
from mindspeed_wan.models.wan.config import WanConfig

if TYPE_CHECKING:
    from mindspeed_wan.config.mm_files import PredictorFile

_PIPELINES = {"WanPipeline": "t2v", "WanImageToVideoPipeline": "i2v"}
_VIDEOX_CLASS = "Wan2_2Transformer3DModel"
"""The class name in the ``config.json`` of Fun-A14B weights; Wan-AI's own files say ``WanModel``."""

_CHECKPOINT_FOLDERS = (("high", "low"), ("transformer", "transformer_2"))
"""Names under which checkpoints of the two experts lie side by side; ``mm-convert`` writes the second pair."""

_SAMPLED = ("head.head.weight", "blocks.0.modulation", "patch_embedding.weight")
"""Tensors whose equality shows that two experts are the same file: small, and trained apart."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Everything a generation reads.

    ``experts`` maps ``high`` and ``low`` to weights; Wan2.1's only DiT is ``high`` with ``boundary`` None.
    ``identity`` changes when any weight file changes (by name, size and time).
    """

    task: str
    config: WanConfig
    experts: dict[str, checkpoints.Found]
    vae: Path
    text_encoder: Path
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    boundary: float | None = None
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What one layout told; later replaced by what the user named part by part."""

    experts: dict[str, Path]
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    boundary: float | None = None
    videox: bool = False


def recognise(options: GenerateOptions) -> ModelFolder:
    """Say what the options' weights are.

    Raises:
        CheckpointError: missing, incomplete, out of scope, swapped or equal experts, another VAE.
        ConfigError: no weights named, or parts that no folder provides.
    """
    parts = _Parts(experts={}) if options.ckpt_dir is None else _read_folder(options.ckpt_dir)
    parts = _override(parts, options)
    where = str(options.ckpt_dir or options.high_noise_ckpt)
    if not parts.experts:
        raise ConfigError("no weights are named", fix="give --ckpt_dir DIR, or --load HIGH and --low_noise_ckpt LOW")
    found = {name: _find_expert(path, name) for name, path in parts.experts.items()}
    config = _architecture(found, options.predictor)
    missing = [
        f"{what} (--{flag})"
        for what, flag, path in (("VAE", "vae", parts.vae), ("text encoder", "text_encoder", parts.text_encoder),
                                 ("CLIP image encoder", "image_encoder",
                                  parts.image_encoder if config.has_image_embedder else where))
        if path is None
    ]
    if missing:
        raise ConfigError(f"the weights come without {' and '.join(missing)}", where=where,
                          fix="name them, or give the pipeline folder as --ckpt_dir with --load for the expert")
    assert parts.vae is not None and parts.text_encoder is not None
    for path in (parts.vae, parts.text_encoder, parts.tokenizer):
        if path is not None and not path.exists():
            raise CheckpointError("does not exist", where=str(path), fix="check the path in the flag or the JSON file")
    _check_vae(parts.vae)
    _check_text_encoder(parts.text_encoder, config)
    task = _task(config, found, parts, options.task)
    _check_experts(found, config, task, where)
    _warn_of_names(parts.experts)
    boundary = _trained_boundary(found) or parts.boundary
    if task.endswith("A14B"):
        _warn_of_another_boundary(boundary, options.boundary)
    files = [*_files(entry.path for entry in found.values()), *_files([parts.vae, parts.text_encoder])]
    return ModelFolder(
        task=task, config=config, experts=found, vae=parts.vae, text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer, image_encoder=parts.image_encoder,
        boundary=boundary if task.endswith("A14B") else None, identity=_identity(files),
    )


# ---- layouts -----------------------------------------------------------------------------------------------------


def _read_folder(root: Path) -> _Parts:
    if not root.is_dir():
        raise CheckpointError("there is no such folder", where=str(root), fix="check --ckpt_dir")
    if (root / "model_index.json").is_file():
        return _read_diffusers(root)
    if (root / "high_noise_model").is_dir() or (root / "low_noise_model").is_dir():
        return _read_original(root, {"high": root / "high_noise_model", "low": root / "low_noise_model"})
    if (root / "transformer").is_dir() and _class_name(root / "transformer") == _VIDEOX_CLASS:
        return _read_original(root, {"low": root / "transformer", "high": root / "transformer_2"})
    if (root / "config.json").is_file() and (root / original_names.TEXT_FILE).exists():
        return _read_original(root, {"high": root})
    for high, low in _CHECKPOINT_FOLDERS:
        if (root / high).is_dir() or (root / low).is_dir():
            return _Parts(experts=_both(root, {"high": root / high, "low": root / low}), **_encoders_beside(root))
    inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"is no Wan weights folder; it holds {inside}", where=str(root),
        fix="a Diffusers folder has model_index.json, an original one high_noise_model/ and low_noise_model/, a folder "
        "of checkpoints high/ and low/; single experts go to --load and --low_noise_ckpt",
    )


def _read_diffusers(root: Path) -> _Parts:
    index = _json(root / "model_index.json")
    name = str(index.get("_class_name"))
    videox = "Fun" in name or _class_name(root / "transformer") == _VIDEOX_CLASS
    if name not in _PIPELINES and not videox:
        raise CheckpointError(f"_class_name is {name!r}; supported are {' and '.join(_PIPELINES)}",
                              where=str(root / "model_index.json"))
    if index.get("expand_timesteps"):
        raise CheckpointError("this is TI2V-5B (expand_timesteps), which is out of scope", where=str(root))
    if videox:
        return _read_original(root, {"low": root / "transformer", "high": root / "transformer_2"})
    two = _present(index, "transformer_2")
    boundary = index.get("boundary_ratio")
    if boundary is not None and not (isinstance(boundary, (int, float)) and 0 < boundary < 1):
        raise CheckpointError(f"boundary_ratio is {boundary!r}, not a number between 0 and 1",
                              where=str(root / "model_index.json"), fix="T2V has 0.875, I2V 0.9")
    if boundary is not None and not two:
        raise CheckpointError(f"boundary_ratio is {boundary} but the low-noise expert transformer_2 is missing",
                              where=str(root / "model_index.json"), fix="download the whole folder again")
    experts = {"high": root / "transformer", **({"low": root / "transformer_2"} if two else {})}
    return _Parts(
        experts=_both(root, experts), vae=root / "vae", text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer", boundary=boundary,
        image_encoder=root / "image_encoder" if _present(index, "image_encoder") else None,
    )


def _present(index: dict[str, Any], component: str) -> bool:
    entry = index.get(component)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _read_original(root: Path, experts: dict[str, Path]) -> _Parts:
    wrong_vae = root / "Wan2.2_VAE.pth"
    if wrong_vae.exists() and not (root / original_names.VAE_FILE).exists():
        original_names.check_latent_channels(48, where=str(wrong_vae))
    return _Parts(
        experts=_both(root, experts), videox=any(_class_name(path) == _VIDEOX_CLASS for path in experts.values()),
        **_encoders_beside(root),
    )


def _encoders_beside(root: Path) -> dict[str, Any]:
    """Find the encoders of either layout in ``root``."""
    candidates = {
        "vae": (original_names.VAE_FILE, "vae"),
        "text_encoder": (original_names.TEXT_FILE, "text_encoder"),
        "tokenizer": (original_names.TOKENIZER_FOLDER, "tokenizer"),
        "image_encoder": (original_names.IMAGE_FILE, "image_encoder"),
    }
    return {what: next((root / name for name in names if (root / name).exists()), None)
            for what, names in candidates.items()}


def _both(root: Path, experts: dict[str, Path]) -> dict[str, Path]:
    missing = [f"{path.name}/ ({name} noise)" for name, path in experts.items() if not path.is_dir()]
    if missing:
        raise CheckpointError(f"the expert {' and '.join(missing)} is missing", where=str(root),
                              fix="Wan2.2 A14B needs both experts; download or convert the other one")
    return experts


def _override(parts: _Parts, options: GenerateOptions) -> _Parts:
    experts = dict(parts.experts)
    for name, path in (("high", options.high_noise_ckpt), ("low", options.low_noise_ckpt)):
        if path is not None:
            experts[name] = path
    changes: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("vae", "text_encoder", "tokenizer", "image_encoder") if getattr(options, name) is not None
    }
    return replace(parts, experts=experts, **changes)


# ---- experts and architecture --------------------------------------------------------------------------------------


def _find_expert(path: Path, name: str) -> checkpoints.Found:
    if not path.exists():
        flag = {"high": "--load", "low": "--low_noise_ckpt"}[name]
        raise CheckpointError(f"the {name}-noise expert does not exist", where=str(path),
                              fix=f"name existing weights with {flag}, or a whole folder with --ckpt_dir")
    return checkpoints.find(path)


def _architecture(found: dict[str, checkpoints.Found], predictor: PredictorFile | None) -> WanConfig:
    """Return the architecture of the experts, which must be one."""
    configs = {name: _expert_config(entry, predictor) for name, entry in found.items()}
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if config != first:
            differing = [key for key, value in config.to_dict().items() if value != first.to_dict()[key]]
            raise CheckpointError(
                f"the experts are not of one model: {', '.join(differing)} differ", where=str(found[name].path),
                fix="give the high- and low-noise expert of the same release and task",
            )
    return first


def _expert_config(entry: checkpoints.Found, predictor: PredictorFile | None) -> WanConfig:
    """Read an expert's architecture from its card, its config.json, the MM file, or its tensors' shapes."""
    card = entry.card
    if card:
        return WanConfig.from_dict(card.get("config") or card.get("architecture") or card["model"])
    config_file = (entry.path if entry.path.is_dir() else entry.path.parent) / "config.json"
    if config_file.is_file():
        values = _json(config_file)
        if "num_attention_heads" in values:
            return WanConfig.from_diffusers(values, where=str(config_file))
        return _with_image_keys(WanConfig.from_original(values, where=str(config_file)), entry)
    if predictor is not None:
        return WanConfig(**wan_section(predictor))
    return _from_shapes(entry)


def _with_image_keys(config: WanConfig, entry: checkpoints.Found) -> WanConfig:
    """Wan2.1 and Wan2.2 I2V share a config.json; only Wan2.1's weights have an image embedder."""
    if config.in_channels <= config.out_channels:
        return config
    probe = config.with_changes(image_dim=1280)
    with checkpoints.open_weights(entry, probe) as files:
        stored = files.tensors.get("img_emb.proj.0.weight")
        positions = files.tensors.get("img_emb.emb_pos")
    if stored is None:
        return config
    return config.with_changes(image_dim=stored.shape[0], pos_embed_len=positions.shape[1] if positions else None)


def _from_shapes(entry: checkpoints.Found) -> WanConfig:
    """Derive the architecture from tensor shapes; Wan's heads always have 128 channels."""
    with checkpoints.open_weights(entry, WanConfig()) as files:
        shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    try:
        dim, in_channels = shapes["patch_embedding.weight"][:2]
        patch = shapes["patch_embedding.weight"][2:]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        head = shapes["head.head.weight"][0]
        return WanConfig(
            num_layers=len(blocks), dim=dim, ffn_dim=shapes["blocks.0.ffn.0.weight"][0], num_heads=max(1, dim // 128),
            in_channels=in_channels, out_channels=head // (patch[0] * patch[1] * patch[2]),
            text_dim=shapes["text_embedding.linear_1.weight"][1], freq_dim=shapes["time_embedding.0.weight"][1],
            image_dim=shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else None,
            pos_embed_len=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None,
        )
    except KeyError as error:
        raise CheckpointError(f"tensor {error.args[0]!r} is missing: not a Wan DiT", where=str(entry.path)) from None


def _task(config: WanConfig, found: dict[str, checkpoints.Found], parts: _Parts, asked: str | None) -> str:
    """Return the task's name; ``inp-A14B`` has I2V's shapes and is told by its layout or by the user."""
    two = "low" in found
    if config.task == "t2v":
        return "t2v-A14B" if two else "t2v-14B"
    if config.has_image_embedder:
        return "i2v-14B"
    if parts.videox or (asked == "inp-A14B" and not _is_plain_diffusers(found)):
        return "inp-A14B"
    return "i2v-A14B"


def _is_plain_diffusers(found: dict[str, checkpoints.Found]) -> bool:
    return any(_class_name(entry.path) == "WanTransformer3DModel" for entry in found.values())


def _check_experts(found: dict[str, checkpoints.Found], config: WanConfig, task: str, where: str) -> None:
    """Refuse experts that are missing, in each other's place, or the same weights."""
    if task.endswith("A14B") and set(found) != {"high", "low"}:
        lacking = "low" if "high" in found else "high"
        flag = {"low": "--low_noise_ckpt", "high": "--load"}[lacking]
        raise CheckpointError(f"the {lacking}-noise expert is missing", where=where, fix=f"name it with {flag}")
    if len(found) == 1:
        return
    for name, entry in found.items():
        said = entry.card.get("expert")
        if said and said != name:
            raise CheckpointError(
                f"this checkpoint is the {said}-noise expert but was given as the {name}-noise one",
                where=str(entry.path), fix="the experts are swapped: exchange --load and --low_noise_ckpt",
            )
    if found["high"].path.resolve() == found["low"].path.resolve() or _same_weights(found, config):
        raise CheckpointError("the high- and the low-noise expert are the same weights", where=str(found["low"].path),
                              fix="name the other expert; both are needed")


def _trained_boundary(found: dict[str, checkpoints.Found]) -> float | None:
    """Return the boundary the experts' cards say they were trained for, ``None`` when they say nothing.

    Raises:
        CheckpointError: the experts were trained for different boundaries.
    """
    said = {name: entry.card["boundary"] for name, entry in found.items() if entry.card.get("boundary") is not None}
    if len(set(said.values())) > 1:
        raise CheckpointError(f"the high-noise expert was trained for boundary {said['high']}, the low-noise one for "
                              f"{said['low']}", where=str(found["low"].path), fix="use experts of one training")
    return next(iter(said.values()), None)


def _warn_of_another_boundary(trained: float | None, asked: float | None) -> None:
    if trained is not None and asked is not None and abs(trained - asked) > 1e-6:
        _warn(f"these experts were trained for boundary {trained}, {asked} is used: sigmas in between go to an expert "
              "that has not seen them")


def _warn_of_names(experts: dict[str, Path]) -> None:
    """Say so when a file that is given for one expert is called after the other."""
    for name, path in experts.items():
        # transformer and transformer_2 mean high and low in Diffusers' folders, and the reverse in VideoX-Fun's.
        guess = None if path.name.startswith("transformer") else guess_expert(path.name)
        if guess is not None and guess != name and len(experts) > 1:
            _warn(f"{path.name} looks like the {guess}-noise expert; it is used as the {name}-noise one")


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # the ranks have not met yet
        print(f" warning: {text}", flush=True)


def _same_weights(found: dict[str, checkpoints.Found], config: WanConfig) -> bool:
    with (checkpoints.open_weights(found["high"], config) as high,
          checkpoints.open_weights(found["low"], config) as low):
        names = [name for name in _SAMPLED if name in high.tensors and name in low.tensors]
        return bool(names) and all(high.read(name).equal(low.read(name)) for name in names)


# ---- encoders and files --------------------------------------------------------------------------------------------


def _check_vae(path: Path) -> None:
    config = path / "config.json"
    if config.is_file():
        original_names.check_latent_channels(int(_json(config).get("z_dim", 16)), where=str(path))


def _check_text_encoder(path: Path, config: WanConfig) -> None:
    file = path / "config.json"
    width = _json(file).get("d_model") if file.is_file() else None
    if width is not None and width != config.text_dim:
        raise CheckpointError(f"the text encoder's states have {width} channels, the DiT reads {config.text_dim}",
                              where=str(path), fix="take the text_encoder/ of the same release")


def _class_name(folder: Path) -> str | None:
    path = folder / "config.json"
    return _json(path).get("_class_name") if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix="download the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError("is not a JSON object", where=str(path), fix="download the file again")
    return values


def _files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        found += sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return found


def _identity(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
