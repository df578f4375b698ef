"""Accelerators as the planner sees them: memory, peaks, links, and the share of each that real programs reach.

Peaks and bandwidths are the vendors' (dense bf16; one direction; bytes per second and device). The shares are fitted:
``benchmarks/plan_accuracy.py`` says to which published figures, and how far the others are off.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mindspeed_wan.errors import ConfigError, did_you_mean

GIB = float(1 << 30)
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator and its place in a machine.

    Attributes:
        memory: bytes of device memory.
        peak_flops: dense bf16 FLOP/s.
        bandwidth: bytes/s of device memory.
        per_node: devices that share the fast links (a node, or a supernode).
        intra: bytes/s a device sends over the fast links.
        inter: bytes/s a device sends to other nodes (its share of the node's adapters).
        linear, attention: share of the peak that matrix products and fused attention reach in a forward pass.
        training: what is left of these shares in a training step (backward kernels, optimizer, eager operators).
    """

    name: str
    memory: float
    peak_flops: float
    bandwidth: float
    per_node: int
    intra: float
    inter: float
    linear: float = 0.70
    attention: float = 0.60
    training: float = 0.70

    @property
    def nominal_memory(self) -> float:
        """Memory in GiB, for tables."""
        return self.memory / GIB


def _device(name: str, memory_gib: float, tflops: float, bandwidth: float, per_node: int, intra: float,
            inter: float, **shares: float) -> Device:
    return Device(name=name, memory=memory_gib * GIB, peak_flops=tflops * 1e12, bandwidth=bandwidth * GB,
                  per_node=per_node, intra=intra * GB, inter=inter * GB, **shares)


_ASCEND = {"linear": 0.687, "attention": 0.619}
_HOPPER = {"linear": 0.72, "attention": 0.66}
_BLACKWELL = {"linear": 0.70, "attention": 0.54}

PRESETS: dict[str, Device] = {
    device.name: device
    for device in (
        # Atlas 800 A2: eight 910B, HCCS full mesh of 7 x 28 GB/s each way, one 200 Gb/s RoCE port per device.
        _device("910B", 64, 313, 1600, 8, 196, 25, **_ASCEND),
        _device("910B1", 64, 400, 1600, 8, 196, 25, **_ASCEND),
        _device("910B2", 64, 376, 1600, 8, 196, 25, **_ASCEND),
        _device("910B4", 32, 280, 800, 8, 196, 25, **_ASCEND),
        # Atlas 800 A3: 16 dies (8 packages) a node. Inside a supernode use --devices-per-node 768 (HCCS throughout).
        _device("A3", 64, 376, 1600, 16, 196, 25, **_ASCEND),
        _device("A100", 80, 312, 2039, 8, 300, 25, linear=0.80, attention=0.66),
        _device("H20", 96, 148, 4000, 8, 450, 50, linear=0.95, attention=0.95),
        _device("H100", 80, 989, 3350, 8, 450, 50, **_HOPPER),
        _device("H200", 140, 989, 4800, 8, 450, 50, **_HOPPER),
        _device("B200", 179, 2250, 8000, 8, 900, 50, **_BLACKWELL),
        # NVL72: 72 GPUs share the fast links.
        _device("GB200", 184, 2500, 8000, 72, 900, 50, **_BLACKWELL),
        _device("GB300", 276, 2500, 8000, 72, 900, 100, **_BLACKWELL),
    )
}

_NUMBERS = {field.name for field in fields(Device)} - {"name"}


def device(name: str, **overrides: Any) -> Device:
    """Return a preset, with some values replaced.

    Raises:
        ConfigError: no such preset, or a value that is not positive.
    """
    known = {key.lower(): preset for key, preset in PRESETS.items()}
    if name.lower() not in known:
        fix = f"{did_you_mean(name, tuple(PRESETS))} presets: {', '.join(PRESETS)}".strip()
        raise ConfigError(f"device '{name}' is not a preset", where="--device", fix=fix)
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        if key not in _NUMBERS or value <= 0:
            raise ConfigError(f"{key} is {value}", where="--device", fix="give a positive number")
    return replace(known[name.lower()], **given)
