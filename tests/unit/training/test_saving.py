"""What a run may go back to: its own saves, never what another run left in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.lock import FolderLock
from mindspeed_wan.config.schema import CheckpointSection
from mindspeed_wan.errors import NumericsError
from mindspeed_wan.training.saving import Saver
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.training import TinyRun, tiny_run

CARD = {"task": "t2v", "expert": "high", "boundary": 0.875, "shift": 5.0}


def saver(run: TinyRun, folder: Path, start: int) -> Saver:
    return Saver(CheckpointSection(save=str(folder)), run.views(), run.optimizer, run.ema, CARD, FolderLock(folder),
                 start=start)


def test_a_run_that_began_at_zero_does_not_go_back_to_anothers_save(tmp_path: Path) -> None:
    run = tiny_run(1, str(tiny_pipeline_folder() / "transformer"), {})
    dcp.save(tmp_path, run.state(), dcp.Record(dcp.Progress(iteration=3), CARD))
    assert saver(run, tmp_path, start=3).roll_back() == 3  # it went on from there
    finetunes = saver(run, tmp_path, start=0)
    with pytest.raises(NumericsError, match="no checkpoint to go back to"):
        finetunes.roll_back()
    finetunes.save(dcp.Progress(iteration=4), wait=True)
    assert finetunes.roll_back() == 4
