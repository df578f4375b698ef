"""What --bad-step-policy rollback needs is asked for before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_wan.config.flags import parse
from mindspeed_wan.errors import ConfigError
from tests.unit.config.world import World


def flags(tmp_path: Path, *more: str, save_optim: bool = True) -> list[str]:
    argv = World(tmp_path).argv(*more)
    return [word for word in argv if word != "--no-save-optim"] if save_optim else argv


def test_rollback_needs_the_optimizer_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the optimizer state"):
        parse(flags(tmp_path, "--bad-step-policy", "rollback", save_optim=False), {"WORLD_SIZE": "8"})
    config = parse(flags(tmp_path, "--bad-step-policy", "rollback"), {"WORLD_SIZE": "8"})
    assert config.training.bad_step_policy == "rollback" and config.training.max_bad_steps == 5


@pytest.mark.parametrize(("words", "message"), [
    (["--bad-step-policy", "ignore"], "does not know 'ignore'"),
    (["--loss-spike-factor", "1"], "greater than 1"),
    (["--max-bad-steps", "0"], "at least 1"),
])
def test_values_that_make_no_sense_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags(tmp_path, *words), {"WORLD_SIZE": "8"})
