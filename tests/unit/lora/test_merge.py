"""Merging: fp32 arithmetic, what bf16 keeps, streamed files against a merge in memory, extraction and resizing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mindspeed_wan.checkpoint.lock import locked_target
from mindspeed_wan.errors import CheckpointError, ConfigError
from mindspeed_wan.lora import merge as merging
from mindspeed_wan.lora.apply import load_adapter
from mindspeed_wan.lora.formats import Adapter, LoraFile, write_lora
from mindspeed_wan.lora.merge import MergeLoss, summary
from mindspeed_wan.lora.merge_files import merge_files
from mindspeed_wan.lora.merge_model import merge_into_model
from mindspeed_wan.lora.model_config import config_of
from mindspeed_wan.lora.svd import approximate, extract, resize
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import Layout, parameter_table
from tests.unit.lora.cases import TINY, random_lora

ALL = ("all-linear",)


def random_weights(seed: int = 0, dtype: torch.dtype = torch.float32, config: WanConfig = TINY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p.mm: (torch.randn(p.shape, generator=generator) * 0.05).to(dtype) for p in parameter_table(config)}


def expert(folder: Path, weights: dict[str, Tensor], layout: Layout = "hf", config: WanConfig = TINY) -> Path:
    folder.mkdir(parents=True)
    names = {p.mm: p.name(layout) for p in parameter_table(config)}
    save_file({names[mm]: tensor for mm, tensor in weights.items()}, folder / "weights.safetensors")
    card = config.to_diffusers() if layout == "hf" else config.to_original()
    (folder / "config.json").write_text(json.dumps(card))
    return folder


def merged_by_hand(weights: dict[str, Tensor], loras: list[tuple[LoraFile, float]]) -> dict[str, Tensor]:
    result = {name: tensor.double() for name, tensor in weights.items()}
    for lora, weight in loras:
        for mm, adapter in lora.adapters.items():
            scale = weight * adapter.alpha / adapter.rank
            result[f"{mm}.weight"] += scale * adapter.up.double() @ adapter.down.double()
        for name, diff in lora.diffs.items():
            result[name] += weight * diff.double()
    return result


@pytest.fixture
def loras() -> list[tuple[LoraFile, float]]:
    return [(random_lora(diffs=True, targets=ALL), 0.55), (random_lora(seed=1, rank=2, alpha=2.0), -0.3)]


@pytest.fixture(params=[None, 1000], ids=["one-chunk", "many-chunks"])
def chunks(request, monkeypatch) -> None:
    if request.param:
        monkeypatch.setattr(merging, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunks")
def test_merge_into_a_model(loras) -> None:
    weights = random_weights()
    model = WanDiT(TINY)
    model.load_state_dict(weights)
    report = merge_into_model(model, loras)
    expected = merged_by_hand(weights, loras)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], rtol=0, atol=1e-7), name
    assert report.total.relative_error < 1e-6
    assert report.total.kept == pytest.approx(1.0, abs=1e-6)
    assert set(report.losses) == set(merging.touched_parameters(loras))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("source", ["hf", "original"])
@pytest.mark.parametrize("target", ["hf", "original"])
def test_merge_of_files(tmp_path: Path, loras, source: Layout, target: Layout) -> None:
    weights = random_weights()
    base = expert(tmp_path / "base", weights, source)
    done = merge_files(base, loras, tmp_path / "out", TINY, layout=target, shard_bytes=60_000)
    assert len(done.shards) > 3
    index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
    merged: dict[str, Tensor] = {}
    for shard in done.shards:
        part = load_file(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        merged.update(part)
    expected = merged_by_hand(weights, loras)
    assert len(merged) == len(expected)
    for param in parameter_table(TINY):
        assert torch.allclose(merged[param.name(target)].double(), expected[param.mm], rtol=0, atol=1e-7)
    assert config_of(tmp_path / "out") == TINY
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_one_shard_and_dtype(tmp_path: Path, loras) -> None:
    weights = random_weights(dtype=torch.bfloat16)
    base = expert(tmp_path / "base", weights)
    kept = merge_files(base, loras, tmp_path / "keep", TINY)
    wide = merge_files(base, loras, tmp_path / "wide", TINY, dtype=torch.float32)
    assert kept.shards == ["diffusion_pytorch_model.safetensors"]
    assert {t.dtype for t in load_file(tmp_path / "keep" / kept.shards[0]).values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "wide" / wide.shards[0]).values()} == {torch.float32}
    assert wide.report.total.relative_error < 1e-5
    assert kept.report.total.relative_error > 1e-3


def test_merge_equals_runtime_adapter(tmp_path: Path, loras) -> None:
    weights = random_weights()
    merge_files(expert(tmp_path / "base", weights), loras, tmp_path / "out", TINY)
    state = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    merged, runtime = WanDiT(TINY), WanDiT(TINY)
    merged.load_state_dict({p.mm: state[p.hf] for p in parameter_table(TINY)})
    runtime.load_state_dict(weights)
    load_adapter(runtime, loras[0][0], "one", weight=loras[0][1])
    load_adapter(runtime, loras[1][0], "two", weight=loras[1][1])
    generator = torch.Generator().manual_seed(5)
    inputs = (torch.randn(1, 16, 2, 4, 6, generator=generator), torch.tensor([500.0]),
              torch.randn(1, 7, TINY.text_dim, generator=generator))
    with torch.no_grad():
        a, b = merged(*inputs), runtime(*inputs)
    assert float((a - b).norm() / b.norm()) < 1e-5


def test_published_statistics_of_a_bf16_merge() -> None:
    """With the reward LoRAs' statistics and base std 0.02, about 66 % of a bf16 weight does not move, 0.73 is kept."""
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(torch.randn(128, 1024, generator=generator) * 0.008388,
                      torch.randn(1024, 128, generator=generator) * 0.001245, 64.0)
    base = (torch.randn(1024, 1024, generator=generator) * 0.02).bfloat16()
    delta = adapter.delta(0.55)
    loss = MergeLoss()
    loss.add(delta, base, (base.float() + delta).bfloat16())
    assert loss.unchanged == pytest.approx(0.66, abs=0.02)
    assert loss.kept == pytest.approx(0.73, abs=0.03)
    assert loss.relative_error == pytest.approx(0.68, abs=0.03)
    report = merging.MergeReport({"w": loss})
    assert "keep the adapter unmerged" in summary(report, torch.bfloat16)
    assert merging.worst(report.losses)[0][0] == "w"


