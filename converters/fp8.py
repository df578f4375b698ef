"""Published fp8 weights in numpy: the values that their codes stand for, times the scales of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _e4m3() -> Any:
    """Return the 256 values of e4m3 (no infinities; 0x7f and 0xff are NaN)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    size[bits & 0x7F == 0x7F] = np.nan
    return np.where(bits & 0x80, -size, size).astype("<f4")


VALUES: dict[str, Any] = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256, dtype="<u2") << 8).view("<f2").astype("<f4"),  # the upper half of fp16
}
"""dtype code -> fp32 value of each code."""


def decode(rows: Any, code: str, scales: Callable[[], Any] | None) -> Any:
    """Return uint8 ``rows`` as fp32, times ``scales()``: one number, or ``[n, 1]`` of these rows."""
    values = VALUES[code][rows]
    if scales is None:
        return values
    factors = scales()
    return values * factors.reshape(-1, *[1] * (values.ndim - 1))
