"""Folders of others load here, and ours load there: MindSpeed-MM's file tree, torch's own DCP, Diffusers."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mindspeed_wan_converters import torch_zip
from mindspeed_wan_converters.cli import run
from tests.converters.tiny_weights import (
    assert_same,
    mm_name,
    mm_tree,
    random_state,
    read_expert,
    write_expert,
    write_mm,
    write_pipeline,
)

OURS = {"wan.json", "manifest.json"}


def convert(verb: str, source: Path, target: Path, *options: str) -> Path:
    assert run([verb, str(source), str(target), "--quiet", *options]) == 0
    return target


@pytest.mark.parametrize("pp_layers", [[4], [2, 2], [1, 2, 1]])
@pytest.mark.parametrize("task", ["t2v", "i2v-2.1"])
def test_a_folder_written_by_mindspeed_mm_loads(tmp_path: Path, task: str, pp_layers: list[int]) -> None:
    state = random_state(task, "bf16")
    mm = write_mm(tmp_path / "mm", state, pp_layers)
    hf_dir = write_expert(tmp_path / "hf", task, state)
    back = convert("mm_to_hf", mm, tmp_path / "back", "--cfg.hf_dir", str(hf_dir))
    assert_same(read_expert(back), state)


@pytest.mark.parametrize("pp_layers", [[4], [2, 2], [1, 2, 1]])
def test_a_folder_of_ours_has_mindspeed_mms_tree_and_keys(tmp_path: Path, pp_layers: list[int]) -> None:
    state = random_state("i2v", "bf16")
    theirs = write_mm(tmp_path / "theirs", state, pp_layers)
    ours = convert("hf_to_mm", write_expert(tmp_path / "hf", "i2v", state), tmp_path / "ours",
                   "--cfg.target_parallel_config.pp_layers", str(pp_layers))

    def tree(root: Path) -> set[str]:
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.name not in OURS}

    assert tree(ours) == tree(theirs)
    assert (ours / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    for file, part in zip(sorted(ours.rglob("*.pt")), mm_tree(state, pp_layers), strict=True):
        loaded = torch.load(file, weights_only=True)
        assert set(loaded) == {"model"}
        assert_same(loaded["model"], part)


def test_virtual_stages_hold_model0_model1_and_a_version(tmp_path: Path) -> None:
    state = random_state("t2v", "fp32")
    ours = convert("hf_to_mm", write_expert(tmp_path / "hf", "t2v", state), tmp_path / "ours",
                   "--cfg.target_parallel_config.pp_layers", "[[1,1],[1,1]]")
    files = sorted(ours.rglob("*.pt"))
    assert [f.parent.name for f in files] == ["mp_rank_00_000", "mp_rank_00_001"]
    parts = mm_tree(state, [1, 1, 1, 1])
    for stage, file in enumerate(files):
        loaded = torch.load(file, weights_only=True)
        assert set(loaded) == {"model0", "model1", "checkpoint_version"} and loaded["checkpoint_version"] == 3.0
        for virtual in range(2):
            assert_same(loaded[f"model{virtual}"], parts[2 * virtual + stage])


def test_files_beyond_four_gigabytes_use_the_zip64_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "_ZIP64_FROM", 5000)
    state = random_state("t2v", "bf16")
    mm = convert("hf_to_mm", write_expert(tmp_path / "hf", "t2v", state), tmp_path / "mm")
    file = mm / "release/mp_rank_00/model_optim_rng.pt"
    assert zipfile.ZipFile(file).testzip() is None and b"PK\x06\x06" in file.read_bytes()
    for mmap in (False, True):
        assert_same(torch.load(file, weights_only=True, mmap=mmap)["model"], mm_tree(state, [4])[0])
    assert_same(read_expert(convert("mm_to_hf", mm, tmp_path / "back")), state)


def test_mm_training_files_with_args_and_optimizer_state_load(tmp_path: Path) -> None:
    state = random_state("t2v", "bf16")
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    folder = tmp_path / "mm" / "iter_0000012" / "mp_rank_00"
    folder.mkdir(parents=True)
    model = {mm_name(name): value for name, value in state.items()}
    torch.save({"args": argparse.Namespace(lr=1e-5, params_dtype=torch.bfloat16), "iteration": 12, "model": model,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-5}]},
                "rng_state": [{"torch_rng_state": torch.zeros(16, dtype=torch.uint8)}]},
               folder / "model_optim_rng.pt")
    (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("12\n")
    back = convert("mm_to_hf", tmp_path / "mm", tmp_path / "back", "--cfg.hf_dir", str(hf_dir))
    assert_same(read_expert(back), state)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_dcp_load_reads_ours(tmp_path: Path) -> None:
    state = random_state("t2v", "bf16")
    ours = convert("hf_to_dcp", write_expert(tmp_path / "hf", "t2v", state), tmp_path / "dcp",
                   "--max-shard-size", "30KB") / "release"
    assert len(list(ours.glob("*.distcp"))) > 1
    model = {mm_name(name): torch.full_like(value, torch.nan) for name, value in state.items()}
    loaded = {"model": model, "checkpoint_version": 0.0}
    dcp.load(loaded, checkpoint_id=ours)
    assert loaded["checkpoint_version"] == 3.0
    assert_same(model, {mm_name(name): value for name, value in state.items()})
    theirs = tmp_path / "theirs"
    dcp.save({"model": model, "checkpoint_version": 3.0}, checkpoint_id=theirs)
    keys = [set(dcp.FileSystemReader(str(f)).read_metadata().state_dict_metadata) for f in (ours, theirs)]
    assert keys[0] == keys[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_model_weights_come_out_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = random_state("t2v", "fp32")
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    model = {mm_name(name): value for name, value in state.items()}
    noise = {name: torch.randn_like(value) for name, value in model.items()}
    dcp.save({"model": model, "optimizer": {"state": {n: {"exp_avg": v} for n, v in noise.items()}},
              "ema": noise, "args": argparse.Namespace(lr=1.0), "iteration": 3},
             checkpoint_id=tmp_path / "run" / "iter_0000003")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    back = convert("dcp_to_hf", tmp_path / "run", tmp_path / "back", "--cfg.hf_dir", str(hf_dir))
    assert_same(read_expert(back), state)
    again = convert("merge_dcp_to_hf", tmp_path / "run" / "iter_0000003", tmp_path / "again",
                    "--cfg.hf_dir", str(hf_dir))
    assert_same(read_expert(again), state)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bare_state_dicts_saved_by_torch_load_in_any_naming(tmp_path: Path) -> None:
    state = random_state("t2v", "fp32")
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    for name, tensors in (("hf-names", state), ("mm-names", {mm_name(n): v for n, v in state.items()})):
        dcp.save(tensors, checkpoint_id=tmp_path / name)
        back = convert("dcp_to_hf", tmp_path / name, tmp_path / f"{name}-back", "--cfg.hf_dir", str(hf_dir))
        assert_same(read_expert(back), state)


def test_diffusers_loads_what_is_written(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    state = random_state("i2v-2.1", "fp32")
    hf = write_expert(tmp_path / "hf", "i2v-2.1", state)
    mm = convert("hf_to_mm", hf, tmp_path / "mm", "--cfg.target_parallel_config.tp_size", "2")
    back = convert("mm_to_hf", mm, tmp_path / "back", "--max-shard-size", "30KB")
    index = json.loads((back / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in back.glob("*.safetensors")}
    model, info = WanTransformer3DModel.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same(dict(model.state_dict()), state)


def test_diffusers_opens_an_exported_pipeline(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    from tests.helpers.tiny import tiny_pipeline_folder

    root = tiny_pipeline_folder()
    exported = convert("dcp_to_hf", convert("hf_to_dcp", root, tmp_path / "dcp"), tmp_path / "out",
                       "--cfg.hf_dir", str(root))
    pipeline = WanPipeline.from_pretrained(exported)
    for name in ("transformer", "transformer_2"):
        assert_same(dict(getattr(pipeline, name).state_dict()), read_expert(root / name))


def test_a_hub_cache_with_links_is_read(tmp_path: Path) -> None:
    state = random_state("t2v", "fp32")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "transformer"
    real = write_expert(tmp_path / "real", "t2v", state, shards=2)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(real.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../../blobs") / str(i))
    original = convert("hf_to_original", snapshot, tmp_path / "out")
    assert_same(read_expert(convert("original_to_hf", original, tmp_path / "back")), state)


def test_pipelines_of_one_model_keep_their_folder_name(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "root")
    (root / "transformer_2").rename(tmp_path / "gone")
    index = json.loads((root / "model_index.json").read_text())
    index["transformer_2"] = [None, None]
    (root / "model_index.json").write_text(json.dumps(index))
    dcp_folder = convert("hf_to_dcp", root, tmp_path / "dcp")
    assert json.loads((dcp_folder / "release" / "wan.json").read_text())["expert"] is None
    back = convert("dcp_to_hf", dcp_folder, tmp_path / "back", "--cfg.hf_dir", str(root))
    assert_same(read_expert(back / "transformer"), read_expert(root / "transformer"))
