"""The walk through every stage, on a tiny but complete Wan2.2 T2V A14B: what `mindspeed-wan demo` runs.

It is the short form of the small world in ``demo/world``: the same clips, sizes and trained VAE, few iterations.

Every stage is the command a user types (`mm-convert`, the launchers under examples/, `inference.sh`), run as a
child process with its output shown and kept in ``logs/``. A stage that fails, or whose result is not there, ends the
walk with its exit code.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_wan.demo.commands import (
    Command,
    claim_folder,
    find_repository,
    make_folder,
    python,
    require,
    run_together,
)
from mindspeed_wan.demo.model_json import write_model_json
from mindspeed_wan.errors import ConfigError, WanError

EXPERTS = ("high", "low")
BATCH_SIZE = 32
PROMPT = "a red circle moves left"
TRANSFORMER = {"high": "transformer", "low": "transformer_2"}


@dataclass
class Walk:
    """Where everything of one walk lies, and what it has measured."""

    out: Path
    repository: Path
    num_iterations: int
    num_ranks: int
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The tiny Diffusers folder."""
        return self.out / "Wan2.2-T2V-A14B-Diffusers"

    @property
    def converted(self) -> Path:
        """Both experts as DCP, written by mm-convert."""
        return self.out / "dcp"

    @property
    def data(self) -> Path:
        """Clips, annotations and data.json."""
        return self.out / "data"

    @property
    def cache(self) -> Path:
        """Encoded clips and captions."""
        return self.out / "cache"

    @property
    def exported(self) -> Path:
        """The trained experts, again as a Diffusers folder."""
        return self.out / "Wan2.2-T2V-A14B-trained"

    @property
    def video(self) -> Path:
        """What the trained experts make of ``PROMPT``."""
        return self.out / f"{PROMPT.replace(' ', '_')}.mp4"

    def run_folder(self, expert: str) -> Path:
        """The save path of one expert's training run."""
        return self.out / "runs" / expert


def run_walk(out: Path, *, num_iterations: int, num_ranks: int, seed: int) -> Walk:
    """Run every stage in order; raises ``WanError`` at the first that does not do its work."""
    walk = Walk(out.resolve(), find_repository(), num_iterations, num_ranks, seed)
    claim_folder(walk.out, "demo.json", {"iterations": num_iterations, "seed": seed})
    make_folder(walk.out / "logs")
    stages: list[tuple[str, Callable[[Walk], None]]] = [
        ("write a tiny Wan2.2 folder and captioned clips", write_inputs),
        ("convert both experts to DCP", convert),
        ("encode clips and captions once", encode),
        ("pretrain the high-noise expert", lambda w: pretrain(w, "high")),
        ("pretrain the low-noise expert", lambda w: pretrain(w, "low")),
        ("export back to Diffusers and let diffusers load it", export),
        ("generate a video with the trained experts", generate),
        ("plot the losses", plot),
    ]
    for number, (title, stage) in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] {title}", flush=True)
        start = time.monotonic()
        stage(walk)
        walk.seconds[title] = time.monotonic() - start
        print(f"[{number}/{len(stages)}] done in {walk.seconds[title]:.1f} s", flush=True)
    return walk


# ---- stages --------------------------------------------------------------------------------------------------------


def write_inputs(walk: Walk) -> None:
    """Write the model folder, the clips and the MindSpeed-MM style model and data files."""
    from mindspeed_wan.demo.world import scenes
    from mindspeed_wan.demo.world.files import write_data_json, write_model

    write_model(walk.model, seed=walk.seed)
    scenes.write_dataset(walk.data, scenes.trained(), clips_per_scene=1, seed=walk.seed)
    write_data_json(walk.out, walk.data, walk.model, walk.cache)
    for expert in EXPERTS:
        write_model_json(walk.out / f"pretrain_model_{expert}.json", walk.repository, walk.model, "t2v", expert,
                         cached=True)


def convert(walk: Walk) -> None:
    """Convert the Diffusers folder; one call writes both experts."""
    _command(walk, "convert", [
        *python("mindspeed_wan_converters"), "Wan2.2T2VConverter", "hf_to_dcp",
        "--cfg.source_path", str(walk.model), "--cfg.target_path", str(walk.converted), "--overwrite", "--verify",
    ])
    for expert in EXPERTS:
        require(walk.converted / TRANSFORMER[expert] / "release" / ".metadata")


def encode(walk: Walk) -> None:
    """Write VAE latents and text states of every clip to a cache, which both experts train from."""
    _command(walk, "encode", [
        *python("mindspeed_wan.cli.main"), "features", "build", "--mm-data", str(walk.out / "clips.json"),
        "--mm-model", str(walk.out / "pretrain_model_high.json"), "--out", str(walk.cache), "--device", "cpu",
    ])
    require(walk.cache / "cache.json")


