"""Step caches and guidance plans on several ranks: every rank follows the same plan and gets the one-rank video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.guidance_options import GuidanceOptions
from mindspeed_wan.parallel.inference_layout import InferenceLayout
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder

CALL: dict[str, Any] = {"prompt": "a red circle moves left", "size": (32, 48), "num_frames": 5, "steps": 12, "seed": 1,
                        "decode": False}
TEACACHE = CacheOptions(method="teacache", coefficients=((1.0, 0.0),), threshold=1.0)
TAYLOR = CacheOptions(method="taylorseer", interval=2)
MIDDLE = GuidanceOptions(steps=(2, 10), gate=6)


def _generate(rank: int, world_size: int, folder: Path, layout: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Return (latents, evaluations, step-cache plan) of this rank."""
    from mindspeed_wan.inference.pipeline import WanGenerator

    generator = WanGenerator.from_pretrained(
        folder, dtype="fp32", device="cpu", layout=InferenceLayout(world_size=world_size, **layout))
    plans: list[Any] = []
    build = CacheOptions.build

    def remember(*args: Any, **kwargs: Any) -> Any:
        plans.append(build(*args, **kwargs))
        return plans[-1]

    CacheOptions.build = remember  # type: ignore[method-assign]
    try:
        made = generator(**CALL, **changes)
    finally:
        CacheOptions.build = build  # type: ignore[method-assign]
    return made.latents, made.evaluations, plans[0].plan.compute if plans[0] is not None else None


@pytest.mark.parametrize(("layout", "changes"), [
    ({"cfg": 2, "dit_fsdp": True}, {"cache": TAYLOR, "guidance_limits": MIDDLE}),
    ({"ulysses": 2}, {"cache": TEACACHE, "guidance_limits": GuidanceOptions(skip_ratio=0.4)}),
    ({"cfg": 2}, {"cache": TEACACHE, "guidance": (1.0, 4.0), "guidance_limits": GuidanceOptions(gate=2)}),
], ids=["cfg+fsdp", "ulysses", "cfg"])
def test_ranks_follow_one_plan(layout: dict[str, Any], changes: dict[str, Any]) -> None:
    folder = tiny_pipeline_folder()
    ((latents, evaluations, plan),) = run_ranks(_generate, 1, folder, {}, changes)
    outcomes = run_ranks(_generate, 2, folder, layout, changes)
    assert not all(plan) and evaluations < 24
    for made, _, followed in outcomes:
        assert followed == plan
        assert float((made - latents).norm() / latents.norm()) < 1e-5
    if "cfg" in layout:  # a rank runs its branch at every step that computes
        assert [count for _, count, _ in outcomes] == [sum(plan)] * 2
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=0, atol=0)
