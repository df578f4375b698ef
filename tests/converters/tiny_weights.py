"""Tiny weights in every layout, made with torch and safetensors alone: the oracle the converters are held against.

The MindSpeed-MM side is written from the rules of its ``WanConverter`` (its replacement table, its pipeline split
with block numbers from 0, its file tree), not from our own table of parameters.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

CONFIGS = {
    "t2v": WanConfig(num_layers=4, dim=32, num_heads=4, ffn_dim=64, text_dim=16, freq_dim=16),
    "i2v": WanConfig(num_layers=4, dim=32, num_heads=4, ffn_dim=64, text_dim=16, freq_dim=16, in_channels=36),
    "i2v-2.1": WanConfig(num_layers=4, dim=32, num_heads=4, ffn_dim=64, text_dim=16, freq_dim=16, in_channels=36,
                         image_dim=24),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MM_WHOLE_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.linear_1",
    "condition_embedder.text_embedder.linear_2": "text_embedding.linear_2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
MM_PIECES = (
    ("attn1.norm_q", "self_attn.q_norm"), ("attn1.norm_k", "self_attn.k_norm"),
    ("attn2.norm_q", "cross_attn.q_norm"), ("attn2.norm_k", "cross_attn.k_norm"),
    ("attn1.to_q.", "self_attn.proj_q."), ("attn1.to_k.", "self_attn.proj_k."), ("attn1.to_v.", "self_attn.proj_v."),
    ("attn1.to_out.0.", "self_attn.proj_out."), ("attn2.to_q.", "cross_attn.proj_q."),
    ("attn2.to_k.", "cross_attn.proj_k."), ("attn2.to_v.", "cross_attn.proj_v."),
    ("attn2.to_out.0.", "cross_attn.proj_out."), ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"), ("attn2.norm_added_k", "cross_attn.k_norm_img"),
    (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."), ("scale_shift_table", "modulation"),
    (".norm2.", ".norm3."),
)


def random_state(task: str, dtype: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict in Diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    return {p.hf: torch.randn(p.shape, generator=generator).to(DTYPES[dtype]) for p in parameter_table(CONFIGS[task])}


def write_expert(folder: Path, task: str, state: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """Write a Diffusers expert folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[task].to_diffusers()))
    names = list(state)
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_pipeline(root: Path, task: str = "t2v", dtype: str = "fp32") -> Path:
    """Write a pipeline folder with two different experts and stand-ins for the other parts."""
    for seed, name in enumerate(("transformer", "transformer_2")):
        write_expert(root / name, task, random_state(task, dtype, seed))
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (root / part).mkdir()
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "transformer": ["diffusers", "W"],
             "transformer_2": ["diffusers", "W"], "vae": ["diffusers", "A"], "text_encoder": ["transformers", "U"],
             "tokenizer": ["transformers", "T"], "scheduler": ["diffusers", "S"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def read_expert(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors folder."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Require the same names, dtypes and bits."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def mm_name(name: str) -> str:
    """Translate a Diffusers name by MindSpeed-MM's rules."""
    stem, _, last = name.rpartition(".")
    if name == "scale_shift_table":
        return "head.modulation"
    if stem in MM_WHOLE_NAMES:
        return f"{MM_WHOLE_NAMES[stem]}.{last}"
    for old, new in MM_PIECES:
        name = name.replace(old, new)
    return name


def mm_tree(state: dict[str, torch.Tensor], pp_layers: list[int]) -> list[dict[str, torch.Tensor]]:
    """Return one state dict per pipeline stage (TP 1), block numbers from 0, as MindSpeed-MM splits them."""
    renamed = {mm_name(name): value for name, value in state.items()}
    stages = []
    for stage, count in enumerate(pp_layers):
        start = sum(pp_layers[:stage])
        part = {}
        for name, value in renamed.items():
            match = re.match(r"blocks\.(\d+)\.(.*)", name)
            if match and start <= int(match.group(1)) < start + count:
                part[f"blocks.{int(match.group(1)) - start}.{match.group(2)}"] = value
            elif not match and stage == (len(pp_layers) - 1 if name.startswith("head.") else 0):
                part[name] = value
        stages.append(part)
    return stages


def write_mm(root: Path, state: dict[str, torch.Tensor], pp_layers: list[int]) -> Path:
    """Write a MindSpeed-MM checkpoint (TP 1) with torch.save, file tree and keys as MindSpeed-MM's ``save_as_mm``."""
    for stage, part in enumerate(mm_tree(state, pp_layers)):
        name = "mp_rank_00" + (f"_{stage:03d}" if len(pp_layers) > 1 else "")
        (root / "release" / name).mkdir(parents=True)
        torch.save({"model": part}, root / "release" / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    return root
