"""Whether ``torch.compile`` can make kernels on this machine; asked before ``--compile`` starts a run.

Blocks are compiled one by one (``models.wan.parallelize``) and share one graph: all blocks, both experts, both guidance
branches and every step. The memory modes change the values of parameters, never their shapes, so none of them compiles
again; another picture size does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.platforms.base import Platform

_CPU_COMPILERS = ("g++", "clang++", "c++")


def check_compiler(platform: Platform) -> None:
    """Raise if ``torch.compile`` cannot make kernels on ``platform``.

    Raises:
        ConfigError: on an NPU, where eager mode runs torch_npu's fused kernels.
        ResourceError: no C++ compiler (CPU), no Triton (CUDA).
    """
    if platform.name == "npu":
        raise ConfigError("--compile: torch_npu has no compiler for these blocks",
                          fix="drop it; norms, rotations and attention are fused kernels on the NPU already")
    if platform.name == "cuda" and importlib.util.find_spec("triton") is None:
        raise ResourceError("--compile needs Triton, which is not installed", fix="pip install triton, or drop it")
    if platform.name == "cpu":
        wanted = (os.environ["CXX"],) if os.environ.get("CXX") else _CPU_COMPILERS
        if not any(shutil.which(name) for name in wanted):
            raise ResourceError(f"--compile needs a C++ compiler on a CPU; {', '.join(wanted)} not found",
                                fix="install one (apt-get install g++), or drop it")
