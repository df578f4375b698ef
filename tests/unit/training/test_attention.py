"""--attention in training: the kernel a run names is in use, or refused for this device before anything is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mindspeed_wan.config.flag_table import USED
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.platforms import get_platform, ops, reset_platform
from mindspeed_wan.platforms.attention import BACKENDS
from mindspeed_wan.training.setup import choose_attention


def _config(name: str) -> Any:
    return SimpleNamespace(training=SimpleNamespace(attention=name, precision="bf16"))


def test_the_flag_names_every_kernel() -> None:
    (flag,) = (flag for flag in USED if flag.name == "--attention")
    assert flag.choices == ("auto", *BACKENDS)


def test_the_named_kernel_is_used_or_refused() -> None:
    platform = get_platform("cpu").activate()
    choose_attention(_config("torch_math"), platform)
    assert ops.attention_in_use() == "torch_math"
    choose_attention(_config("auto"), platform)
    assert ops.attention_in_use() == "sdpa"
    with pytest.raises(ConfigError, match="'flash3' runs on cuda, not on cpu"):
        choose_attention(_config("flash3"), platform)
    with pytest.raises(ConfigError, match="has no backward"):
        ops.use_attention("sage", needs_grad=True)
    reset_platform()
