"""Where everything of one world lies, and stages that are done once: a world that was stopped goes on.

The folder holds ``models/`` (Diffusers folders), ``data/``, ``cache/``, ``runs/``, ``videos/``, ``logs/`` and
``stages/``, one small JSON file per finished stage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mindspeed_wan.demo.commands import Command, claim_folder, find_repository, make_folder, run_together

EXPERTS = ("high", "low")
TRANSFORMER = {"high": "transformer", "low": "transformer_2"}
TASKS: tuple[Literal["t2v", "i2v"], ...] = ("t2v", "i2v")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long everything takes. The defaults are the full world; ``SHORT`` only shows that every part fits.

    Attributes:
        clips_per_scene: training clips of each trained combination.
        iterations: optimizer steps per expert, by kind of run.
        batch_size: clips per step.
        copies: videos generated for each held-out combination.
        steps: sampling steps.
    """

    clips_per_scene: int = 24
    iterations_t2v: int = 8000
    iterations_i2v: int = 2000
    iterations_lora: int = 500
    batch_size: int = 32
    copies: int = 8
    steps: int = 20


SHORT = Effort(clips_per_scene=1, iterations_t2v=6, iterations_i2v=4, iterations_lora=3, batch_size=4, copies=1,
               steps=8)
"""Eight steps are four per expert: fewer than three would leave nothing to calibrate step caches on."""


@dataclass(frozen=True)
class World:
    """One world in one folder."""

    out: Path
    repository: Path
    effort: Effort
    seed: int

    @classmethod
    def at(cls, out: Path, *, effort: Effort, seed: int = 0) -> World:
        """Open or start the world in ``out``; one that was made with another effort or seed is refused."""
        claim_folder(out, "world.json", {**asdict(effort), "seed": seed})
        return cls(out.resolve(), find_repository(), effort, seed)

    def model(self, name: str) -> Path:
        """A Diffusers folder: ``t2v``, ``i2v`` (not trained), ``t2v_trained``, ``i2v_trained``, ``t2v_swapped``."""
        return self.out / "models" / name

    def data(self, name: str) -> Path:
        """Clips and annotations: ``base`` or ``new``."""
        return self.out / "data" / name

    def cache(self, name: str) -> Path:
        """Features: ``t2v``, ``i2v``, ``new``."""
        return self.out / "cache" / name

    def files(self, name: str) -> Path:
        """The folder of a run's model.json and data.json."""
        return self.out / "files" / name

    def runs(self, name: str, expert: str) -> Path:
        """The save path of one expert's run: of ``t2v``, ``i2v`` or ``lora``."""
        return self.out / "runs" / name / expert

    def videos(self, name: str) -> Path:
        """Generated videos of one judgement."""
        return self.out / "videos" / name

    def run(self, *commands: Command) -> None:
        """Run commands at the same time; their logs are kept. One thread each: tensors this small gain from no more."""
        limited = [Command(c.name, c.words, {"OMP_NUM_THREADS": "1", **c.environment}) for c in commands]
        run_together(limited, repository=self.repository, logs=self.out / "logs")

    def result(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage has left."""
        found: dict[str, Any] = json.loads(self._done(stage).read_text(encoding="utf-8"))
        return found

    def _done(self, stage: str) -> Path:
        return self.out / "stages" / f"{stage}.json"

    def walk(self, stages: Sequence[tuple[str, str, Callable[[World], dict[str, Any] | None]]]) -> float:
        """Run the (name, title, function) stages that are not done yet, in order; return the seconds of all."""
        make_folder(self.out / "stages")
        for number, (name, title, function) in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}]"
            if self._done(name).is_file():
                print(f"{head} {title}: done before", flush=True)
                continue
            print(f"\n{head} {title}", flush=True)
            started = time.monotonic()
            found = {**(function(self) or {}), "seconds": round(time.monotonic() - started, 1)}
            self._write(name, found)
            print(f"{head} done in {found['seconds']} s", flush=True)
        return float(sum(self.result(name)["seconds"] for name, _, _ in stages))

    def _write(self, stage: str, found: dict[str, Any]) -> None:
        path = self._done(stage)
        staging = path.with_suffix(".tmp")
        staging.write_text(json.dumps(found, indent=2), encoding="utf-8")
        os.replace(staging, path)
