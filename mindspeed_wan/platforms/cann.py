"""Finding Ascend's software without importing it: torch_npu without CANN breaks ``import torch`` itself."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"

CANN_FIX = (
    "install CANN and run `source /usr/local/Ascend/cann/set_env.sh` (older: ascend-toolkit/set_env.sh) in this shell, "
    "or remove the package: pip uninstall torch_npu"
)


def torch_npu_installed() -> bool:
    """True if the package can be found (it is not imported)."""
    try:
        return importlib.util.find_spec("torch_npu") is not None
    except ValueError:  # a module put into sys.modules without a spec: it is there
        return True


def missing_cann_library() -> str | None:
    """Return the name of a CANN library that cannot be loaded, or ``None`` if torch_npu will find what it needs."""
    for library in ("libascendcl.so", "libhccl.so"):
        try:
            ctypes.CDLL(library)
        except OSError:
            return library
    return None


def keep_torch_importable() -> str | None:
    """Switch torch's backend autoload off when torch_npu is installed without CANN; call before ``import torch``.

    Returns the problem found, for ``doctor``; the setting is inherited by the ranks a launcher starts.
    """
    if not torch_npu_installed():
        return None
    library = missing_cann_library()
    if library is None:
        return None
    os.environ[AUTOLOAD_VARIABLE] = "0"
    return f"torch_npu is installed but CANN is not in reach ({library} cannot be loaded)"


def ascend_devices() -> list[str]:
    """Return the NPU device files of this machine (``/dev/davinci0`` ...)."""
    return sorted(str(path) for path in Path("/dev").glob("davinci[0-9]*"))
