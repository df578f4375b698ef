"""A plan for both experts as text and as JSON."""

from __future__ import annotations

from typing import Any

from mindspeed_wan.planning import report
from mindspeed_wan.planning.devices import GIB
from mindspeed_wan.planning.joint import EXPERTS, JointPlan, Split


def text(plan: JointPlan, *, everything: bool = False) -> str:
    """Return the splits, which one is sensible and why, and the plan of each part."""
    lines = ["both experts side by side; splits that run, shortest first:",
             f"  {'high,low':<12} {'s/step high':>11} {'s/step low':>11} {'idle':>6}  {'GiB high':>8} {'GiB low':>8}"]
    lines += [_row(split) for split in plan.splits]
    lines += [verdict(plan), ""]
    high, low = plan.chosen.sizes
    if high == low:
        lines += [f"each expert on {high} devices:", report.text(plan.chosen.plans[0], everything=everything)]
    else:
        for expert, size, part in zip(EXPERTS, plan.chosen.sizes, plan.chosen.plans):
            lines += [f"{expert}-noise expert on {size} devices:", report.text(part, everything=everything), ""]
    return "\n".join(lines)


def _row(split: Split) -> str:
    high, low = split.best
    sizes = f"{split.sizes[0]},{split.sizes[1]}"
    return (f"  {sizes:<12} {high.duration.step:11.2f} {low.duration.step:11.2f} {split.idle:6.1%}"
            f"  {high.memory.total / GIB:8.1f} {low.memory.total / GIB:8.1f}")


def verdict(plan: JointPlan) -> str:
    """Return which split is sensible, in a line."""
    if plan.sensible is None:
        return "no split of these devices runs this job"
    high, low = plan.sensible.sizes
    counts = plan.sensible.iterations
    if high == low:
        reason = "both experts cost the same per step" if counts[0] == counts[1] else "no other split ends sooner"
    elif counts[0] == counts[1]:
        reason = "even parts run no layout as fast"
    else:
        reason = f"the experts train {counts[0]} and {counts[1]} iterations"
    batch = plan.sensible.best[0].job.clips_per_step
    return f"sensible: --expert-ranks {high},{low} ({reason}; global batch {batch} for both)"


def as_dict(plan: JointPlan) -> dict[str, Any]:
    """Return everything as JSON-ready values."""
    return {
        "sensible": list(plan.sensible.sizes) if plan.sensible else None,
        "splits": [{"devices": list(split.sizes), "seconds": list(split.parts), "idle": split.idle,
                    "memory_bytes": [layout.memory.total for layout in split.best]} for split in plan.splits],
        "chosen": list(plan.chosen.sizes),
        "experts": {expert: report.as_dict(part) for expert, part in zip(EXPERTS, plan.chosen.plans)},
    }


def start(plan: JointPlan, task: str) -> list[str]:
    """Return how the chosen split is started."""
    layouts, (high, low) = plan.chosen.best, plan.chosen.sizes
    split = ["EXPERT_RANKS=even"] if high == low else \
        [f"EXPERT_RANKS={high},{low}", f"GBS={layouts[0].job.clips_per_step}"]
    lines = report.start(layouts[0], task, "both", split=split, devices=high + low)
    if high != low and layouts[0].name != layouts[1].name:
        lines.append(f"  with the low expert's own degrees as --low:FLAG ({layouts[1].name})")
    return lines
