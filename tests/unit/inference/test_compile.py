"""--compile: one graph for both experts in every memory mode, nothing compiled again within a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from packaging.version import Version

from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.flags import parse
from mindspeed_wan.inference.guidance_options import GuidanceOptions
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.platforms import compiler
from tests.helpers.tiny import tiny_pipeline_folder

ASK = {"size": (32, 48), "num_frames": 5, "steps": 6, "seed": 1, "decode": False, "prompt": "a red circle moves left"}


@pytest.fixture
def counters() -> Iterator[dict]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def _generator(**options) -> WanGenerator:
    return WanGenerator.from_pretrained(tiny_pipeline_folder(), dtype="fp32", device="cpu", **options)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="torch 2.7 traces a second graph")
@pytest.mark.parametrize("memory", ["resident", "sequential", "block"])
def test_both_experts_share_one_graph(memory: str, counters: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _generator(memory=memory)(**ASK)
    # Capture only: making C++ kernels takes a minute, and what is counted here is graphs.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    generator = _generator(memory=memory, compile_blocks=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = generator(**ASK)
        assert set(made.steps) == {"high", "low"}
        generator(**{**ASK, "prompt": "a longer prompt, of which every word is another token than before"})
        generator(**ASK, cache=CacheOptions(method="taylorseer", interval=2), guidance_limits=GuidanceOptions(gate=2))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert float((made.latents - exact.latents).norm() / exact.latents.norm()) < 1e-5


@pytest.mark.slow
def test_compiled_kernels_make_the_same_video(counters: dict) -> None:
    exact = _generator()(**ASK)
    made = _generator(compile_blocks=True)(**ASK)
    assert float((made.latents - exact.latents).norm() / exact.latents.norm()) < 1e-4
    assert counters["stats"]["unique_graphs"] >= 1


def test_machines_that_cannot_compile_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs a C\+\+ compiler"):
        _generator(compile_blocks=True)
    monkeypatch.delenv("CC", raising=False)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="needs a C compiler; gcc, clang not found"):
        patch.setattr(compiler.importlib.util, "find_spec", lambda name: object())
        compiler.check_compiler(SimpleNamespace(name="cuda"))
    with pytest.raises(ConfigError, match="torch_npu has no compiler"):
        compiler.check_compiler(SimpleNamespace(name="npu"))
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="Triton"):
        compiler.check_compiler(SimpleNamespace(name="cuda"))


def test_the_flag() -> None:
    assert parse(["--ckpt_dir", "w", "--prompt", "x", "--compile"], world_size=1).compile_blocks


def test_attention_by_name(counters: dict) -> None:
    from mindspeed_wan.config.base import Attention
    from mindspeed_wan.inference.options import CHOICES
    from mindspeed_wan.platforms import attention, ops

    assert CHOICES["attention"] == get_args(Attention) == ("auto", *attention.BACKENDS)
    exact = _generator()(**ASK).latents
    made = _generator(attention="torch_math")(**ASK).latents
    assert 0 < float((made - exact).norm() / exact.norm()) < 1e-4
    assert ops.attention_in_use() == "sdpa"  # only while generating
    with pytest.raises(ConfigError, match="not on cpu"):
        _generator(attention="cudnn")
    with pytest.raises(ConfigError, match="sageattention"):
        _generator(attention="sage")
    words = ["--ckpt_dir", "w", "--prompt", "x", "--attention"]
    with pytest.raises(ConfigError, match="did you mean 'flash3'"):
        parse([*words, "flash"], world_size=1)
    with pytest.raises(ConfigError, match="the ring merges partial results"):
        parse([*words, "sage", "--ring_size", "2"], world_size=2)
