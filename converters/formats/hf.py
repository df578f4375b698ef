"""The Diffusers layout: ``transformer/`` (high expert), ``transformer_2/`` (low), and the pipeline around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.formats import folder
from mindspeed_wan_converters.plan import Constant, Layout, OutputFile, Weights

EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}


def read(path: Path, expert: str | None = None, hint: WanConfig | None = None) -> Weights:
    """Read one expert: a ``transformer/`` folder or a single safetensors file with Diffusers' names."""
    return folder.read(path, "hf", expert, hint)


def lay_out(weights: Weights, code: str | None, max_shard: int) -> Layout:
    """Return the files of a ``transformer/`` folder that ``WanTransformer3DModel.from_pretrained`` loads."""
    return folder.lay_out(weights, "hf", code, max_shard)


def read_model_index(root: Path) -> dict[str, Any]:
    """Return ``model_index.json`` of a pipeline folder."""
    path = root / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path),
                              fix="give a complete pipeline folder") from None
    if not isinstance(index, dict) or "transformer" not in index:
        raise CheckpointError("is not the index of a Wan pipeline", where=str(path))
    return index


def config_of(hf_dir: Path) -> WanConfig:
    """Return the architecture that ``hf_dir`` (a pipeline or an expert folder) describes."""
    for folder_name in ("", *EXPERT_FOLDERS.values()):
        path = hf_dir / folder_name / "config.json"
        if path.is_file():
            try:
                return WanConfig.from_diffusers(json.loads(path.read_text(encoding="utf-8")), where=str(path))
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"cannot be read ({error})", where=str(path)) from None
    raise ConfigError("has no config.json of a Wan DiT", where=f"--cfg.hf_dir {hf_dir}",
                      fix="give a Diffusers pipeline folder or its transformer/ folder")


def add_pipeline_parts(layout: Layout, hf_dir: Path) -> None:
    """Complete a layout that holds ``transformer/`` and/or ``transformer_2/`` to a pipeline, linking the rest.

    Links point at ``hf_dir``'s own parts (VAE, text encoder, tokenizer, scheduler, the expert not converted), so
    nothing is copied and ``WanPipeline.from_pretrained`` loads the target.
    """
    index = read_model_index(hf_dir)
    present = {file.name.partition("/")[0] for file in layout.files}
    for part, kind in index.items():
        if part.startswith("_") or part in present or not isinstance(kind, list) or kind[0] is None:
            continue
        if not (hf_dir / part).is_dir():
            raise CheckpointError(f"part {part!r} of the pipeline is missing", where=str(hf_dir),
                                  fix="give a complete pipeline folder with --cfg.hf_dir")
        layout.links[part] = (hf_dir / part).resolve()
    text = (hf_dir / "model_index.json").read_bytes()
    layout.files.append(OutputFile("model_index.json", (Constant(text),)))
