"""The verbs of ``mindspeed-wan lora`` end to end on files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_wan.cli import lora as cli
from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import CheckpointError, ConfigError, ResourceError
from mindspeed_wan.lora.formats import FORMATS, read_lora, write_lora
from tests.unit.lora.cases import TINY, random_lora, same
from tests.unit.lora.test_merge import expert, merged_by_hand, random_weights


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return expert(tmp_path / "base", random_weights())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_lora(random_lora(), tmp_path / "style_high_noise.safetensors", TINY, "kohya")


def test_help_knows_every_format() -> None:
    assert set(cli.FORMAT_NAMES) == set(FORMATS)


def test_inspect(base: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", file, "--model", base, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["modules"], facts["ranks"], facts["alphas"]) == ("kohya", 20, [4], [8.0])
    assert facts["expert"] == "high"
    assert facts["kinds"]["blocks.*.ffn.0"] == 2
    assert run("inspect", file, "--model", base) == 0
    assert "blocks.*.self_attn.proj_q" in capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_convert(base: Path, file: Path, tmp_path: Path, name: str) -> None:
    assert run("convert", file, "--model", base, "--to", name, "--out", tmp_path / "converted") == 0
    converted = read_lora(tmp_path / "converted", TINY) if name == "peft" else None
    if converted is None:
        (tmp_path / "converted").rename(tmp_path / "converted.safetensors")
        converted = read_lora(tmp_path / "converted.safetensors", TINY)
    assert same(converted, random_lora())


def test_convert_dtype_and_alpha(base: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("convert", file, "--model", base, "--out", out, "--dtype", "bf16", "--alpha-override", 2)
    lora = read_lora(out, TINY)
    adapter = lora.adapters["blocks.0.ffn.0"]
    assert (adapter.up.dtype, adapter.alpha) == (torch.bfloat16, 2.0)


def test_merge(base: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "--base", base, "--lora", f"{file}=0.5", "--lora", file, "--out", tmp_path / "out") == 0
    merged = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    expected = merged_by_hand(random_weights(), [(random_lora(), 1.5)])
    assert torch.allclose(merged["blocks.1.ffn.net.2.weight"].double(), expected["blocks.1.ffn.2.weight"], atol=1e-6)
    assert "merged 20 parameters" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not a number"):
        run("merge", "--base", base, "--lora", f"{file}=strong", "--out", tmp_path / "out2")


def test_extract_and_resize(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = random_lora(rank=3, alpha=3.0)
    tuned = {name: tensor.float() for name, tensor in merged_by_hand(random_weights(), [(lora, 1.0)]).items()}
    out, smaller = tmp_path / "out.safetensors", tmp_path / "smaller.safetensors"
    run("extract", "--base", base, "--tuned", expert(tmp_path / "tuned", tuned), "--rank", 3, "--out", out)
    assert torch.allclose(read_lora(out, TINY).adapters["blocks.0.ffn.0"].delta(),
                          lora.adapters["blocks.0.ffn.0"].delta(), atol=1e-6)
    run("resize", out, "--model", base, "--rank", 2, "--out", smaller, "--to", "comfy")
    assert read_lora(smaller, TINY).ranks == [2]
    capsys.readouterr()
    run("extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", 1000, "--out", out)
    assert "rank [48]," in capsys.readouterr().out and read_lora(out, TINY).ranks == [48]  # that of the matrices


def test_verify(base: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    options = ("verify", file, "--model", base, "--device", "cpu", "--report", report)
    assert run(*options, "--base", base, "--weight", 0.55) == 0
    written = json.loads(report.read_text())
    assert written["passed"]
    assert written["merge"]["base"] == "expert"
    assert "forward" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="for the high-noise expert"):
        run(*options, "--expert", "low")
    assert not json.loads(report.read_text())["passed"]


def test_values_that_are_no_numbers(base: Path, file: Path, tmp_path: Path) -> None:
    for command in (["verify", str(file), "--model", str(base), "--weight", "nan"],
                    ["merge", "--base", str(base), "--lora", f"{file}=inf", "--out", str(tmp_path / "out")]):
        with pytest.raises(ConfigError, match="is not a number"):
            dispatch(["lora", *command])
    with pytest.raises(ConfigError, match="is not positive"):
        dispatch(["lora", "verify", str(file), "--model", str(base), "--alpha-override", "-1"])
    for verb in (["resize", str(file), "--model", str(base)], ["extract", "--base", str(base), "--tuned", str(base)]):
        with pytest.raises(ConfigError, match="lora rank 0"):
            dispatch(["lora", *verb, "--rank", "0", "--out", str(tmp_path / "x.safetensors")])
    with pytest.raises(ResourceError):
        dispatch(["lora", "verify", str(file), "--model", str(base), "--report", str(tmp_path)])


def test_unmatched_keys(tmp_path: Path, base: Path) -> None:
    file = write_lora(random_lora(TINY.with_changes(num_layers=3)), tmp_path / "x.safetensors",
                      TINY.with_changes(num_layers=3), "kohya")
    with pytest.raises(CheckpointError, match="--allow-unmatched"):
        run("inspect", file, "--model", base)
    assert run("inspect", file, "--model", base, "--allow-unmatched") == 0
