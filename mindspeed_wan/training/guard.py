"""Steps that must not reach the weights: a loss or gradient that is no number, or a loss far above what it was.

``TrainStep.update`` finds them in values that are reduced over all ranks, so every rank sees the same, before the
optimizer moves. What follows is the run's policy: stop, leave the step out, or also go back to the last checkpoint.
"""

from __future__ import annotations

import math

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import TrainingSection
from mindspeed_wan.errors import NumericsError

WARM_UP = 20
"""Accepted losses before a spike is called one."""
_DECAY = 0.98


class BadStepError(NumericsError):
    """A step that every rank refuses; nothing has moved. ``norm`` is the gradient norm, NaN when it was not reached."""

    def __init__(self, problem: str, *, norm: float = math.nan) -> None:
        super().__init__(f"{problem}; no weight was changed",
                         fix="resume from the last checkpoint with a lower --lr or --clip-grad, and look at that "
                         "iteration's clips; --bad-step-policy skip or rollback goes on without such steps")
        self.problem, self.norm = problem, norm


class Guard:
    """The policy of one run; its memory is in ``Progress`` and so survives a restart.

    Args:
        section: ``bad_step_policy``, ``max_bad_steps`` and ``loss_spike_factor``.
    """

    def __init__(self, section: TrainingSection) -> None:
        self.policy, self._most, self._factor = (section.bad_step_policy, section.max_bad_steps,
                                                 section.loss_spike_factor)

    def limit(self, progress: Progress) -> float:
        """Return the highest loss that is no spike; infinite while spikes are not looked for."""
        if self._factor is None or progress.loss_count < WARM_UP:
            return math.inf
        return self._factor * progress.loss_average / (1 - _DECAY**progress.loss_count)

    def accepted(self, loss: float, progress: Progress) -> None:
        """Note a step that moved the weights."""
        progress.bad_steps = 0
        progress.loss_count += 1
        progress.loss_average = _DECAY * progress.loss_average + (1 - _DECAY) * loss

    def refused(self, bad: BadStepError, progress: Progress) -> None:
        """Note a step that was left out.

        Raises:
            NumericsError: the policy is to stop, or too many steps in a row were refused.
        """
        if self.policy == "stop":
            raise bad
        progress.skipped += 1
        progress.bad_steps += 1
        if progress.bad_steps >= self._most:
            raise NumericsError(f"{progress.bad_steps} steps in a row were refused, the last because {bad.problem}",
                                fix="resume with a lower --lr or --clip-grad, or look at the data; --max-bad-steps "
                                "sets how many are accepted")
