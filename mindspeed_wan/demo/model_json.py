"""MindSpeed-MM's model.json for a small model: the shipped A14B file with other sizes."""

from __future__ import annotations

import json
from pathlib import Path

from mindspeed_wan.config.documents import read_json
from mindspeed_wan.models.wan.config import WanConfig


def write_model_json(
    path: Path, repository: Path, model: Path, task: str, expert: str, *, cached: bool = False
) -> None:
    """Write the shipped A14B model file with a small model's sizes and paths in place of the real ones.

    Args:
        path: the file to write.
        repository: the checkout that holds examples/.
        model: a Diffusers folder with ``vae`` and ``text_encoder``.
        task: ``t2v`` or ``i2v``.
        expert: ``high`` or ``low``.
        cached: train from features instead of encoding clips and captions.
    """
    values = read_json(repository / "examples" / "wan2.2" / "A14B" / task / f"pretrain_model_{expert}.json")
    config = WanConfig.from_diffusers(json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8")))
    values["predictor"].update(
        in_dim=config.in_channels, out_dim=config.out_channels, hidden_size=config.dim, ffn_dim=config.ffn_dim,
        num_heads=config.num_heads, num_layers=config.num_layers, text_dim=config.text_dim, freq_dim=config.freq_dim,
        text_len=config.text_len,
    )
    values["predictor"].pop("pipeline_num_layers", None)
    values["ae"]["from_pretrained"] = str(model / "vae")
    values["text_encoder"]["from_pretrained"] = str(model / "text_encoder")
    if cached:
        values.update(load_video_features=True, load_text_features=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
