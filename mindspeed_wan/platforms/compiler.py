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

_COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "c++"), "g++"), "cuda": ("CC", ("gcc", "clang"), "gcc")}
"""By platform: the variable that names the compiler, what is looked for without it, the package to install. On CUDA it
is Triton that needs one, for the code that launches its kernels; images made for running programs often have none."""


def check_compiler(platform: Platform, asked: str = "--compile") -> None:
    """Raise if ``torch.compile`` cannot make kernels on ``platform``.

    Args:
        platform: where the kernels are to run.
        asked: what the user said to want them.

    Raises:
        ConfigError: on an NPU, where eager mode runs torch_npu's fused kernels.
        ResourceError: no C++ compiler (CPU), no Triton or no C compiler (CUDA).
    """
    if platform.name == "npu":
        raise ConfigError(f"{asked}: torch_npu has no compiler for these blocks",
                          fix="drop it; norms, rotations and attention are fused kernels on the NPU already")
    if platform.name == "cuda" and importlib.util.find_spec("triton") is None:
        raise ResourceError(f"{asked} needs Triton, which is not installed", fix="pip install triton, or drop it")
    variable, names, package = _COMPILERS[platform.name]
    wanted = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        language = "C++" if platform.name == "cpu" else "C"
        raise ResourceError(f"{asked} needs a {language} compiler; {', '.join(wanted)} not found",
                            fix=f"install one (apt-get install {package}), or drop it")
