"""Whole training jobs under fire: kills, signals, bad numbers, determinism, no network. Ranks are forked."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from functools import lru_cache
from pathlib import Path

import torch

from mindspeed_wan.checkpoint.manifest import TRACKER_NAME, verify_manifest
from tests.faults import victims
from tests.faults.harness import Tally, Victim, kept_folder, wait_until
from tests.helpers.tiny import tiny_pipeline_folder
from tests.helpers.world import World, checkpoint_tensors, make_world, metrics

FSDP2 = ["--use-torch-fsdp2"]


@lru_cache(maxsize=1)
def world() -> World:
    """Return the files of one tiny job; every case reads them."""
    return make_world(kept_folder("world"), num_frames=5, size=(32, 48))


def start(save: Path, *flags: str, ranks: int = 1, patch: str = "", **options: object) -> list[Victim]:
    """Start a training job of forked ranks that saves into ``save``."""
    argv = world().flags(save, *flags, **options)  # type: ignore[arg-type]
    save.mkdir(parents=True, exist_ok=True)
    store = save.parent / f"{save.name}.rendezvous"
    store.unlink(missing_ok=True)
    logs = [save.parent / f"{save.name}.{rank}.log" for rank in range(ranks)]
    for log in logs:
        log.unlink(missing_ok=True)  # data workers of a killed job may still write to theirs
    return [Victim(victims.train, rank, ranks, str(store), argv, patch, log=logs[rank]) for rank in range(ranks)]


def finish(job: list[Victim], code: int = 0) -> str:
    """Wait for all ranks, require the exit code of each, return rank 0's output."""
    codes = [victim.wait() for victim in job]
    text = "".join(victim.output() for victim in job)
    assert codes == [code] * len(job), f"exit codes {codes}: {text[-800:]}"
    assert "Traceback" not in text, text[-800:]
    return job[0].output()