def pretrain(walk: Walk, expert: str) -> None:
    """Train one expert through the launcher that a cluster uses."""
    launcher = walk.repository / "examples" / "wan2.2" / "A14B" / "t2v" / f"pretrain_{expert}.sh"
    environment = {
        "DEVICE": "cpu",
        "NPROC_PER_NODE": str(walk.num_ranks),
        "MM_DATA": str(walk.out / "data.json"),
        "MM_MODEL": str(walk.out / f"pretrain_model_{expert}.json"),
        "LOAD_PATH": str(walk.converted / TRANSFORMER[expert]),
        "SAVE_PATH": str(walk.run_folder(expert)),
        "MBS": str(BATCH_SIZE // 2 // walk.num_ranks),
        "GRAD_ACC_STEP": "2",
    }
    _command(walk, f"pretrain_{expert}", [
        "bash", str(launcher), "--train-iters", str(walk.num_iterations), "--save-interval", str(walk.num_iterations),
        "--lr", "1e-3", "--min-lr", "1e-5", "--lr-decay-style", "cosine", "--seed", str(walk.seed),
        "--num-workers", "0", "--log-interval", str(max(1, walk.num_iterations // 10)),
    ], environment)
    losses = _losses(walk, expert)
    if len(losses) != walk.num_iterations or not all(map(math.isfinite, losses)):
        raise WanError(f"{len(losses)} finite losses instead of {walk.num_iterations}", where=f"pretrain_{expert}")


def export(walk: Walk) -> None:
    """Write both trained experts as a Diffusers folder and check that diffusers loads every weight of it."""
    for expert in EXPERTS:
        _command(walk, f"export_{expert}", [
            *python("mindspeed_wan_converters"), "Wan2.2T2VConverter", "dcp_to_hf",
            "--cfg.source_path", str(walk.run_folder(expert)),
            "--cfg.target_path", str(walk.exported / TRANSFORMER[expert]),
            "--cfg.hf_dir", str(walk.model), "--overwrite",
        ])
    _command(walk, "diffusers", [*python("mindspeed_wan.demo.diffusers_check"), str(walk.exported)])


def generate(walk: Walk) -> None:
    """Generate a video from the exported folder through the inference launcher."""
    launcher = walk.repository / "examples" / "wan2.2" / "A14B" / "t2v" / "inference.sh"
    _command(walk, "generate", [
        "bash", str(launcher), "--task", "t2v-A14B", "--ckpt_dir", str(walk.exported), "--size", "48*48",
        "--frame_num", "9", "--sample_steps", "20", "--sample_shift", "5", "--sample_guide_scale", "3,3",
        "--base_seed", str(walk.seed), "--dtype", "fp32", "--negative_prompt", "", "--prompt", PROMPT,
        "--contact_sheet", "--save_file", str(walk.video),
    ], {"DEVICE": "cpu", "NPROC_PER_NODE": "1"})
    require(walk.video)


def plot(walk: Walk) -> None:
    """Plot both experts' losses into ``loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for expert in EXPERTS:
        losses = _losses(walk, expert)
        axes.plot(range(1, len(losses) + 1), losses, label=f"{expert}-noise expert")
    axes.set(xlabel="iteration", ylabel="flow-matching loss", title="Tiny Wan2.2 T2V A14B, both experts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(walk.out / "loss.png", dpi=120)
    plt.close(figure)
    require(walk.out / "loss.png")


def describe(walk: Walk) -> str:
    """Return the closing summary: what was done, the losses, where everything lies."""
    lines = ["", "The walk is complete."]
    for expert in EXPERTS:
        losses = _losses(walk, expert)
        lines.append(f"  {expert:>4} expert: loss {losses[0]:.4f} -> {losses[-1]:.4f} over {len(losses)} iterations")
    lines += _seen(walk)
    places = {
        "tiny model": walk.model, "clips": walk.data, "converted experts": walk.converted,
        "training runs": walk.out / "runs", "trained Diffusers folder": walk.exported,
        "video": walk.video, "its frames": walk.video.with_suffix(".png"), "loss plot": walk.out / "loss.png",
        "logs of every stage": walk.out / "logs",
    }
    lines += [f"  {name:<24} {path}" for name, path in places.items()]
    lines.append(f"  {'a page about both runs':<24} mindspeed-wan report {shlex.quote(str(walk.out / 'runs'))}")
    lines.append(f"  {'time':<24} {sum(walk.seconds.values()):.0f} s")
    return "\n".join(lines)


# ---- helpers -------------------------------------------------------------------------------------------------------


def _seen(walk: Walk) -> list[str]:
    """Return what the rule-based detector of the small world makes of the video."""
    from mindspeed_wan.demo.world.detector import Sighting, detect
    from mindspeed_wan.evaluation.frames import read_frames

    seen = detect(read_frames(walk.video)[0])
    told = [f"  asked for {PROMPT!r}, a detector sees: colour {seen.colour}, shape {seen.shape}, motion {seen.motion}"]
    if seen != Sighting("red", "circle", "left"):
        told.append(f"  following a caption takes more than {walk.num_iterations} iterations: `mindspeed-wan world`")
    return told


def _losses(walk: Walk, expert: str) -> list[float]:
    path = walk.run_folder(expert) / "metrics.jsonl"
    require(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _command(walk: Walk, name: str, words: list[str], environment: dict[str, str] | None = None) -> None:
    """Run one command with its output shown and kept; a failure raises with the command's own exit code."""
    run_together([Command(name, words, environment or {})], repository=walk.repository, logs=walk.out / "logs")


def check_iterations(num_iterations: int, num_ranks: int) -> None:
    """Refuse sizes that the demo cannot run."""
    if num_iterations < 1:
        raise ConfigError(f"--iterations {num_iterations} must be at least 1")
    if num_ranks not in (1, 2, 4):
        raise ConfigError(f"--ranks {num_ranks}: the demo's global batch divides over 1, 2 or 4 ranks")
