"""``lora_hf_to_mm`` and ``merge_lora_to_base``: names, sums in fp64, every base format, ranks that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.checkpoint.sources import find, open_weights
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.lora.formats import LoraFile, read_lora, write_lora
from mindspeed_wan_converters.cli import run
from tests.converters.tiny_weights import CONFIGS, random_state, write_expert
from tests.unit.lora.cases import random_lora, same

CONFIG = CONFIGS["t2v"]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_expert(tmp_path / "base", "t2v", random_state("t2v", "fp32"))


@pytest.fixture
def lora() -> LoraFile:
    return random_lora(CONFIG, rank=4, alpha=2.0)


def test_lora_hf_to_mm(hf: Path, lora: LoraFile, tmp_path: Path) -> None:
    source = write_lora(lora, tmp_path / "kohya.safetensors", CONFIG, "kohya")
    assert run(["WanConverter", "lora_hf_to_mm", "--cfg.source_path", str(source), "--cfg.target_path",
                str(tmp_path / "out"), "--cfg.hf_dir", str(hf)]) == 0
    found = read_lora(tmp_path / "out", CONFIG)
    assert found.format == "mm" and same(found, lora)


@pytest.mark.parametrize("kind", ["hf", "mm", "dcp"])
def test_merge_lora_to_base(kind: str, hf: Path, lora: LoraFile, tmp_path: Path) -> None:
    base, target = hf, tmp_path / "merged"
    if kind != "hf":
        base = tmp_path / kind
        assert run([f"hf_to_{kind}", str(hf), str(base), "--quiet"]) == 0
    adapter = write_lora(lora, tmp_path / "adapter.safetensors", CONFIG, "mm")
    assert run(["merge_lora_to_base", str(base), str(target), "--cfg.lora_path", str(adapter), "--cfg.hf_dir", str(hf),
                "--lora_rank", "4", "--lora_alpha", "2", "--use_npu", "false"]) == 0
    with open_weights(find(hf), CONFIG) as before, open_weights(find(target), CONFIG) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name in before.tensors:
            old, new = before.read(name), after.read(name)
            adapted = lora.adapters.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if adapted is None:
                assert torch.equal(old, new), name
            else:
                wanted = old.double() + 0.5 * adapted.up.double() @ adapted.down.double()
                torch.testing.assert_close(new.double(), wanted, rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob(".*.merged"))


def test_another_rank_is_refused(hf: Path, lora: LoraFile, tmp_path: Path) -> None:
    adapter = write_lora(lora, tmp_path / "adapter.safetensors", CONFIG, "mm")
    with pytest.raises(ConfigError, match="the adapter's rank is 4"):
        run(["merge_lora_to_base", str(hf), str(tmp_path / "out"), "--cfg.lora_path", str(adapter), "--lora_rank", "8"])
