"""`mindspeed-wan accelerate`: which of the faster ways to generate a model stands, measured on its own videos.

The exact videos come first, then those of every candidate: a name and flags of ``inference_sora.py``, so anything that
has a flag can be a candidate. Candidates that only change the steps share the loaded model.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import ConfigError, WanError

if TYPE_CHECKING:
    from mindspeed_wan.evaluation.acceleration import Result, Run
    from mindspeed_wan.inference.options import GenerateOptions
    from mindspeed_wan.inference.pipeline import WanGenerator

EXIT_GATE = 1
"""A candidate misses a threshold."""
TABLE = "calibration.json"
"""Step-cache values measured on this model, in the folder of the report."""
_PER_CALL = ("cache", "guidance_limits", "guidance", "steps", "shift", "solver", "grid")
"""Options that a loaded model takes with every call; any other needs the model loaded anew."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the gate, the model, and the flags of the exact run."""
    _add_options(parser)
    parser.add_argument("model", metavar="MODEL", help="any folder that inference_sora.py --ckpt_dir takes")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--prompt TEXT ...",
                        help="flags of inference_sora.py: prompts, size, steps ... of the exact run")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--try", action="append", default=[], metavar="NAME=FLAGS", dest="tries",
                        help="a candidate: flags added to the exact run, such as 'mag=--step_cache magcache'; repeat "
                        "for several (without any: a suite of 8-bit weights, guidance plans, and caches "
                        "with values measured on this model); {table} in FLAGS is the measured table")
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="gate: least PSNR of any video to its exact one")
    parser.add_argument("--min-ssim", type=float, help="gate: least SSIM of any video to its exact one")
    parser.add_argument("--min-speedup", type=float, help="gate: least speed-up of the denoising steps")
    parser.add_argument("--out", type=Path, default=Path("acceleration"), help="folder of report, table and videos")


@dataclass(frozen=True)
class Candidate:
    """A name and the flags that are added to the exact run; one of the suite may turn out not to apply."""

    name: str
    words: tuple[str, ...]
    optional: bool = False

    def ready(self, table: Path) -> list[str]:
        """Return the flags with the measured table's path in them."""
        return [word.replace("{table}", str(table)) for word in self.words]


def suite(steps: int) -> list[Candidate]:
    """Return what is tried when nothing is asked for, for runs of ``steps`` steps."""
    found = {
        "int8 weights": "--quantize int8_weight_only",
        "fp8 weights": "--quantize fp8_weight_only",
        **{f"magcache {t}": f"--step_cache magcache --cache_table {{table}} --cache_retention 0.2 --cache_threshold {t}"
           for t in (0.03, 0.06, 0.12)},
        **{f"teacache {t}": f"--step_cache teacache --cache_table {{table}} --cache_threshold {t}"
           for t in (0.1, 0.2)},
        **{f"taylorseer {i}": f"--step_cache taylorseer --cache_interval {i}" for i in (2, 3)},
        **{f"skip {r}": f"--cfg_skip_ratio {r}" for r in (0.25, 0.5)},
        "interval": f"--cfg_steps {steps // 10},{steps * 3 // 4}",
        "gate": f"--cfg_gate {max(1, steps // 2)}",
        "magcache 0.06 + gate": "--step_cache magcache --cache_table {table} --cache_retention 0.2 --cache_threshold "
                                f"0.06 --cfg_gate {max(1, steps // 2)}",
    }
    return [Candidate(name, tuple(flags.split()), optional=True) for name, flags in found.items()]


def parse_candidate(text: str) -> Candidate:
    """Read ``NAME=FLAGS``."""
    name, separator, flags = text.partition("=")
    if not separator or not name.strip() or not flags.strip().startswith("--"):
        raise ConfigError(f"--try {text!r} is not NAME=FLAGS", fix="for example --try 'skip=--cfg_skip_ratio 0.25'")
    return Candidate(name.strip(), tuple(shlex.split(flags)))


def run(args: argparse.Namespace) -> int:
    """Generate, compare, write the report; returns 1 when a candidate misses a threshold."""
    inner = argparse.ArgumentParser(prog="mindspeed-wan accelerate", add_help=False, allow_abbrev=False)
    _add_options(inner)
    args, words = inner.parse_known_args(args.flags, namespace=args)
    from mindspeed_wan.inference.flags import parse

    words = ["--ckpt_dir", args.model, *words]
    exact = parse(words)
    _check_exact(exact)
    candidates = [parse_candidate(text) for text in args.tries]
    names = ["exact", *(candidate.name for candidate in candidates)]
    for candidate in candidates:
        if names.count(candidate.name) > 1:
            raise ConfigError(f"--try: the name {candidate.name!r} is taken")
        _parsed(candidate, words, args.out / TABLE)  # a typo is found before anything is generated
    return _run(args, words, exact, candidates)


