"""Steps that are refused: what counts as one, what the policy does, and what a restart remembers."""

from __future__ import annotations

import math

import pytest

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import TrainingSection
from mindspeed_wan.errors import NumericsError
from mindspeed_wan.training.guard import WARM_UP, BadStepError, Guard


def test_spikes_are_measured_against_the_average_of_accepted_losses() -> None:
    guard, progress = Guard(TrainingSection(loss_spike_factor=10.0)), Progress()
    for count in range(WARM_UP):
        assert guard.limit(progress) == math.inf, count
        guard.accepted(0.5, progress)
    assert guard.limit(progress) == pytest.approx(5.0)


def test_without_a_factor_no_loss_is_a_spike() -> None:
    guard, progress = Guard(TrainingSection()), Progress(loss_count=1000, loss_average=0.5)
    assert guard.limit(progress) == math.inf


def test_stop_raises_the_bad_step_itself() -> None:
    bad = BadStepError("the loss of iteration 3 is nan")
    with pytest.raises(BadStepError) as caught:
        Guard(TrainingSection()).refused(bad, Progress())
    assert caught.value is bad and bad.exit_code == 5 and "no weight was changed" in str(bad)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_in_a_row_end_the_run_and_a_good_step_starts_the_count_anew(policy: str) -> None:
    guard, progress = Guard(TrainingSection(bad_step_policy=policy, max_bad_steps=3)), Progress()
    for _ in range(4):
        guard.refused(BadStepError("it is nan"), progress)
        guard.refused(BadStepError("it is nan"), progress)
        guard.accepted(1.0, progress)
    assert progress.skipped == 8
    guard.refused(BadStepError("it is nan"), progress)
    guard.refused(BadStepError("it is nan"), progress)
    with pytest.raises(NumericsError, match="3 steps in a row"):
        guard.refused(BadStepError("it is nan"), progress)
