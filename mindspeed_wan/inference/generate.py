"""``inference_sora.py``'s main: a command line in, videos and their sidecars out, finished ones skipped.

Replica ``r`` of the job takes every ``replicas``-th video. What is finished is decided once, by rank 0, so that all
ranks agree even when files appear while the job starts.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import EXIT_OK
from mindspeed_wan.inference import flags, video_io
from mindspeed_wan.inference.options import GenerateOptions, VideoJob, settings_hash

if TYPE_CHECKING:
    from mindspeed_wan.inference.pipeline import GeneratedVideo, WanGenerator

_SMALLER = ("--memory sequential or block, --quantize, more ranks (--ulysses_size, --dit_fsdp, --vae_parallel), or "
            "fewer frames; mindspeed-wan plan --infer shows what a layout needs")
_AGAIN = "run the same command again: finished videos are kept"


def main(argv: Sequence[str] | None = None) -> int:
    """Generate what the command line asks for; returns the exit code.

    Raises:
        WanError: bad flags or weights, not enough memory, a lost rank; ``errors.run_main`` turns it into a message.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(flags.help_text())
        return EXIT_OK
    options = flags.parse(argv)
    # From here on torch is needed; everything a typo can break has been checked.
    from mindspeed_wan.inference.pipeline import WanGenerator
    from mindspeed_wan.parallel.agreement import barrier
    from mindspeed_wan.parallel.failures import explained
    from mindspeed_wan.parallel.groups import destroy

    with explained(smaller=_SMALLER, again=_AGAIN):
        generator = WanGenerator.from_options(options, whole_list=True)
        _run(generator)
        barrier()
        if generator.runtime.rank == 0:
            _write_gallery(generator)
    destroy()  # not after an error: the other ranks may not come to the meeting
    return EXIT_OK


def _run(generator: WanGenerator) -> None:
    """Make every video of this rank's replica that is not there yet."""
    from mindspeed_wan.inference.calibration import MIN_STEPS
    from mindspeed_wan.parallel.agreement import first_decides

    runtime = generator.runtime
    if generator.options.base_seed < 0:
        seed = first_decides(lambda: random.SystemRandom().randrange(2**31))
        generator.options = replace(generator.options, base_seed=seed)
    options = generator.options
    jobs = options.jobs()
    say = print if runtime.rank == 0 else _silent
    say(f"{generator.folder.task} from {options.ckpt_dir or options.high_noise_ckpt}, {options.dtype} on "
        f"{runtime.platform.name}; {runtime.layout.describe()}", flush=True)
    high, low = generator.schedule(options).expert_steps(options.boundary)
    say(f"{len(jobs)} video{'s' if len(jobs) > 1 else ''} of {options.size[1]}x{options.size[0]}x{options.num_frames}; "
        f"{options.solver} on the {options.grid} grid, shift {options.shift:g}, {high} + {low} steps (high + low)",
        flush=True)
    if options.guidance_limits:
        say(generator.guidance_plan(options).describe(), flush=True)
        if runtime.layout.cfg > 1:
            say("note: with --cfg_size 2 the branches run side by side, so leaving one out saves no time", flush=True)
    if options.lora.looks_distilled() and options.steps is not None and options.steps > 8:
        say(f"note: an adapter's name says few steps, but {options.steps} are asked for; --sample_preset lightx2v "
            "takes 4 Euler steps without guidance", flush=True)
    calibrates = options.cache.calibrate is not None
    if calibrates and any(0 < steps < MIN_STEPS for steps in (high, low)):
        say(f"note: {high} + {low} steps are too few for TeaCache's polynomials ({MIN_STEPS} of each expert are "
            f"needed); {options.cache.calibrate} will serve MagCache only", flush=True)
    # A finished video is what it is, but what a calibration measures has to be seen.
    resumes = options.resume and not calibrates
    finished = first_decides(lambda: [job.index for job in jobs if resumes and _is_finished(generator, job)])
    if finished:
        say(f"{len(finished)} of {len(jobs)} were finished earlier (--resume false makes them again)", flush=True)
    todo = [job for job in jobs if job.index not in finished]
    mine = todo[runtime.replica :: runtime.layout.replicas]
    outputs = [job.output for job in mine if runtime.leads]
    if options.cache.calibrate is not None and runtime.rank == 0:
        outputs.append(options.cache.calibrate)
    runtime.agree(lambda: video_io.check_writable(outputs))
    started = time.perf_counter()
    generator.prompts.encode([text for job in mine for text in (job.prompt, options.negative_prompt)])
    generator.prompts.release()
    if mine:
        say(f"encoded the prompts in {time.perf_counter() - started:.1f} s", flush=True)
    for job in mine:
        _make(generator, job, len(jobs))


def _make(generator: WanGenerator, job: VideoJob, total: int) -> None:
    runtime, options = generator.runtime, generator.options
    runtime.platform.reset_peak_memory()
    started = time.perf_counter()
    bar = ProgressBar(f"video {job.index + 1}/{total}", options.steps or 0, shown=runtime.rank == 0)
    planned = generator.plan is not None
    result = generator.generate(job, on_progress=bar.step)
    bar.close()
    if not planned and generator.plan is not None and runtime.rank == 0:
        print(generator.plan.describe(), flush=True)
    if runtime.leads:
        _write(generator, job, result, time.perf_counter() - started)