def steps(save: Path) -> int:
    """Return how many iterations the job has reported."""
    try:
        return (save / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _wait_for_step(save: Path, step: int, victim: Victim) -> None:
    wait_until(lambda: steps(save) >= step, f"step {step}", alive=victim)


def saved(save: Path) -> int:
    """Return the iteration that the tracker names, checked in full."""
    iteration = int((save / TRACKER_NAME).read_text())
    verify_manifest(save / f"iter_{iteration:07d}", full=True)
    return iteration


def assert_same_state(first: Path, second: Path, iteration: int) -> None:
    """Require bit-equal weights, moments and averages at ``iteration``."""
    name = f"iter_{iteration:07d}"
    wanted, found = checkpoint_tensors(first / name), checkpoint_tensors(second / name)
    assert wanted.keys() == found.keys()
    different = [key for key in wanted if not torch.equal(wanted[key], found[key])]
    assert not different, f"{len(different)} tensors differ at iteration {iteration}: {different[:3]}"


def assert_same_history(first: Path, second: Path) -> None:
    """Require the same losses, norms, rates and sample counts, bit for bit, at every iteration."""
    keys = ("iteration", "consumed_samples", "loss", "grad_norm", "lr", "sigma")
    histories = [[tuple(float(row[key]).hex() for key in keys) for row in metrics(path)] for path in (first, second)]
    assert histories[0] == histories[1]


# ---- T7: resume ----------------------------------------------------------------------------------------------

RESUMED = (
    (1, "high", []), (1, "low", ["--num-workers", "2"]), (1, "high", ["--ema-decay", "0.9", "--async-save"]),
    (2, "low", FSDP2), (2, "high", [*FSDP2, "--bf16", "--num-workers", "2"]),
    (1, "low", ["--micro-batch-size", "2", "--lr-warmup-iters", "4", "--lr-decay-style", "cosine", "--min-lr", "0"]),
    (2, "high", ["--tensor-model-parallel-size", "2", "--async-save"]),
    (2, "low", [*FSDP2, "--context-parallel-size", "2", "--ema-decay", "0.99"]),
)


def bitwise_resume(tally: Tally, count: int, folder: Path) -> None:
    """T7: killed at 7 and 13 of 20 steps and started again, a run ends with the bits of one that was left alone."""
    for number, (ranks, expert, flags) in enumerate(RESUMED[:count]):
        with tally.case(f"{expert} {ranks} {' '.join(flags)}"):
            straight, killed = folder / f"straight{number}", folder / f"killed{number}"
            finish(start(straight, *flags, ranks=ranks, expert=expert, iters=20))
            for at in (7, 13):
                job = start(killed, *flags, "--save-interval", "3", ranks=ranks, expert=expert, iters=20)
                _wait_for_step(killed, at, job[0])
                for victim in job:
                    victim.kill()
            output = finish(start(killed, *flags, "--save-interval", "3", ranks=ranks, expert=expert, iters=20))
            assert "resumed from" in output
            assert_same_history(straight, killed)
            assert_same_state(straight, killed, 20)


# ---- T10: signals --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _every_step() -> Path:
    """Return a run with a checkpoint at each of its 14 steps, to compare interrupted runs with."""
    save = kept_folder("straight") / "run"
    finish(start(save, "--save-interval", "1", iters=14))
    return save


def _signal_one(save: Path, rng: random.Random) -> None:
    """Signal a run at a random moment: it saves where it is, exits with 75, and has the bits of the straight run."""
    background = ["--async-save"] if rng.random() < 0.5 else []
    job = start(save, *background, "--save-interval", "2", iters=14)
    if rng.random() < 0.15:  # while encoders and data are still being opened
        wait_until(lambda: "loaded" in job[0].output(), "the weights", alive=job[0])
    else:
        _wait_for_step(save, rng.randrange(1, 9), job[0])
        time.sleep(rng.random() * 0.05)
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
    sent, twice = time.monotonic(), rng.random() < 0.2
    job[0].signal(number)
    if twice:
        job[0].signal(signal.SIGTERM)
    code = job[0].wait(60)
    assert time.monotonic() - sent < 60
    output = job[0].output()
    assert "Traceback" not in output, output[-500:]
    # Two signals that arrive within one Python instruction may be one: then the run saves as after the first.
    allowed = (75, 143) if twice else (75,)
    assert code in allowed or (code == 0 and steps(save) == 14), f"exit code {code}: {output[-500:]}"
    if code != 143:
        assert saved(save) == steps(save), "the step in which the signal came was not saved"
    assert_same_state(_every_step(), save, saved(save))


def signals(tally: Tally, count: int, folder: Path) -> None:
    """T10: SIGTERM and SIGUSR1 at random moments, during saves too, and a second one that ends the run at once."""
    for number in range(count):
        with tally.case(number):
            _signal_one(folder / str(number), random.Random(number))


# ---- T13: bad numbers ----------------------------------------------------------------------------------------

BAD = (
    # what goes wrong at which steps, ranks, flags, exit code, steps left out
    ("nan@3", 1, [], 5, 0), ("inf@3", 2, FSDP2, 5, 0), ("nan@3", 2, ["--tensor-model-parallel-size", "2"], 5, 0),
    ("nan@3", 1, ["--bad-step-policy", "skip"], 0, 1), ("inf@3,5", 2, [*FSDP2, "--bad-step-policy", "skip"], 0, 2),
    ("nan@5", 1, ["--bad-step-policy", "rollback", "--save-interval", "2"], 0, 1),
    ("nan@6", 2, [*FSDP2, "--bad-step-policy", "rollback", "--save-interval", "4", "--async-save"], 0, 1),
    ("nan@3,4,5,6,7", 1, ["--bad-step-policy", "skip"], 5, 0),
    ("nan@4,5,6", 1, ["--bad-step-policy", "rollback", "--save-interval", "2", "--max-bad-steps", "3"], 5, 0),
    ("nan@1", 1, ["--bad-step-policy", "rollback", "--save-interval", "2"], 5, 0),
    ("spike@22", 1, ["--loss-spike-factor", "10", "--bad-step-policy", "skip", "--train-iters", "23"], 0, 1),
    ("spike@22", 2, [*FSDP2, "--loss-spike-factor", "10", "--train-iters", "23"], 5, 0),
)


def _at(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(save / f"iter_{iteration:07d}")


def _bad_step(folder: Path, number: int) -> None:
    spec, ranks, flags, code, left_out = BAD[number]
    save = folder / f"bad{number}"
    first = int(spec.partition("@")[2].split(",")[0])
    interval = [] if "--save-interval" in flags else ["--save-interval", "1"]
    output = finish(start(save, *interval, *flags, ranks=ranks, iters=9, patch=f"bad_numbers:{spec}"), code)
    if code == 5 and "rollback" not in flags and "skip" not in flags:
        assert saved(save) == first - 1 == steps(save)
    if code != 0:
        return
    rows = metrics(save)
    assert [row["iteration"] for row in rows if row["skipped"]] == [int(s) for s in spec.partition("@")[2].split(",")]
    assert sum(row["skipped"] for row in rows) == left_out and rows[-1]["iteration"] in (9, 23)
    assert all(math.isfinite(row["loss"]) for row in rows if not row["skipped"])
    if "skip" in flags:
        before, after = _at(save, first - 1), _at(save, first)
        assert all(torch.equal(before[key], after[key]) for key in before), "a step that was left out moved something"
    if "rollback" in flags:
        assert "the weights go back to those of iteration 4" in output
    progress = json.loads((save / f"iter_{saved(save):07d}" / "training.json").read_text())
    assert progress["skipped"] == left_out and progress["bad_steps"] == 0


def bad_numbers(tally: Tally, count: int, folder: Path) -> None:
    """T13: NaN, Inf and spikes on one rank alone: all ranks agree, nothing moves, the policy is followed."""
    for number in range(min(count, len(BAD))):
        with tally.case(BAD[number]):
            _bad_step(folder, number)


# ---- T14, T24 ------------------------------------------------------------------------------------------------


def determinism(tally: Tally, count: int, folder: Path) -> None:
    """T14: the same seed gives the same bits, whatever the workers: fp32 and bf16, two ranks."""
    for number in range(count):
        precision, workers = ("--fp32", "--bf16")[number % 2], ("0", "2")[number // 2 % 2]
        with tally.case(f"{number} {precision} {workers} workers"):
            save = folder / str(number)
            finish(start(save, *FSDP2, precision, "--num-workers", workers, "--deterministic", ranks=2, iters=3))
            reference = folder / str(number % 2)
            assert_same_history(reference, save)
            assert_same_state(reference, save, 3)


def offline(tally: Tally, count: int, folder: Path) -> None:
    """T24: with every connection refused, training, conversion and generation run and try none."""
    record = folder / "attempts"
    model = tiny_pipeline_folder()
    video = ["--task", "t2v-A14B", "--ckpt_dir", str(model), "--size", "96*64", "--frame_num", "5", "--sample_steps",
             "2", "--dtype", "fp32", "--prompt", "a cat", "--save_path", str(folder / "out")]
    jobs = (
        lambda: start(folder / "train", iters=1, patch=f"no_network:{record}")[0],
        lambda: Victim(victims.convert, ["hf_to_dcp", str(model / "transformer"), str(folder / "dcp"), "--quiet"],
                       str(record), log=folder / "convert.log"),
        lambda: Victim(victims.generate, str(record), video, log=folder / "generate.log"),
    )
    for number, job in enumerate(jobs[:count]):
        with tally.case(("train", "convert", "generate")[number]):
            begun = time.monotonic()
            finish([job()])
            assert not record.exists(), f"connections were tried: {record.read_text()}"
            assert time.monotonic() - begun < 240
