"""Both experts side by side in one job (``--expert both --expert-ranks``): how the devices are best divided.

Each part is a job of its own on its devices, with the same global batch; the run ends when the slower part does. Both
ranges of sigma cost the same per step, so even parts end together; unequal ones pay where one expert has more
iterations, and only as far as the part's devices divide into a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.planning.job import Job
from mindspeed_wan.planning.layouts import Layout, Plan, Search, search

EXPERTS = ("high", "low")
PARTS = 8
"""Besides the even split, those in eighths of the devices are compared."""
WORTH = 0.02
"""An uneven split is called sensible where the run is shorter by more than this share."""


@dataclass(frozen=True)
class Split:
    """Devices of the high and the low expert, the plan of each, and the iterations each trains."""

    sizes: tuple[int, int]
    plans: tuple[Plan, Plan]
    iterations: tuple[int, int]

    @property
    def runs(self) -> bool:
        """Both parts have a layout."""
        return all(plan.layouts for plan in self.plans)

    @property
    def best(self) -> tuple[Layout, Layout]:
        """The best layout of each part."""
        high, low = self.plans
        return high.layouts[0], low.layouts[0]

    @property
    def parts(self) -> tuple[float, float]:
        """Seconds that each expert trains."""
        high, low = (layout.duration.step * count for layout, count in zip(self.best, self.iterations))
        return high, low

    @property
    def seconds(self) -> float:
        """Seconds until both have ended."""
        return max(self.parts)

    @property
    def idle(self) -> float:
        """Share of the device time in which one part has ended and the other has not."""
        busy = sum(seconds * size for seconds, size in zip(self.parts, self.sizes))
        return 1.0 - busy / (self.seconds * sum(self.sizes))


@dataclass(frozen=True)
class JointPlan:
    """The split that was asked for (or the sensible one), and all that were compared, shortest run first."""

    chosen: Split
    sensible: Split | None
    splits: tuple[Split, ...]


def plan_joint(job: Job, wanted: Search, asked: str, iterations: tuple[int, int] = (1, 1)) -> JointPlan:
    """Divide ``wanted.devices`` between the experts.

    Args:
        job: one expert's job.
        wanted: the search; its degrees and its global batch are those of each expert.
        asked: ``even``, ``auto`` (the sensible split), or ``HIGH,LOW`` devices.
        iterations: steps that the high and the low expert train.

    Raises:
        ConfigError: ``asked`` does not divide the devices.
    """
    given = _sizes(asked, wanted.devices)
    candidates = {size * wanted.devices // PARTS for size in range(1, PARTS)} | {wanted.devices // 2}
    pairs = {(high, wanted.devices - high) for high in candidates if 0 < high < wanted.devices}
    if given is not None:
        pairs.add(given)
    wanted = replace(wanted, global_batch=wanted.global_batch or _common_batch(
        job, wanted, uneven=iterations[0] != iterations[1] or (given is not None and given[0] != given[1])))
    plans = {size: search(job, replace(wanted, devices=size)) for pair in pairs for size in pair}
    splits = [Split(pair, (plans[pair[0]], plans[pair[1]]), iterations) for pair in sorted(pairs)]
    running = sorted((split for split in splits if split.runs), key=lambda split: split.seconds)
    sensible = _sensible(running)
    named = next((split for split in splits if split.sizes == given), None)
    return JointPlan(named or sensible or splits[0], sensible, tuple(running))


def _sizes(asked: str, devices: int) -> tuple[int, int] | None:
    if devices < 2 or (asked == "even" and devices % 2):
        raise ConfigError(f"{devices} devices cannot be halved", where="--expert-ranks",
                          fix="use an even number of --devices, or HIGH,LOW")
    if asked in ("even", "auto"):
        return (devices // 2, devices // 2) if asked == "even" else None
    words = asked.split(",")
    if len(words) != 2 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"'{asked}' is not even, auto or HIGH,LOW", where="--expert-ranks", fix="for example 4,4")
    high, low = int(words[0]), int(words[1])
    if high + low != devices:
        raise ConfigError(f"{asked} are {high + low} devices, the job has {devices}", where="--expert-ranks",
                          fix="make the parts add up")
    return high, low


def _common_batch(job: Job, wanted: Search, *, uneven: bool) -> int | None:
    """Both experts train on the same global batch: without one, that of the best layout of half the devices.

    Three times that where uneven parts are looked for: a part of three quarters of the devices can divide it.
    """
    half = search(job, replace(wanted, devices=wanted.devices // 2))
    return half.layouts[0].job.clips_per_step * (3 if uneven else 1) if half.layouts else None


def _sensible(running: Sequence[Split]) -> Split | None:
    """Return the even split, unless another one is shorter by more than what a plan can tell."""
    even = next((split for split in running if split.sizes[0] == split.sizes[1]), None)
    if even is None or not running:
        return running[0] if running else None
    return running[0] if running[0].seconds < even.seconds * (1 - WORTH) else even