def _write(generator: WanGenerator, job: VideoJob, result: GeneratedVideo, seconds: float) -> None:
    """Write the files of a video, the sidecar last: its presence says that all others are whole."""
    options, started = generator.options, time.perf_counter()
    assert result.video is not None
    frames = video_io.to_frames(result.video)
    video_io.write_mp4(job.output, frames, fps=result.fps, crf=options.crf)
    files = {"video": str(job.output)}
    if options.save_frames:
        files["frames"] = str(job.output.with_suffix(""))
        video_io.write_frames(job.output.with_suffix(""), frames)
    if options.save_latents is not None:
        path = _latents_path(options, job)
        files["latents"] = str(path)
        video_io.write_latents(path, result.latents, result.settings)
    if options.contact_sheet:
        files["contact_sheet"] = str(job.output.with_suffix(".png"))
        video_io.write_contact_sheet(job.output.with_suffix(".png"), frames)
    stages = {**result.seconds, "write": time.perf_counter() - started}
    record = _record(generator, job, result, stages)
    video_io.write_json(sidecar(job), {**record, "files": files, "total_seconds": seconds + stages["write"]})
    shown = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
    print(f"wrote {job.output} ({shown} s; peak {record['peak_memory_gib']:.2f} GiB)", flush=True)


def _record(
    generator: WanGenerator, job: VideoJob, result: GeneratedVideo, stages: dict[str, float]
) -> dict[str, Any]:
    import torch

    import mindspeed_wan

    assert result.video is not None
    runtime, settings = generator.runtime, result.settings
    height, width = result.video.shape[-2:]
    return {
        "video": str(job.output), "prompt": job.prompt, "seed": job.seed, "width": width, "height": height,
        "num_frames": settings["num_frames"], "settings": settings, "settings_hash": settings_hash(settings),
        "seconds": {name: round(value, 4) for name, value in stages.items()},
        "step_seconds": {name: [round(value, 4) for value in values] for name, values in result.steps.items()},
        "dit_evaluations": result.evaluations,
        "peak_memory_gib": runtime.platform.peak_memory_bytes() / 2**30,
        "layout": asdict(runtime.layout), "memory": generator.plan.mode if generator.plan else None,
        "device": runtime.platform.device_name(), "weights": str(generator.options.ckpt_dir or ""),
        "versions": {"mindspeed_wan": mindspeed_wan.__version__, "torch": torch.__version__},
    }


def sidecar(job: VideoJob) -> Path:
    """Return the path of a video's JSON."""
    return job.output.with_suffix(".json")


def _latents_path(options: GenerateOptions, job: VideoJob) -> Path:
    path = options.save_latents
    assert path is not None
    many = len(options.prompts) * options.videos_per_prompt > 1
    return path.with_name(f"{path.stem}_{job.index}{path.suffix}") if many else path


def _is_finished(generator: WanGenerator, job: VideoJob) -> bool:
    record = video_io.read_json(sidecar(job))
    if record is None or not all(Path(file).exists() for file in record.get("files", {}).values()):
        return False
    if generator.options.save_latents is not None and "latents" not in record.get("files", {}):
        return False
    settings = generator.options.settings(job, generator.folder.identity)
    return bool(record.get("settings_hash") == settings_hash(settings))


def _write_gallery(generator: WanGenerator) -> None:
    jobs = generator.options.jobs()
    records = [record for record in (video_io.read_json(sidecar(job)) for job in jobs) if record]
    if len(records) > 1:
        path = jobs[0].output.parent / "index.html"
        video_io.write_gallery(path, records, title=f"{generator.folder.task}: {len(records)} videos")
        print(f"wrote {path}", flush=True)


def _silent(*_: object, **__: object) -> None:
    pass


class ProgressBar:
    """``video 1/3 [high] 5/40`` with seconds per step and time left; one plain line per step where no terminal is."""

    def __init__(self, title: str, steps: int, *, shown: bool) -> None:
        self._title, self._steps, self._bar = title, steps, None
        self._shown = shown
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True)

    def step(self, done: int, expert: str, seconds: float) -> None:
        """Show that ``done`` steps are done, the last one by ``expert``."""
        if self._bar is not None:
            self._bar.set_description(f"{self._title} [{expert}]")
            self._bar.update(done - self._bar.n)
        elif self._shown and (done == self._steps or done % max(1, self._steps // 10) == 0):
            left = (self._steps - done) * seconds
            print(f"{self._title} [{expert}] step {done}/{self._steps}, {seconds:.2f} s/step, {left:.0f} s left",
                  file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()


def run() -> None:
    """Run ``main`` as a program (``inference_sora.py``)."""
    import warnings

    from mindspeed_wan.errors import run_main

    warnings.filterwarnings("ignore", module=r"megatron\..*")  # absent Apex and Transformer Engine are no news here
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_main(main)
