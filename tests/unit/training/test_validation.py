"""Parts of validation: means by sigma, the prompts file, who samples what, the schedule of an expert alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import DataError
from mindspeed_wan.training.validation import ValidationLoss
from mindspeed_wan.training.validation_prompts import ValidationPrompt, read_prompts
from mindspeed_wan.training.validation_videos import Settings, prompts_of, writes

BOUNDS = (0.0, 0.25, 0.5, 0.75, 1.0)


def test_quarters_are_runs_of_samples_in_order_of_sigma() -> None:
    found = ValidationLoss.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), BOUNDS)
    assert found.loss == 4.5 and found.quartiles == (1.5, 3.5, 5.5, 7.5)
    assert "0.750-1.000: 7.5000E+00" in found.describe()
    # Quantiles 1/6, 1/2 and 5/6: the first, third and fourth quarter; a boundary belongs to the quarter above it.
    assert ValidationLoss.of(torch.tensor([1.0, 2.0, 3.0]), BOUNDS).quartiles == (1.0, None, 2.0, 3.0)


def test_the_mean_is_exact_for_many_small_differences() -> None:
    losses = torch.full((100_000,), 0.1)
    assert ValidationLoss.of(losses, BOUNDS).loss == pytest.approx(float(torch.tensor(0.1)), abs=1e-12)


def test_prompts_are_lines_or_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    file = tmp_path / "prompts.txt"
    file.write_text('# comment\n a fox \n\n{"prompt": "a {cat}"}\n', encoding="utf-8")
    assert read_prompts(file, task="t2v") == [ValidationPrompt("a fox"), ValidationPrompt("a {cat}")]
    file.write_text('{"prompt": "a boat", "image": "a.png"}\n', encoding="utf-8")
    assert read_prompts(file, task="i2v") == [ValidationPrompt("a boat", str(tmp_path / "a.png"))]


@pytest.mark.parametrize(("task", "text", "expected"), [
    ("i2v", "a boat", ":1: has no image"), ("t2v", 'x\n{"prompt": "a", "image": "b"}', ":2: has an image"),
    ("t2v", "{oops", ":1: is not JSON"), ("t2v", '{"text": "a"}', ":1: has the keys text"),
    ("t2v", "\n#\n", "no prompt"), ("i2v", '{"prompt": "a", "image": "gone.png"}', "gone.png does not exist"),
])
def test_bad_prompts_are_named_with_their_line(tmp_path: Path, task: str, text: str, expected: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        read_prompts(file, task=task)


@pytest.mark.parametrize("data", [1, 2, 3, 8])
def test_data_ranks_share_the_prompts_and_stay_in_step(data: int) -> None:
    mine = [prompts_of(5, data, rank) for rank in range(data)]
    assert len({len(numbers) for numbers in mine}) == 1 and all(len(set(n)) == len(n) for n in mine)
    written = [number for rank, numbers in enumerate(mine) for number in numbers if writes(number, data, rank)]
    assert sorted(written) == [0, 1, 2, 3, 4]


def _config(expert: str | None, **validation: object) -> RunConfig:
    boundary = None if expert is None else 0.875
    return RunConfig(diffusion={"expert": expert, "boundary": boundary}, validation=validation)


def test_a_high_noise_expert_alone_stops_at_the_boundary() -> None:
    alone, both = Settings.of(_config("high")), Settings.of(_config("high", other_expert="/low"))
    assert both.schedule.num_steps == 40 and both.high_steps == 26 and both.scales == {"high": 4.0, "low": 3.0}
    assert alone.schedule.timesteps == both.schedule.timesteps[:26] and alone.schedule.sigmas[-1] == 0.0
    assert "note" in alone.told and "note" not in both.told
    one = Settings.of(_config(None, steps=8, shift=3.0, guidance=1.0))
    assert one.high_steps == one.schedule.num_steps == 8 and set(one.scales.values()) == {1.0}
