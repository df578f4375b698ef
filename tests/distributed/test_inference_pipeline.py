"""Generation over pipeline stages makes the video of one rank; PipeFusion makes nearly the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_wan.inference.pipefusion import PatchAttention, PipeFusion
from mindspeed_wan.inference.pipeline_stages import Pass, StagedModel
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.groups import build_groups, destroy
from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions
from mindspeed_wan.platforms import get_platform
from tests.distributed.layouts import fill
from tests.distributed.test_inference_layouts import PROMPTS, _generate, reference, relative
from tests.helpers.oracle import TINY, Batch, diffusers_model, mm_state_dict, random_batch
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder

CONFIG = TINY.with_changes(num_layers=3)
EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"layout": {"pipeline": 2}}),
    "pp2_sequential": (2, {"layout": {"pipeline": 2}, "memory": "sequential"}),
    "pp2_cfg2_vae": (4, {"layout": {"pipeline": 2, "cfg": 2, "vae_parallel": True}}),
    "pp2_ulysses2": (4, {"layout": {"pipeline": 2, "ulysses": 2}}),
    "pp2_tp2": (4, {"layout": {"pipeline": 2, "tensor": 2}}),
    "pipefusion_of_one_patch": (2, {"layout": {"pipeline": 2}, "pipefusion": PipeFusionOptions(on=True, patches=1)}),
    "pipefusion_warming_up": (2, {"layout": {"pipeline": 2}, "pipefusion": PipeFusionOptions(on=True, warmup=6)}),
}
SLOW = ("pp2_ulysses2", "pp2_tp2", "pipefusion_warming_up")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in EXACT])
def test_stages_make_the_video_of_one_rank(case: str) -> None:
    world_size, options = EXACT[case]
    outcomes = run_ranks(_generate, world_size, tiny_pipeline_folder(), options)
    latents, video = reference()[PROMPTS[0]]
    for outcome in outcomes:
        assert relative(outcome[PROMPTS[0]][0], latents) <= 1e-5
    assert [outcome[PROMPTS[0]][1] is not None for outcome in outcomes] == [True] + [False] * (world_size - 1)
    assert (outcomes[0][PROMPTS[0]][1] - video).abs().max() <= 1e-4


def _velocities(rank: int, world_size: int, weights: dict[str, Tensor], batch: Batch,
                options: dict[str, int]) -> list[Tensor]:
    """Return the velocities of four steps on the same input: its keys and values are never out of date."""
    platform = get_platform("cpu")
    groups = build_groups(ParallelDims(world_size=world_size, pipeline=world_size), platform)
    model = build_wan(CONFIG, groups=groups, platform=platform).requires_grad_(False)
    fill(model, {name: weights[name] for name, _ in model.named_parameters()}, groups)
    runner, found = PipeFusion(groups, **options), []
    with torch.no_grad():
        cond, uncond = (runner.encode_text(model, text, batch.image_embeds) for text in (batch.text, -batch.text))
        for step in range(3):
            runner.begin("high", step)
            found += runner.run(model, batch.latents, batch.timestep, [Pass("cond", cond), Pass("uncond", uncond)])
        # A later call without PipeFusion finds the model as it was.
        plain = StagedModel(groups)
        found += plain.run(model, batch.latents, batch.timestep, [Pass("cond", cond), Pass("uncond", uncond)])
        assert not any(isinstance(block.self_attn.attend, PatchAttention) for block in model.blocks)
    destroy()
    return found


@pytest.mark.parametrize("patches", [2, 5])
def test_patches_with_fresh_keys_and_values_are_exact(patches: int) -> None:
    weights, batch = mm_state_dict(diffusers_model(CONFIG), CONFIG), random_batch(CONFIG)
    whole = WanDiT(CONFIG)
    whole.load_state_dict(weights)
    with torch.no_grad():
        expected = [whole(batch.latents, batch.timestep, text) for text in (batch.text, -batch.text)]
    for outcome in run_ranks(_velocities, 2, weights, batch, {"patches": patches, "warmup": 1}):
        for number, velocity in enumerate(outcome):
            torch.testing.assert_close(velocity, expected[number % 2], rtol=1e-4, atol=1e-5)


def test_pipefusion_changes_the_video_less_with_more_warm_up() -> None:
    errors = []
    for warmup in (1, 3):
        fusion = PipeFusionOptions(on=True, warmup=warmup)
        outcomes = run_ranks(_generate, 2, tiny_pipeline_folder(), {"layout": {"pipeline": 2}, "pipefusion": fusion})
        first, second = (outcome[PROMPTS[0]][0] for outcome in outcomes)
        assert torch.equal(first, second)
        errors.append(relative(first, reference()[PROMPTS[0]][0]))
    assert 0 < errors[1] < errors[0]