def test_bad_merges(tmp_path: Path, loras) -> None:
    base = expert(tmp_path / "base", random_weights())
    with pytest.raises(ConfigError, match="is the base itself"):
        merge_files(base, loras, base, TINY)
    with locked_target(tmp_path / "out"), pytest.raises(ConfigError, match="another process writes this target"):
        merge_files(base, loras, tmp_path / "out", TINY)
    with pytest.raises(ConfigError, match="cannot be written here"):
        merge_files(base, loras, tmp_path / "out", TINY, layout="mm")
    with pytest.raises(CheckpointError, match="I2V"):
        merge_files(base, loras, tmp_path / "out", TINY.with_changes(in_channels=36))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_leaves_the_old_target(tmp_path: Path, loras) -> None:
    base = expert(tmp_path / "base", random_weights())
    merge_files(base, loras, tmp_path / "out", TINY)
    before = (tmp_path / "out/diffusion_pytorch_model.safetensors").read_bytes()

    def interrupt(name: str, index: int, total: int) -> None:
        if index == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, loras[:1], tmp_path / "out", TINY, on_parameter=interrupt)
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").read_bytes() == before


MEMORY_CHECK = """
import sys
from pathlib import Path
import torch
from mindspeed_wan.lora.formats import read_lora
from mindspeed_wan.lora.merge_files import merge_files
from mindspeed_wan.lora.model_config import config_of
base, lora, out = map(Path, sys.argv[1:])
config = config_of(base)
def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0])
start, peak = anonymous(), [0]
file = read_lora(lora, config)
merge_files(base, [(file, 1.0)], out, config, on_parameter=lambda *_: peak.append(anonymous()))
print((max(peak) - start) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """An expert of 330 MB is merged within 120 MiB of anonymous memory."""
    config = WanConfig(num_layers=5, dim=1024, ffn_dim=4096, num_heads=8, text_dim=512, freq_dim=64)
    base = tmp_path / "base"
    expert(base, {p.mm: torch.zeros(p.shape) for p in parameter_table(config)}, config=config)
    write_lora(random_lora(config, rank=8), tmp_path / "lora.safetensors", config, "kohya")
    command = [sys.executable, "-c", MEMORY_CHECK, str(base), str(tmp_path / "lora.safetensors"), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) >> 20
    assert size > 300
    assert int(done.stdout) < 120


# ---- decompositions ---------------------------------------------------------------------------------------------


def test_extraction_finds_a_low_rank_change(tmp_path: Path) -> None:
    weights, lora = random_weights(), random_lora(rank=3, alpha=6.0, diffs=True)
    changed = {name: tensor.float() for name, tensor in merged_by_hand(weights, [(lora, 1.0)]).items()}
    base, tuned = expert(tmp_path / "base", weights), expert(tmp_path / "tuned", changed)
    found = extract(base, tuned, TINY, rank=3, with_diffs=True)
    assert list(found.lora.adapters) == list(lora.adapters)
    for mm, adapter in lora.adapters.items():
        assert torch.allclose(found.lora.adapters[mm].delta(), adapter.delta(), atol=1e-6)
        assert found.energy[mm] == pytest.approx(1.0, abs=1e-5)
    assert set(found.lora.diffs) == set(lora.diffs)
    smaller = extract(base, tuned, TINY, rank=1, targets=("q",))
    assert len(smaller.lora.adapters) == 4
    assert all(0.3 < share < 0.99 for share in smaller.energy.values())
    with pytest.raises(CheckpointError, match="the same weights"):
        extract(base, base, TINY, rank=2)


def test_large_matrices_use_the_randomised_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(700, 5, generator=generator), torch.randn(5, 600, generator=generator)
    adapter, energy = approximate(u @ v, rank=5)
    assert torch.allclose(adapter.delta(), u @ v, atol=1e-3)
    assert energy == pytest.approx(1.0, abs=1e-5)
    again, _ = approximate(u @ v, rank=5)
    assert torch.equal(adapter.up, again.up)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_resizing(rank: int) -> None:
    lora = random_lora(rank=4, alpha=6.0)
    done = resize(lora, rank)
    for mm, adapter in lora.adapters.items():
        resized = done.lora.adapters[mm]
        assert (resized.rank, resized.scale) == (rank, 1.0)
        u, s, vt = torch.linalg.svd(adapter.delta().double(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert torch.allclose(resized.delta().double(), best, atol=1e-6)
        assert done.energy[mm] == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-6)


def test_a_rank_above_the_matrix_is_resized(tmp_path: Path) -> None:
    lora = random_lora(targets=("q",), rank=60)  # of a matrix of 48 x 48
    for rank in (52, 64, 8):
        resized = resize(lora, rank).lora.adapters["blocks.0.self_attn.proj_q"]
        u, s, vt = torch.linalg.svd(lora.adapters["blocks.0.self_attn.proj_q"].delta().double())
        assert resized.rank == rank
        assert torch.allclose(resized.delta().double(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    lora = random_lora()
    lora.adapters["blocks.1.ffn.0"].up[3, 1] = value
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0 holds values that are not finite"):
        resize(lora, 2)
    weights = random_weights()
    changed = {**weights, "blocks.1.ffn.0.weight": torch.full_like(weights["blocks.1.ffn.0.weight"], value)}
    base, tuned = expert(tmp_path / "base", weights), expert(tmp_path / "tuned", changed)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.weight holds values that are not finite"):
        extract(base, tuned, TINY, rank=2)


def test_resize_keeps_dtype_and_refuses_nothing_ranks() -> None:
    assert resize(random_lora(dtype=torch.bfloat16), 2).lora.adapters["blocks.0.ffn.0"].up.dtype == torch.bfloat16
    with pytest.raises(ConfigError):
        resize(random_lora(), 0)


@pytest.mark.parametrize("name", ["t2v-A14B", "inp-A14B"])
def test_config_of_presets(name: str) -> None:
    assert config_of(name) == PRESETS[name]


def test_config_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 't2v-"):
        config_of("t2v-a14b")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not say which model"):
        config_of(tmp_path)
