"""The training loop: steps, reports, evaluations and saves until the run is done or asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mindspeed_wan.checkpoint.dcp import Progress
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import StopRequested
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.platforms.rank import beat
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.encoders import Features
from mindspeed_wan.training.guard import BadStepError, Guard
from mindspeed_wan.training.lr_schedule import Schedule
from mindspeed_wan.training.metrics import IterationReport, MetricsWriter, Throughput, log_line
from mindspeed_wan.training.optimizer import AdamW
from mindspeed_wan.training.saving import Saver
from mindspeed_wan.training.source import Feed
from mindspeed_wan.training.step import TrainStep
from mindspeed_wan.training.stop import StopRequest
from mindspeed_wan.training.validation import ValidationLoss


@dataclass
class Run:
    """Everything one run works with; ``setup.prepare`` makes it.

    ``evaluate`` returns the validation loss and ``show`` writes the validation videos of an iteration (both
    collective); ``writer`` is ``None`` on ranks other than 0 and where nothing is saved; ``saver`` is ``None`` without
    ``--save``.
    """

    config: RunConfig
    platform: Platform
    step: TrainStep
    optimizer: AdamW
    schedule: Schedule
    progress: Progress
    features: Iterator[Features]
    source: Feed
    rates: Throughput
    guard: Guard
    first_rank: bool
    ema: Ema | None = None
    saver: Saver | None = None
    writer: MetricsWriter | None = None
    evaluate: Callable[[], ValidationLoss] | None = None
    show: Callable[[int, Callable[[], bool]], None] | None = None


def train(run: Run, stop: StopRequest) -> None:
    """Run the remaining iterations, until ``stop`` is asked for on any rank.

    Raises:
        StopRequested: after saving, when a signal, the time limit or ``--exit-interval`` ended the run early.
        NumericsError: a loss or gradient was refused and ``--bad-step-policy`` is to stop, or too many in a row.
    """
    total = run.config.training.train_iters
    meter = _Meter(run)
    while run.progress.iteration < total:
        report, stopping = _iteration(run, stop)
        meter.add(report)
        if run.saver is not None:
            run.saver.poll()
        _evaluate_if_due(run)
        last = run.progress.iteration == total
        stopping = stopping or _exit_interval_reached(run)
        if run.saver is not None and (last or stopping or _due(run.config.checkpoint.save_interval, run)):
            run.saver.save(run.progress, wait=last or stopping)
        if run.show is not None and not stopping and _due(run.config.validation.video_interval, run):
            # After the save, which a stop or a failure here must not lose.
            run.show(run.progress.iteration, lambda: stop.wanted)
        if stopping and not last:
            raise _stopped(run, stop)


def _iteration(run: Run, stop: StopRequest) -> tuple[IterationReport, bool]:
    """Do one optimizer step; returns its report and whether the job agreed to stop."""
    progress, started, waited = run.progress, time.perf_counter(), run.source.waited
    rate = run.schedule.learning_rate(progress.consumed_samples)
    accumulated = run.step.accumulate(run.features, stop=stop.wanted)
    try:
        norm = run.step.update(run.optimizer, accumulated, iteration=progress.iteration + 1, learning_rate=rate,
                               weight_decay=run.schedule.weight_decay(progress.consumed_samples),
                               loss_limit=run.guard.limit(progress))
        run.guard.accepted(accumulated.loss, progress)
        skipped = False
        if run.ema is not None:
            run.ema.update(run.optimizer.masters())
    except BadStepError as bad:
        norm, skipped = bad.norm, True
        _leave_out(run, bad)
    beat(progress.iteration + 1)
    if run.ema is not None:
        progress.ema_updates = run.ema.updates
    progress.iteration += 1
    progress.consumed_samples += run.rates.global_batch_size
    progress.optimizer_steps = run.optimizer.steps
    report = IterationReport(
        iteration=progress.iteration, consumed_samples=progress.consumed_samples, loss=accumulated.loss,
        grad_norm=norm, lr=rate, sigma=accumulated.sigma, seconds=time.perf_counter() - started,
        data_seconds=run.source.waited - waited, skipped=skipped, sigma_counts=accumulated.sigma_counts,
        peak_memory_bytes=run.platform.peak_memory_bytes(),
    )
    return report, accumulated.stop


def _leave_out(run: Run, bad: BadStepError) -> None:
    """Drop the step's gradients; the data position goes on. Going back undoes the updates since the last save, too."""
    run.guard.refused(bad, run.progress)
    run.optimizer.zero_grad()
    told = f"warning: {bad.problem}: the step is left out"
    if run.guard.policy == "rollback" and run.saver is not None:
        told += f", the weights go back to those of iteration {run.saver.roll_back()}"
    if run.first_rank:
        print(f" {told}", flush=True)


class _Meter:
    """Writes every report, and prints the mean over each logging interval."""

    def __init__(self, run: Run) -> None:
        self._run, self._reports = run, list[IterationReport]()

    def add(self, report: IterationReport) -> None:
        run = self._run
        if not run.first_rank:
            return
        if run.writer is not None:
            run.writer.write(report)
        self._reports.append(report)
        if report.iteration % run.config.logging.log_interval and report.iteration < run.config.training.train_iters:
            return
        means = self._means(self._reports, "seconds", "data_seconds", "sigma")
        means.update(self._means([r for r in self._reports if not r.skipped] or self._reports, "loss"))
        mean = IterationReport(**{**vars(report), **means})
        print(log_line(mean, run.config.training.train_iters, run.rates, skipped=run.progress.skipped,
                       peak_memory=report.peak_memory_bytes), flush=True)
        self._reports.clear()

    @staticmethod
    def _means(reports: list[IterationReport], *names: str) -> dict[str, float]:
        return {name: sum(getattr(r, name) for r in reports) / len(reports) for name in names}


def _due(interval: int | None, run: Run) -> bool:
    return interval is not None and run.progress.iteration % interval == 0


def _exit_interval_reached(run: Run) -> bool:
    return _due(run.config.training.exit_interval, run)


def _evaluate_if_due(run: Run) -> None:
    if run.evaluate is None or not _due(run.config.training.eval_interval, run):
        return
    found = run.evaluate()
    if run.first_rank:
        print(f" validation loss at iteration {run.progress.iteration}: {found.describe()}", flush=True)
    if run.writer is not None:
        run.writer.validation(found.loss, run.progress.iteration, quartiles=found.quartiles,
                              sigma_bounds=found.sigma_bounds)


def _stopped(run: Run, stop: StopRequest) -> StopRequested:
    total, done = run.config.training.train_iters, run.progress.iteration
    reason = stop.reason if stop.wanted else "--exit-interval" if _exit_interval_reached(run) else stop.reason
    saved = "saved" if run.saver is not None else "nothing was saved (no --save)"
    return StopRequested(f"stopped by {reason} after iteration {done} of {total}; {saved}",
                         fix="run the same command again to go on" if run.saver is not None else "set --save")
