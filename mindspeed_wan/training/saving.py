"""When and how a run saves: the state of this very moment, in the foreground or while training goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.background import BackgroundSave, background_group
from mindspeed_wan.checkpoint.dcp import Progress, Record
from mindspeed_wan.checkpoint.lock import FolderLock
from mindspeed_wan.config.schema import CheckpointSection
from mindspeed_wan.errors import NumericsError
from mindspeed_wan.parallel.agreement import first_decides, is_first
from mindspeed_wan.training.adapters import AdapterFiles
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.optimizer import AdamW


class Saver:
    """Saves one run under ``section.save``. Collective to create and in every method.

    Args:
        section: the ``checkpoint`` section of the configuration.
        views: parameter name -> global view.
        optimizer: masters and moments.
        ema: the average, if there is one.
        card: content of ``wan.json``.
        lock: the folder's, held by rank 0.
        adapters: writes the adapter files of a LoRA run into each folder.
        start: the iteration that the run starts from.
    """

    def __init__(self, section: CheckpointSection, views: Mapping[str, Tensor], optimizer: AdamW, ema: Ema | None,
                 card: Mapping[str, Any], lock: FolderLock, adapters: AdapterFiles | None = None, *,
                 start: int = 0) -> None:
        assert section.save is not None
        self.root = Path(section.save)
        self._section, self._views, self._optimizer, self._ema, self._card = section, views, optimizer, ema, card
        self._lock, self._adapters = lock, adapters
        self._group = background_group() if section.async_save else None
        self._pending: BackgroundSave | None = None
        self._saved: int | None = None
        self._start = start

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Save the current state; does nothing when this iteration is saved already.

        Args:
            progress: how far the run is.
            wait: be done when this returns (the last save of a run), whatever ``--async-save`` says.
        """
        self._finish_pending()
        if self._saved == progress.iteration:
            return
        started = time.perf_counter()
        state = dcp.state_views(self._views, self._optimizer, with_moments=not self._section.no_save_optim,
                                ema=None if self._ema is None else self._ema.averages)
        attach = None if self._adapters is None else self._adapters.take(progress.iteration)
        record = Record(replace(progress), self._card, self._section.keep_last, attach)
        self._saved = progress.iteration
        if self._section.async_save:
            self._pending = BackgroundSave(self.root, state, record, self._group)
            if wait:
                self._finish_pending()
            return
        _announce(dcp.save(self.root, state, record), time.perf_counter() - started)

    def poll(self) -> None:
        """Commit a background save that every rank has finished writing; cheap when there is none."""
        self._lock.touch()
        if self._pending is not None and self._pending.done_everywhere():
            self._finish_pending()

    def roll_back(self) -> int:
        """Take weights, moments and average back to the newest save and return its iteration.

        Raises:
            NumericsError: nothing has been saved yet.
        """
        self._finish_pending()
        found = None
        if self._start or self._saved is not None:  # else it is another run's (--finetune)
            found = first_decides(lambda: dcp.newest(self.root, warn=_announce_damage))
        if found is None or found.iteration is None:
            raise NumericsError("there is no checkpoint to go back to", where=str(self.root),
                                fix="lower --save-interval, or use --bad-step-policy skip")
        progress = dcp.load(found, self._views, self._optimizer, ema=None if self._ema is None else self._ema.averages)
        if self._ema is not None:
            self._ema.updates = progress.ema_updates
        return found.iteration

    def close(self) -> None:
        """Let other jobs write the folder."""
        self._lock.release()

    def _finish_pending(self) -> None:
        if self._pending is None:
            return
        started = time.perf_counter()
        folder, self._pending = self._pending.finish(), None
        _announce(folder, time.perf_counter() - started)


def _announce_damage(text: str) -> None:
    print(f" {text}", flush=True)


def _announce(folder: Path, seconds: float) -> None:
    if is_first():
        print(f" saved {folder} ({seconds:.1f} s of training time)", flush=True)
