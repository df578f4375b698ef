"""Published constants of step caches for Wan, with their sources.

MagCache: mean ratio of the norms of successive block residuals, ``|res_i| / |res_(i-1)|``, measured at 40 steps by its
authors (MagCache4Wan2.2, conditional branch). Step 0 is 1 by definition. The value at the step where the experts change
compares residuals of two models and is left out (nan): no plan may cross the switch.

TeaCache: polynomials of the relative L1 change of the time embedding (highest power first), fitted by its authors on
Wan2.1 (TeaCache4Wan2.1, ``use_ret_steps``: modulation before the blocks). None is published for Wan2.2 A14B.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan


@dataclass(frozen=True)
class MagnitudeTable:
    """Residual ratios of one schedule: ``ratios[i]`` belongs to step i of ``num_steps`` at flow shift ``shift``.

    ``polynomials`` are TeaCache's, one for each expert in order of use, where the same run measured them.
    """

    num_steps: int
    shift: float
    boundary: float | None
    ratios: tuple[float, ...]
    polynomials: tuple[tuple[float, ...], ...] = ()


_T2V_HIGH = (
    1.0, 1.00124, 0.99822, 0.99696, 0.99703, 0.9966, 0.99602, 0.99578, 0.99484, 0.99633, 0.99659, 0.99534, 0.99584,
    0.99681, 0.99563, 0.9944, 0.99594, 0.99466, 0.99453, 0.99389, 0.99391, 0.99354, 0.99283, 0.99268, 0.99057, 0.99125,
)
_T2V_LOW = (
    nan, 0.98808, 0.98765, 0.9851, 0.98311, 0.9805, 0.97776, 0.97278, 0.96731, 0.95857, 0.94385, 0.92118, 0.88108,
    0.80263,
)
_I2V_HIGH = (
    1.0, 0.99191, 0.99356, 0.99326, 0.99251, 0.99393, 0.9943, 0.99276, 0.99389, 0.99274, 0.99316, 0.99379, 0.99268,
    0.99222, 0.99175,
)
_I2V_LOW = (
    nan, 0.98931, 0.99087, 0.98852, 0.98895, 0.98806, 0.9871, 0.98613, 0.98434, 0.983, 0.98185, 0.98131, 0.9783,
    0.97619, 0.97264, 0.97088, 0.96568, 0.96045, 0.95322, 0.94579, 0.93297, 0.91699, 0.89174, 0.8541, 0.79823,
)

MAGNITUDES: dict[str, MagnitudeTable] = {
    "t2v-A14B": MagnitudeTable(40, 12.0, 0.875, _T2V_HIGH + _T2V_LOW),
    "i2v-A14B": MagnitudeTable(40, 5.0, 0.900, _I2V_HIGH + _I2V_LOW),
}

POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "t2v-14B": (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    "i2v-14B": (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
}
"""``i2v-14B`` is the polynomial of the 720P weights."""
