"""Bit-exact round trips over the whole product of formats, tasks, precisions and parallel layouts."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan_converters.cli import run
from tests.converters.tiny_weights import (
    CONFIGS,
    DTYPES,
    assert_same,
    mm_name,
    random_state,
    read_expert,
    write_expert,
    write_pipeline,
)

PIPELINES = {"PP1": "[]", "PP2": "[3,1]", "VPP2": "[[1,1],[1,1]]"}


def convert(verb: str, source: Path, target: Path, *options: str) -> Path:
    assert run([verb, str(source), str(target), "--quiet", *options]) == 0
    return target


def layout(tp: int, pipeline: str) -> list[str]:
    return ["--cfg.target_parallel_config.tp_size", str(tp), "--cfg.target_parallel_config.pp_layers",
            PIPELINES[pipeline]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("task", list(CONFIGS))
def test_every_format_and_layout_gives_back_the_same_bits(tmp_path: Path, task: str, dtype: str) -> None:
    state = random_state(task, dtype)
    hf = write_expert(tmp_path / "hf", task, state, shards=3)
    original = convert("hf_to_original", hf, tmp_path / "original", "--max-shard-size", "60KB")
    dcp = convert("hf_to_dcp", hf, tmp_path / "dcp", "--max-shard-size", "40KB")
    assert_same(read_expert(convert("original_to_hf", original, tmp_path / "from_original")), state)
    assert_same(read_expert(convert("dcp_to_hf", dcp, tmp_path / "from_dcp")), state)
    assert_same(read_expert(convert("dcp_to_hf", convert("original_to_dcp", original, tmp_path / "od"),
                                    tmp_path / "odh")), state)
    previous: Path | None = None
    for tp in (1, 2, 4):
        for pipeline in PIPELINES:
            name = f"tp{tp}{pipeline}"
            sources = {"hf_to_mm": hf, "original_to_mm": original, "dcp_to_mm": dcp}
            verb = list(sources)[(tp + len(pipeline)) % 3]
            mm = convert(verb, sources[verb], tmp_path / name, *layout(tp, pipeline))
            assert_same(read_expert(convert("mm_to_hf", mm, tmp_path / f"{name}-hf")), state)
            back = convert("mm_to_dcp", mm, tmp_path / f"{name}-dcp")
            assert_same(read_expert(convert("dcp_to_original", back, tmp_path / f"{name}-o")),
                        read_expert(original))
            if previous is not None:
                split = convert("resplit", previous, tmp_path / f"{name}-re", *layout(tp, pipeline))
                for file in sorted(mm.rglob("*.pt")):
                    assert file.read_bytes() == (split / file.relative_to(mm)).read_bytes()
            previous = mm


@pytest.mark.parametrize(("source", "target"), [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "bf16")])
@pytest.mark.parametrize("verb", ["hf_to_original", "hf_to_mm"])
def test_dtype_rounds_as_torch_does(tmp_path: Path, source: str, target: str, verb: str) -> None:
    state = random_state("t2v", source)
    state["blocks.0.ffn.net.2.bias"][:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    if source == "fp32":
        state["blocks.0.ffn.net.2.bias"][6:9] = torch.tensor([1.00390625, 1.01171875, 3.3895e38 if target == "bf16"
                                                              else 65504.0])
    hf = write_expert(tmp_path / "hf", "t2v", state)
    out = convert(verb, hf, tmp_path / "out", "--dtype", target)
    found = read_expert(convert("mm_to_hf" if verb == "hf_to_mm" else "original_to_hf", out, tmp_path / "back"))
    for name, value in state.items():
        assert torch.equal(found[name], value.to(DTYPES[target])) or torch.isnan(value).any(), name
    odd = state["blocks.0.ffn.net.2.bias"].to(DTYPES[target])
    assert torch.equal(found["blocks.0.ffn.net.2.bias"].isnan(), odd.isnan())
    assert torch.equal(found["blocks.0.ffn.net.2.bias"].nan_to_num(), odd.nan_to_num())


def test_a_pipeline_folder_converts_both_experts_in_one_call(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "pipeline")
    dcp = convert("hf_to_dcp", root, tmp_path / "dcp")
    for name, expert in (("transformer", "high"), ("transformer_2", "low")):
        assert (dcp / name / "release" / ".metadata").is_file()
        assert (dcp / name / "latest_checkpointed_iteration.txt").read_text() == "release"
        card = json.loads((dcp / name / "release" / "wan.json").read_text())
        assert card["expert"] == expert and WanConfig.from_dict(card["config"]) == CONFIGS["t2v"]
    back = convert("dcp_to_hf", dcp, tmp_path / "back", "--cfg.hf_dir", str(root))
    for name in ("transformer", "transformer_2"):
        assert_same(read_expert(back / name), read_expert(root / name))
    assert (back / "vae").resolve() == root / "vae" and (back / "model_index.json").is_file()
    original = convert("hf_to_original", root, tmp_path / "original")
    assert {p.name for p in original.iterdir()} == {"high_noise_model", "low_noise_model"}
    assert run(["verify", str(original), str(dcp)]) == 0


def test_expert_picks_one_of_a_pipeline_and_becomes_the_target_itself(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "pipeline")
    low = convert("hf_to_dcp", root, tmp_path / "low", "--expert", "low")
    assert json.loads((low / "release" / "wan.json").read_text())["expert"] == "low"
    assert_same(read_expert(convert("dcp_to_hf", low, tmp_path / "back")), read_expert(root / "transformer_2"))


def test_exports_of_single_experts_make_up_a_pipeline(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "pipeline")
    dcp = convert("hf_to_dcp", root, tmp_path / "dcp")
    out = tmp_path / "out"
    convert("dcp_to_hf", dcp / "transformer", out / "transformer", "--cfg.hf_dir", str(root))
    assert (out / "transformer_2").is_symlink() and (out / "model_index.json").is_file()
    convert("dcp_to_hf", dcp / "transformer_2", out / "transformer_2", "--cfg.hf_dir", str(root))
    assert not (out / "transformer_2").is_symlink()
    assert_same(read_expert(out / "transformer_2"), read_expert(root / "transformer_2"))
    assert len(list((root / "transformer_2").iterdir())) == 2, "the link was replaced, not what it points at"
    alone = convert("dcp_to_hf", dcp / "transformer_2", tmp_path / "alone", "--cfg.hf_dir", str(root))
    assert_same(read_expert(alone / "transformer_2"), read_expert(root / "transformer_2"))
    assert (alone / "transformer").is_symlink()


def test_names_follow_mindspeed_mm_rules(tmp_path: Path) -> None:
    for task in CONFIGS:
        state = random_state(task, "fp32")
        mm = convert("hf_to_mm", write_expert(tmp_path / task, task, state), tmp_path / f"{task}-mm")
        model = torch.load(mm / "release/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        assert_same(model, {mm_name(name): value for name, value in state.items()})


def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tensor and checksum cross buffers, as they do in files of gigabytes."""
    from mindspeed_wan_converters import stream, writer

    monkeypatch.setattr(stream, "BLOCK", 4096)
    monkeypatch.setattr(writer, "BLOCK", 1024)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tensors_that_cross_many_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    small_buffers(monkeypatch)
    state = random_state("t2v", dtype)
    hf = write_expert(tmp_path / "hf", "t2v", state, shards=2)
    mm = convert("hf_to_mm", hf, tmp_path / "mm", *layout(4, "VPP2"))
    dcp = convert("mm_to_dcp", mm, tmp_path / "dcp", "--verify")
    assert_same(read_expert(convert("dcp_to_hf", dcp, tmp_path / "back", "--max-shard-size", "50KB")), state)
    assert run(["verify", str(dcp), str(hf)]) == 0
    for file in mm.rglob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None


@pytest.mark.parametrize("refuses", ["flag", "write"])
def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    """Some systems have no O_DIRECT, some file systems take the flag and refuse the write."""
    real, calls = os.pwrite, []

    def refuse_once(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "unaligned")
        return real(descriptor, data, offset)

    small_buffers(monkeypatch)
    if refuses == "flag":
        monkeypatch.delattr(os, "O_DIRECT")
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "pwrite", refuse_once)
    state = random_state("t2v", "bf16")
    dcp = convert("hf_to_dcp", write_expert(tmp_path / "hf", "t2v", state), tmp_path / "dcp", "--workers", "1")
    assert_same(read_expert(convert("dcp_to_hf", dcp, tmp_path / "back")), state)


def test_progress_tells_bytes_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindspeed_wan_converters.progress import Progress

    progress = Progress(4_000_000_000, label="converting")
    progress._start -= 10.0
    progress._shown -= 10.0
    progress.skip(1_000_000_000)
    progress.add(1_000_000_000)
    assert "converting 2.0 GB of 4.0 GB (50 %), 100.0 MB/s, 0 min 20 s left" in capsys.readouterr().err
    assert 10.0 <= progress.finish() < 20.0