def _run(args: argparse.Namespace, words: list[str], exact: GenerateOptions, candidates: list[Candidate]) -> int:
    from mindspeed_wan.inference.pipeline import WanGenerator
    from mindspeed_wan.parallel.agreement import barrier
    from mindspeed_wan.parallel.groups import destroy

    trial = _Trial(args, words, candidates, WanGenerator.from_options(exact, whole_list=True))
    results = trial.results()
    code = trial.report(results) if trial.leads else 0
    barrier()
    destroy()
    return code


def _check_exact(options: GenerateOptions) -> None:
    """Refuse what has no meaning for the exact run."""
    from mindspeed_wan.parallel.inference_layout import raise_problems

    found = []
    if options.cache.method != "none" or options.cache.calibrate or options.guidance_limits:
        found.append("the flags after MODEL describe the exact run, without step cache or guidance limits; give those "
                     "as candidates: --try 'NAME=FLAGS'")
    if options.layout.replicas > 1:
        found.append(f"{options.layout.describe()}: one video is made at a time here; use all ranks for it "
                     "(--ulysses_size, --cfg_size, --tensor_size)")
    if options.save_file or options.save_path or options.save_latents or options.save_frames:
        found.append("--save_file, --save_path, --save_latents and --save_frames: videos go to the folder of --out")
    if options.base_seed < 0:
        found.append("--base_seed -1: every candidate repeats the exact run's seeds; give one")
    raise_problems(found)


def _parsed(candidate: Candidate, words: list[str], table: Path) -> GenerateOptions:
    """Return the options of a candidate; the table may still have to be measured."""
    from mindspeed_wan.inference.flags import parse

    # An existing path stands in until then: what is checked here is the flags.
    try:
        return parse([*words, *candidate.ready(table if table.is_file() else Path(__file__))])
    except ConfigError as error:
        raise ConfigError(f"candidate {candidate.name!r}: {error}") from None


