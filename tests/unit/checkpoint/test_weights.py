"""Weights from every kind of folder: the same tensors, slice by slice, and one clear error for what is not weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from mindspeed_wan.checkpoint.sources import check_expert, find, open_weights
from mindspeed_wan.checkpoint.weights import load_model_weights
from mindspeed_wan.errors import CheckpointError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from tests.helpers.tiny import tiny_pipeline_folder

Weights = dict[str, torch.Tensor]


def diffusers_expert(folder: Path) -> tuple[WanConfig, Weights]:
    """Return the configuration and the weights under MM names of a Diffusers expert folder."""
    config = WanConfig.from_diffusers(json.loads((folder / "config.json").read_text()))
    stored: Weights = {}
    for file in folder.glob("*.safetensors"):
        stored.update(load_file(file))
    return config, {p.mm: stored[p.hf] for p in parameter_table(config)}


@pytest.fixture(scope="module")
def expert() -> tuple[Path, WanConfig, Weights]:
    folder = tiny_pipeline_folder() / "transformer"
    return (folder, *diffusers_expert(folder))


def mp_rank_root(root: Path, weights: Weights, config: WanConfig, tp: int) -> Path:
    """Write MindSpeed-MM's release folder for ``tp`` tensor ranks."""
    axes = {p.mm: p.tp_axis for p in parameter_table(config)}
    for rank in range(tp):
        shard = {n: w if axes[n] is None else w.chunk(tp, axes[n])[rank].contiguous() for n, w in weights.items()}
        target = root / "release" / f"mp_rank_{rank:02d}"
        target.mkdir(parents=True)
        torch.save({"model": shard, "checkpoint_version": 3.0}, target / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    return root


def dcp_root(root: Path, weights: Weights) -> Path:
    dcp.save({"model": weights, "checkpoint_version": 3.0}, checkpoint_id=root / "release", no_dist=True)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def original_folder(root: Path, weights: Weights, config: WanConfig) -> Path:
    folder = root / "high_noise_model"
    folder.mkdir(parents=True)
    names = {p.mm: p.original for p in parameter_table(config)}
    save_file({names[n]: w.clone() for n, w in weights.items()}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def loaded(path: Path, config: WanConfig, dtype: torch.dtype = torch.float32) -> Weights:
    views = {p.mm: torch.full(p.shape, float("nan"), dtype=dtype) for p in parameter_table(config)}
    load_model_weights(path, views, config)
    return views


@pytest.mark.parametrize("kind", ["diffusers", "original", "mp_rank_tp1", "mp_rank_tp2", "dcp", "file"])
def test_every_layout_gives_the_same_tensors(kind: str, tmp_path: Path,
                                             expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    make: dict[str, Callable[[], Path]] = {
        "diffusers": lambda: folder,
        "original": lambda: original_folder(tmp_path, weights, config),
        "mp_rank_tp1": lambda: mp_rank_root(tmp_path / "mm", weights, config, 1),
        "mp_rank_tp2": lambda: mp_rank_root(tmp_path / "mm", weights, config, 2),
        "dcp": lambda: dcp_root(tmp_path / "dcp", weights),
        "file": lambda: mp_rank_root(tmp_path / "mm", weights, config, 1) / "release/mp_rank_00/model_optim_rng.pt",
    }
    got = loaded(make[kind](), config)
    assert all(torch.equal(got[name], weight.float()) for name, weight in weights.items())


def test_values_are_cast_to_the_models_type(expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    got = loaded(folder, config, torch.bfloat16)
    assert all(torch.equal(got[name], weight.bfloat16()) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["diffusers", "mp_rank", "dcp"])
def test_any_box_of_a_tensor_reads_only_its_rows(kind: str, tmp_path: Path,
                                                 expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    path = {"diffusers": folder, "mp_rank": tmp_path / "mm", "dcp": tmp_path / "dcp"}[kind]
    if kind == "mp_rank":
        mp_rank_root(path, weights, config, 2)
    if kind == "dcp":
        dcp_root(path, weights)
    with open_weights(find(path), config) as files:
        for name in ("blocks.0.ffn.0.weight", "blocks.1.self_attn.proj_out.weight", "head.modulation"):
            weight = weights[name]
            for cut in range(1, 4):
                box = tuple(slice(size // (cut + 1), max(size // cut, size // (cut + 1) + 1)) for size in weight.shape)
                assert torch.equal(files.read(name, box), weight[box])
        files.bytes_read = 0
        weight = weights["blocks.0.ffn.0.weight"]
        files.read("blocks.0.ffn.0.weight", (slice(3, 5), slice(0, weight.shape[1])))
        assert files.bytes_read == 2 * weight.shape[1] * weight.element_size()


# ---- what is not weights -------------------------------------------------------------------------------------


def refuse(path: Path, config: WanConfig, **options: object) -> CheckpointError:
    views = {p.mm: torch.zeros(p.shape) for p in parameter_table(config)}
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(path, views, config, **options)  # type: ignore[arg-type]
    return caught.value


def test_pipeline_root_names_its_experts(expert: tuple[Path, WanConfig, Weights]) -> None:
    error = refuse(expert[0].parent, expert[1])
    assert "root of a pipeline" in error.message and "transformer_2/ (low expert)" in str(error.fix)


def test_missing_empty_and_foreign_folders(tmp_path: Path, expert: tuple[Path, WanConfig, Weights]) -> None:
    config = expert[1]
    assert "--from-scratch" in str(refuse(tmp_path / "absent", config).fix)
    (tmp_path / "empty").mkdir()
    assert "empty" in refuse(tmp_path / "empty", config).message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("x")
    assert "readme.md" in refuse(tmp_path / "notes", config).message


def test_wrong_expert_by_folder_name_and_by_card(tmp_path: Path, expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    assert "high-noise expert" in refuse(folder, config, expert="low").message
    check_expert(find(folder), "high")
    root = dcp_root(tmp_path / "dcp", weights)
    (root / "release" / "wan.json").write_text(json.dumps({"expert": "low"}))
    assert "low-noise expert" in refuse(root, config, expert="high").message


def test_wrong_task_is_named(expert: tuple[Path, WanConfig, Weights]) -> None:
    error = refuse(expert[0], expert[1].with_changes(in_channels=36))
    assert "T2V weights (16 input channels)" in error.message and "I2V" in error.message


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path,
                                                         expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    error = refuse(folder, config.with_changes(num_layers=3))
    assert "27 missing: blocks.2.modulation" in error.message
    assert error.message.count("blocks.2.") == 10
    changed = {**weights, "extra.weight": torch.zeros(1), "head.head.bias": torch.zeros(3)}
    error = refuse(dcp_root(tmp_path / "dcp", changed), config)
    assert "1 unknown: extra.weight" in error.message
    assert "head.head.bias is [3], the model needs [64]" in error.message


def test_torn_tracker_lfs_pointer_and_truncation(tmp_path: Path, expert: tuple[Path, WanConfig, Weights]) -> None:
    folder, config, weights = expert
    root = dcp_root(tmp_path / "dcp", weights)
    (root / "latest_checkpointed_iteration.txt").write_text("")
    assert "tracker" in refuse(root, config).message
    shutil.copytree(folder, tmp_path / "lfs")
    file = next((tmp_path / "lfs").glob("*.safetensors"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git-lfs pointer" in refuse(tmp_path / "lfs", config).message
    shutil.copytree(folder, tmp_path / "cut")
    file = next((tmp_path / "cut").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refuse(tmp_path / "cut", config).message


def test_missing_ranks_are_refused(tmp_path: Path, expert: tuple[Path, WanConfig, Weights]) -> None:
    _, config, weights = expert
    root = mp_rank_root(tmp_path / "tp", weights, config, 2)
    shutil.rmtree(root / "release" / "mp_rank_00")
    assert "one is missing" in refuse(root, config).message


def test_videox_folders_hold_the_other_expert(tmp_path: Path) -> None:
    for name, expert in (("transformer", "low"), ("transformer_2", "high"), ("high_noise_model", "high")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "Wan2_2Transformer3DModel"}')
        (folder / "x.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        assert find(folder).expert == expert
