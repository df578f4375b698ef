"""T18c: adapters and merged weights on a full disk: exported, converted, merged, and saved by a training run."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from mindspeed_wan.cli import lora as tool
from mindspeed_wan.lora.formats import FORMATS
from mindspeed_wan_converters.cli import run as convert
from tests.converters import test_safety as corpus
from tests.converters.tiny_weights import random_state, write_expert
from tests.faults.harness import Tally
from tests.faults.inputs import refusal
from tests.faults.runs import finish, saved, start
from tests.faults.saves import file_size_limit
from tests.helpers.reward_lora import reward_lora

LORA = ("--lora-r", "4", "--lora-alpha", "4", "--lora-target-modules", "attention", "--save-interval", "2")


def _tool(*words: str) -> int:
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return tool.run(parser.parse_args(words))


def full_disk_adapters(tally: Tally, count: int, folder: Path) -> None:
    """T18c: exit code 3, the old output is untouched, nothing half-written lies beside it."""
    base = write_expert(folder / "base", "t2v", random_state("t2v", "fp32", 1))
    tuned = write_expert(folder / "tuned", "t2v", random_state("t2v", "fp32", 2))
    adapters = [_adapter(folder / f"{number}.safetensors", base, number) for number in range(2)]
    jobs = _jobs(folder, base, tuned)
    for number in range(max(1, count - count // 8)):
        name, target, write = jobs[number % len(jobs)]
        if not target.exists():
            assert write(adapters[0]) == 0
        before = corpus.digest(target)
        largest = max(p.stat().st_size for p in ([target] if target.is_file() else target.rglob("*")) if p.is_file())
        with tally.case(f"{number} {name}"):
            with file_size_limit(random.Random(number).randrange(largest // 2)):
                refusal(lambda: write(adapters[1]), 3)  # noqa: B023
            assert corpus.digest(target) == before and corpus.leftovers(target) == []
    for number in range(count // 8):
        with tally.case(f"training, {('every file', 'the adapter alone')[number % 2]}"):
            _training(folder / f"run{number}", adapter_alone=number % 2 == 1)


def _adapter(path: Path, base: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    from mindspeed_wan.lora.model_config import config_of

    save_file(reward_lora(config_of(base), rank=4, alpha=2.0, seed=seed), path)
    return path


def _jobs(folder: Path, base: Path, tuned: Path) -> list[tuple[str, Path, Callable[[Path], int]]]:
    """Return (name, target, what writes it from an adapter file)."""
    def converts(name: str) -> tuple[str, Path, Callable[[Path], int]]:
        target = folder / (name if name == "peft" else f"{name}.safetensors")
        return f"lora convert --to {name}", target, lambda adapter: _tool(
            "convert", str(adapter), "--to", name, "--out", str(target), "--model", str(base))

    merged, extracted, mm, mm_merged = (folder / n for n in ("merged", "extracted.safetensors", "mm", "mm_merged"))
    return [
        *map(converts, FORMATS),
        ("lora merge", merged, lambda adapter: _tool("merge", "--base", str(base), "--lora", str(adapter), "--out",
                                                     str(merged))),
        ("lora extract", extracted, lambda adapter: _tool("extract", "--base", str(base), "--tuned", str(tuned),
                                                          "--rank", "4", "--out", str(extracted))),
        ("mm-convert lora_hf_to_mm", mm, lambda adapter: convert(["lora_hf_to_mm", str(adapter), str(mm),
                                                                  "--cfg.hf_dir", str(base)])),
        ("mm-convert merge_lora_to_base", mm_merged, lambda adapter: convert([
            "merge_lora_to_base", str(base), str(mm_merged), "--cfg.lora_path", str(adapter)])),
    ]


def _training(save: Path, *, adapter_alone: bool) -> None:
    """Let a LoRA run's second save run out of disk: the first one stays whole, and the run goes on from it."""
    finish(start(save, *LORA, iters=2))
    before = corpus.digest(save / "iter_0000002")
    patch = "full_disk_for_adapters:" if adapter_alone else "full_disk:20000"
    output = finish(start(save, *LORA, iters=4, patch=patch), 3)
    assert "cannot write" in output, output[-500:]
    assert saved(save) == 2 and corpus.digest(save / "iter_0000002") == before
    assert not (save / "iter_0000004").exists()
    finish(start(save, *LORA, iters=4))
    assert saved(save) == 4 and (save / "iter_0000004" / "adapter.safetensors").is_file()
    assert not list(save.glob(".iter_*"))