@dataclass
class _Trial:
    """One run of the command; ``generator`` is loaded anew for candidates that need it."""

    args: argparse.Namespace
    words: list[str]
    candidates: list[Candidate]
    generator: WanGenerator
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leads, self.exact = self.generator.runtime.leads, self.generator.options

    def results(self) -> list[Result]:
        """Make every video and measure it. Collective; results are there on the leading rank."""
        from mindspeed_wan.evaluation.acceleration import Thresholds, summarise

        thresholds = Thresholds(min_psnr_db=self.args.min_psnr, min_ssim=self.args.min_ssim,
                                min_speedup=self.args.min_speedup)
        exact = self._exact_videos()
        results = []
        # Those that share the loaded model come first: it is then given up for the others.
        for candidate, options in sorted(self._prepared(), key=lambda pair: self._needs_loading(pair[1])):
            if self._needs_loading(options) and not self._load(candidate, options):
                continue
            runs = self._videos(candidate.name, options)
            if self.leads:
                flags = shlex.join(candidate.ready(self.args.out / TABLE))
                results.append(summarise(candidate.name, flags, runs, exact, thresholds))
                self._say(_line(results[-1]))
        return results

    def _exact_videos(self) -> list[Run]:
        """Measure the step-cache table while everything warms up, then make the exact videos."""
        self._say("measuring step-cache values while everything warms up")
        self.args.out.mkdir(parents=True, exist_ok=True)
        self._encode(self.exact)
        measuring = replace(self.exact.cache, calibrate=self.args.out / TABLE)
        self.generator.generate(self.exact.jobs()[0], replace(self.exact, cache=measuring))
        runs = self._videos("exact", self.exact)
        self._say(f"exact: {len(runs)} videos, {sum(run.seconds for run in runs):.1f} s of steps")
        return runs

    def _prepared(self) -> list[tuple[Candidate, GenerateOptions]]:
        """Return the candidates that this model can run, with their options."""
        from mindspeed_wan.inference.pipeline import with_folder_defaults

        assert self.exact.steps is not None
        ready = []
        for candidate in self.candidates or suite(self.exact.steps):
            try:
                folder = self.generator.folder
                options = with_folder_defaults(_parsed(candidate, self.words, self.args.out / TABLE), folder)
                options.check(num_heads=folder.config.num_heads)
                self.generator.guidance_plan(options)
                self.generator.step_cache(options)
            except ConfigError as error:
                self._leave_out(candidate, error)
            else:
                ready.append((candidate, options))
        return ready

    def _needs_loading(self, options: GenerateOptions) -> bool:
        """Tell whether ``options`` differ from the exact run's in more than a call can change."""
        return replace(options, **{name: getattr(self.exact, name) for name in _PER_CALL}) != self.exact

    def _load(self, candidate: Candidate, options: GenerateOptions) -> bool:
        """Load the model anew for ``options`` and warm up; ``False`` when a candidate of the suite cannot be had."""
        from mindspeed_wan.inference.pipeline import WanGenerator

        self.generator.release()
        self.generator.runtime.platform.empty_cache()
        try:
            self.generator = WanGenerator(self.generator.folder, options, self.generator.runtime)
            self._encode(options)
            self.generator.generate(options.jobs()[0], decode=False)
        except WanError as error:
            self._leave_out(candidate, error)
            return False
        return True

    def _leave_out(self, candidate: Candidate, error: WanError) -> None:
        """Note why a candidate of the suite cannot be had; what was asked for is an error."""
        if not candidate.optional:
            raise error
        self.left_out[candidate.name] = str(error).splitlines()[0]

    def _encode(self, options: GenerateOptions) -> None:
        """Encode every prompt, then let the text encoder go, as ``inference_sora.py`` does."""
        prompts = self.generator.prompts
        prompts.encode([text for job in options.jobs() for text in (job.prompt, options.negative_prompt)])
        prompts.release()

    def _videos(self, name: str, options: GenerateOptions) -> list[Run]:
        """Make and save every video of ``options``. Collective; frames are there on the leading rank only."""
        from mindspeed_wan.evaluation.acceleration import Run
        from mindspeed_wan.inference.video_io import to_frames

        platform, runs = self.generator.runtime.platform, []
        folder = self.args.out / "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        for job in options.jobs():
            platform.reset_peak_memory()
            made = self.generator.generate(job, options)
            if made.video is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            made.save(folder / job.output.name)
            # On a CPU processor time: what else the machine does would drown the differences.
            seconds = made.processor_seconds if platform.name == "cpu" else sum(map(sum, made.steps.values()))
            runs.append(Run(frames=to_frames(made.video), seconds=seconds, evaluations=made.evaluations,
                            peak_bytes=platform.peak_memory_bytes()))
        return runs

    def report(self, results: list[Result]) -> int:
        """Write the report and return the exit code."""
        from mindspeed_wan.evaluation import acceleration

        acceleration.write_report(self.args.out, self._facts(), results, self.left_out)
        self._say("\n" + acceleration.markdown(results, self.left_out))
        best = acceleration.fastest_passing(results)
        if best is not None:
            self._say(f"\nfastest that passes: {best.name}, {best.speedup:.2f} times as fast, {best.psnr_db:.1f} dB: "
                      f"{best.flags}")
        self._say(f"wrote {self.args.out / 'acceleration.md'}, acceleration.json, the videos of every candidate")
        failed = [result.name for result in results if result.failures]
        if failed:
            self._say(f"below the threshold: {', '.join(failed)}")
        # Of what was asked for everything must pass; of the suite, which goes from careful to bold, something.
        return EXIT_GATE if (failed if self.candidates else best is None) else 0

    def _facts(self) -> dict[str, Any]:
        import torch

        options, runtime = self.exact, self.generator.runtime
        return {
            "model": str(self.args.model), "task": options.task, "exact_run": shlex.join(self.words),
            "steps": options.steps, "shift": options.shift, "guidance_low_high": options.guidance,
            "size": options.size, "num_frames": options.num_frames, "videos": len(options.jobs()),
            "dtype": options.dtype, "device": runtime.platform.device_name(), "layout": runtime.layout.describe(),
            "torch": torch.__version__,
            "thresholds": {"psnr_db": self.args.min_psnr, "ssim": self.args.min_ssim, "speedup": self.args.min_speedup},
        }

    def _say(self, text: str) -> None:
        if self.leads:
            print(text, flush=True)


def _line(result: Result) -> str:
    return (f"{result.name}: PSNR {result.psnr_db:.2f} dB, SSIM {result.ssim:.4f}, {result.speedup:.2f} times as fast, "
            f"{result.evaluations_saved:.0%} of the evaluations saved"
            + (f"; {'; '.join(result.failures)}" if result.failures else ""))
