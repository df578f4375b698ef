"""``lora verify`` on the reward-LoRA stand-in: passes when whole, and names what is wrong with each damaged variant."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_wan.lora.formats import LoraFile, parse, write_lora
from mindspeed_wan.lora.verify import Expectation, Report, verify
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from tests.helpers.reward_lora import reward_lora
from tests.unit.lora.cases import random_lora

CONFIG = WanConfig(num_layers=3, dim=48, ffn_dim=96, num_heads=4, text_dim=32, text_len=16, freq_dim=16,
                   in_channels=36)
NAME = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors"
STEM = "lora_unet__blocks_1_self_attn_q"
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"
Tensors = dict[str, Tensor]


def whole() -> Tensors:
    return reward_lora(CONFIG, rank=8, alpha=4.0)


def save(tmp_path: Path, tensors: Tensors, name: str = NAME) -> Path:
    save_file(tensors, tmp_path / name, {"format": "pt"})
    return tmp_path / name


def problem(report: Report) -> str:
    assert not report.passed
    return " | ".join(check.detail for check in report.errors)


def test_the_whole_file_passes(tmp_path: Path) -> None:
    path = save(tmp_path, whole())
    report = verify(path, CONFIG, expect=Expectation(expert="high"))
    assert report.passed, problem(report)
    assert [check.name for check in report.checks] == ["file", "structure", "values", "device", "merge", "forward"]
    assert all(check.status == "ok" for check in report.checks)
    assert report.structure["modules"] == 3 * 8 + 6
    assert report.structure["tensors"] == len(whole())
    assert report.structure["values"] == sum(tensor.numel() for tensor in whole().values())
    assert (report.structure["ranks"], report.structure["alphas"], report.structure["expert"]) == ([8], [4.0], "high")
    assert report.merge["modules"] == 30
    assert report.merge["worst_relative_error"] < 1e-3
    assert report.forward_parity["relative_error"] < 1e-3
    assert report.statistics["up"]["std"] == pytest.approx(0.001245, rel=0.05)
    assert report.statistics["down"]["std"] == pytest.approx(0.008388, rel=0.05)
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is True
    assert len(written["file"]["sha256"]) == 64 and written["file"]["bytes"] == path.stat().st_size
    assert written["round_trip"] == {"tensors": 60, "changed": 0}
    assert len(written["merge"]["relative_errors"]) == 30
    assert written["structure"]["kinds"]["blocks.*.self_attn.proj_q"] == 3


def test_real_counts_on_the_meta_device() -> None:
    from mindspeed_wan.lora import verify as module

    lora = parse(reward_lora(PRESETS["inp-A14B"], device="meta"), {}, PRESETS["inp-A14B"])
    report = Report(NAME, "meta")
    module._check_structure(report, lora, PRESETS["inp-A14B"], Expectation("high", reward=True), NAME)
    assert report.passed, problem(report)
    assert (report.structure["modules"], report.structure["tensors"], report.structure["values"]) == (
        326, 978, 429_171_014)


def change(key: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[key] = function(tensors[key])

    return apply


def remove(*keys: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for key in keys:
            del tensors[key]

    return apply


def add(**entries: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key.replace("__dot__", "."): value for key, value in entries.items()})


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return apply


def drop_block(number: int) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if f"__blocks_{number}_" in key] and None


def with_value(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return apply


def every(ending: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for key in tensors:
            if key.endswith(ending):
                tensors[key] = function(tensors[key])

    return apply


MODULE = r"blocks\.1\.self_attn\.proj_q"
DAMAGED_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no A": (remove(DOWN), rf"{MODULE} has no down"),
    "no B": (remove(UP), rf"{MODULE} has no up"),
    "only alpha left": (remove(DOWN, UP), rf"{MODULE} has no down and no up"),
    "one alpha missing": (remove(ALPHA), r"alpha is stored for 29 modules but missing for 1"),
    "a module missing": (remove(DOWN, UP, ALPHA), rf"{MODULE} is missing"),
    "a block missing": (drop_block(2), "block 2 has no adapters"),
    "A of another rank": (change(DOWN, lambda t: t[:4].clone()), rf"{MODULE}: ranks of down .* differ"),
    "rank 0": (lambda t: (change(DOWN, lambda x: x[:0].clone())(t), change(UP, lambda x: x[:, :0].clone())(t)),
               "rank is 0"),
    "A and B swapped": (lambda t: t.update({DOWN: t[UP], UP: t[DOWN]}), MODULE),
    "B transposed": (change(UP, lambda t: t.T.contiguous()), MODULE),
    "another width": (every("lora_down.weight", lambda t: t[:, :-4].clone()), "made for a layer of"),
    "another model's height": (change(UP, lambda t: torch.cat([t, t])), rf"{MODULE}: made for a layer of 96 x 48"),
    "three dimensions": (change(DOWN, lambda t: t[..., None].expand(-1, -1, 2).contiguous()), "two dimensions"),
    "integer weights": (change(DOWN, lambda t: t.to(torch.int8)), "dtype torch.int8"),
    "fp8 weights": (change(DOWN, lambda t: t.to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn"),
    "A fp32, B bf16": (change(DOWN, lambda t: t.float()), "down is torch.float32, up is torch.bfloat16"),
    "alpha NaN": (change(ALPHA, lambda t: t * float("nan")), "alpha is nan"),
    "alpha infinite": (change(ALPHA, lambda t: t * float("inf")), "alpha is inf"),
    "alpha 0": (change(ALPHA, lambda t: t * 0), r"alpha is 0\.0"),
    "alpha negative": (change(ALPHA, lambda t: -t), r"alpha is -4\.0"),
    "alpha a vector": (change(ALPHA, lambda t: t.expand(3).contiguous()), "alpha has shape"),
    "NaN in A": (change(DOWN, with_value(7, float("nan"))), rf"{MODULE} down has NaN or Inf"),
    "Inf in B": (change(UP, with_value(0, float("inf"))), rf"{MODULE} up has NaN or Inf"),
    "one B zero": (change(UP, torch.zeros_like), rf"{MODULE} is all zero"),
    "one A zero": (change(DOWN, torch.zeros_like), rf"{MODULE} is all zero"),
    "every B zero": (every("lora_up.weight", torch.zeros_like), "every adapter is zero"),
    "a block too many": (rename("lora_unet__blocks_2_", "lora_unet__blocks_7_"), "match nothing in the model"),
    "a misspelt module": (rename(STEM, STEM + "q"), "3 keys match nothing"),
    "a text encoder's adapter": (add(lora_te_text_model__dot__alpha=torch.ones(())), "1 keys match nothing"),
    "a module twice": (add(**{f"lora_unet_blocks_1_self_attn_q__dot__{end}": torch.ones(8, 48).bfloat16()
                              for end in ("lora_down__dot__weight",)}), "a second time"),
    "a low-rank pair on a norm": (
        add(lora_unet__blocks_0_norm3__dot__lora_down__dot__weight=torch.ones(8, 48).bfloat16(),
            lora_unet__blocks_0_norm3__dot__lora_up__dot__weight=torch.ones(48, 8).bfloat16(),
            lora_unet__blocks_0_norm3__dot__alpha=torch.ones(())), "is not a linear layer"),
    "a difference of another shape": (add(lora_unet__blocks_0_norm3__dot__diff=torch.ones(7)), "the difference is"),
    "LoKr": (add(lora_unet__blocks_0_ffn_0__dot__lokr_w1=torch.ones(2, 2)), "LoKr"),
    "LoHa": (add(lora_unet__blocks_0_ffn_0__dot__hada_w1_a=torch.ones(2, 2)), "LoHa"),
    "DoRA": (add(lora_unet__blocks_0_ffn_0__dot__dora_scale=torch.ones(2)), "DoRA"),
    "two adapters": (
        add(blocks__dot__0__dot__ffn__dot__0__dot__lora_A__dot__one__dot__weight=torch.ones(8, 48).bfloat16(),
            blocks__dot__0__dot__ffn__dot__0__dot__lora_B__dot__two__dot__weight=torch.ones(96, 8).bfloat16()),
        "several adapters: one, two"),
    "a whole model instead": (
        lambda t: (t.clear(), t.update({"blocks.0.self_attn.q.weight": torch.ones(48, 48)})), "none of its 1 keys"),
}


@pytest.mark.parametrize("name", DAMAGED_TENSORS)
def test_damaged_tensors_are_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGED_TENSORS[name]
    tensors = whole()
    damage(tensors)
    report = verify(save(tmp_path, tensors), CONFIG, expect=Expectation(expert="high"))
    assert re.search(message, problem(report)), problem(report)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def doubled(raw: bytes) -> bytes:
    """The same header with its first tensor listed twice."""
    size = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + size].rstrip()
    first = text[text.index(b'"lora') : text.index(b"}", text.index(b'"lora')) + 1]
    return header(text[:-1] + b"," + first + b"}") + raw[8 + size :]


DAMAGED_BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "git-lfs pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 858\n", "git-lfs"),
    "web page": (lambda raw: b"<!DOCTYPE html><html>404</html>", "web page"),
    "empty": (lambda raw: b"", "empty"),
    "truncated": (lambda raw: raw[:-100], "truncated"),
    "cut in the header": (lambda raw: raw[:200], "truncated"),
    "bytes appended": (lambda raw: raw + b"\0" * 16, "too long"),
    "header not JSON": (lambda raw: header(b"{not json}") + raw[-64:], "damaged safetensors header"),
    "header length absurd": (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
    "a tensor listed twice": (doubled, "given twice"),
}


@pytest.mark.parametrize("name", DAMAGED_BYTES)
def test_damaged_bytes_are_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGED_BYTES[name]
    path = save(tmp_path, whole())
    path.write_bytes(damage(path.read_bytes()))
    assert message in problem(verify(path, CONFIG))


def test_there_are_thirty_damaged_variants() -> None:
    assert len(DAMAGED_TENSORS) + len(DAMAGED_BYTES) >= 30


def test_wrong_expert_hash_and_counts(tmp_path: Path) -> None:
    path = save(tmp_path, whole())
    assert "for the high-noise expert" in problem(verify(path, CONFIG, expect=Expectation(expert="low")))
    (nameless := path.with_name("style.safetensors")).write_bytes(path.read_bytes())
    report = verify(nameless, CONFIG, expect=Expectation(expert="low"))
    assert report.passed and any("neither its metadata nor its name" in check.detail for check in report.checks)
    assert "sha256 is" in problem(verify(path, CONFIG, expect=Expectation(sha256="0" * 64)))
    assert "modules is 30, the published reward LoRAs have 326" in problem(
        verify(path, CONFIG, expect=Expectation(reward=True)))
    assert "cannot be read" in problem(verify(tmp_path / "nothing.safetensors", CONFIG))


def test_a_file_for_another_model_is_named(tmp_path: Path) -> None:
    report = verify(save(tmp_path, whole()), CONFIG.with_changes(dim=96, num_heads=8))
    assert "it belongs to another Wan model" in problem(report)


def test_suspicious_files_pass_with_a_warning(tmp_path: Path) -> None:
    tensors = whole()
    tensors[UP] = tensors[UP] * 3000
    report = verify(save(tmp_path, tensors), CONFIG)
    assert report.passed
    assert [c.status for c in report.checks if c.name == "values"] == ["warning"]
    no_alpha = {key: tensor for key, tensor in whole().items() if not key.endswith(".alpha")}
    report = verify(save(tmp_path, no_alpha), CONFIG)
    assert report.passed
    assert "--alpha-override" in next(c.detail for c in report.checks if c.name == "structure")
    report = verify(save(tmp_path, no_alpha), CONFIG, expect=Expectation(alpha_override=4.0))
    assert next(c.status for c in report.checks if c.name == "structure") == "ok"


def test_differences_are_merged_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones on norms, whose weights are near 1, and zero ones as some producers write them, are no errors."""
    lora = random_lora(CONFIG, diffs=True)
    diffs = {name: diff * (1e-4 if "norm" in name else 1.0) for name, diff in lora.diffs.items()}
    diffs["patch_embedding.bias"] = torch.zeros(CONFIG.dim)
    path = write_lora(LoraFile(lora.adapters, diffs), tmp_path / "adapter.safetensors", CONFIG, "lightx2v")
    report = verify(path, CONFIG)
    assert report.passed, problem(report)
    assert report.merge["parameters"] == len(lora.adapters) + len(diffs)
    from mindspeed_wan.lora import verify as module

    exact = module.change_of_rows
    monkeypatch.setattr(module, "change_of_rows",
                        lambda name, *args: exact(name, *args) * (1.01 if name == "head.head.weight" else 1.0))
    assert "head.head: fp32 merge is off by 0.01" in problem(verify(path, CONFIG))


def test_the_report_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = save(tmp_path, whole())
    path.write_bytes(path.read_bytes()[:-100])
    report = verify(path, CONFIG)
    assert report.file["bytes"] == path.stat().st_size and len(report.file["sha256"]) == 64
    assert str(path) not in problem(report) and "fix:" not in problem(report)


def test_a_wrong_merge_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a device that multiplies imprecisely is caught by the merge, one that corrupts by parity."""
    from mindspeed_wan.lora import merge_model
    from mindspeed_wan.lora import verify as module

    exact = merge_model.change_of_rows
    path = save(tmp_path, whole())
    monkeypatch.setattr(module, "change_of_rows", lambda *args: exact(*args) * 1.01)
    assert "fp32 merge is off by 0.01" in problem(verify(path, CONFIG))
    monkeypatch.undo()
    monkeypatch.setattr(merge_model, "change_of_rows", lambda *args: exact(*args) * 1.01)
    assert "merged and unmerged differ" in problem(verify(path, CONFIG))
