"""Which hardware runs this process: the one NPU | CUDA | CPU decision, and its kernels for five operations (``ops``).

``get_platform`` decides once per process: argument, then ``MINDSPEED_WAN_DEVICE``, then the first present of NPU,
CUDA, CPU. CPU is always present and complete. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
import os

from mindspeed_wan.errors import ConfigError, ResourceError, did_you_mean
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.platforms.cann import keep_torch_importable

DEVICE_VARIABLE = "MINDSPEED_WAN_DEVICE"

_CLASSES = {"npu": "NpuPlatform", "cuda": "CudaPlatform", "cpu": "CpuPlatform"}
"""Platforms in order of preference."""

_platform: Platform | None = None


def get_platform(name: str | None = None) -> Platform:
    """Return the platform of this process, deciding at the first call.

    Args:
        name: ``npu``, ``cuda`` or ``cpu`` (``auto`` and ``None`` mean: environment, then the first present).

    Raises:
        ConfigError: unknown name, or a name that contradicts a platform already activated.
        ResourceError: the asked-for device is not there.
    """
    global _platform
    name, source = _asked_for(name)
    if _platform is not None and name in (None, _platform.name):
        return _platform
    if _platform is not None and _platform.active:
        raise ConfigError(
            f"device '{name}' asked for, but this process already runs on '{_platform.name}'", where=source
        )
    keep_torch_importable()
    if name is None:
        _platform = next(platform for platform in map(_create, _CLASSES) if platform.problem() is None)
        return _platform
    platform = _create(name)
    problem = platform.problem()
    if problem is not None:
        raise ResourceError(
            f"device '{name}' is not usable: {problem}",
            where=source,
            fix=f"{platform.problem_fix()}; or run on the CPU: --device cpu, {DEVICE_VARIABLE}=cpu",
        )
    _platform = platform
    return platform


def available_platforms() -> dict[str, str | None]:
    """Return every platform with ``None`` if usable, else the reason why not (for ``doctor``)."""
    keep_torch_importable()
    return {name: _create(name).problem() for name in _CLASSES}


def reset_platform() -> None:
    """Forget the decision and undo what activating changed in this process (for tests)."""
    global _platform
    if _platform is not None:
        _platform.deactivate()
    _platform = None


def _asked_for(name: str | None) -> tuple[str | None, str | None]:
    """Return the name asked for, if any, and where it was asked."""
    source = "--device"
    if name in (None, "", "auto"):
        name, source = os.environ.get(DEVICE_VARIABLE, "").strip().lower(), DEVICE_VARIABLE
    if name in (None, "", "auto"):
        return None, None
    if name not in _CLASSES:
        choices = ", ".join(_CLASSES)
        hint = did_you_mean(name, tuple(_CLASSES)) or "choose one"
        raise ConfigError(f"device '{name}' does not exist", where=source, fix=f"{hint} (auto, {choices})")
    return name, source


def _create(name: str) -> Platform:
    platform: Platform = getattr(importlib.import_module(f"mindspeed_wan.platforms.{name}"), _CLASSES[name])()
    return platform
