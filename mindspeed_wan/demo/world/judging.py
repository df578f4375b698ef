"""Generates clips of captions and has the detector mark them: ours, diffusers', with exchanged experts, I2V, LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_wan.demo.commands import Command, python
from mindspeed_wan.demo.world import scenes
from mindspeed_wan.demo.world.detector import detect
from mindspeed_wan.demo.world.job import World
from mindspeed_wan.demo.world.scenes import Scene

GUIDANCE = 3.0
SHIFT = 5.0
FIRST_SEED = 100
SIZE = "*".join(str(side) for side in reversed(scenes.SIZE))


@dataclass(frozen=True)
class Asked:
    """One video that was asked for: what it should show and with which seed."""

    scene: Scene
    seed: int

    @property
    def title(self) -> str:
        """Names the video for people."""
        return f"{self.scene.caption} (seed {self.seed})"


def asked(chosen: Sequence[Scene], copies: int) -> list[Asked]:
    """Return the videos of one judgement in the order that ``--prompt_file --num_videos`` writes them."""
    return [Asked(scene, FIRST_SEED + copy) for scene in chosen for copy in range(copies)]


def generate(
    world: World, name: str, model: Path, chosen: Sequence[Scene], *more: str, copies: int | None = None
) -> None:
    """Generate every clip with the inference launcher into ``videos/NAME``; ``copies`` is the effort's by default."""
    prompts = world.out / "files" / f"prompts_{name}.txt"
    prompts.write_text("".join(f"{scene.caption}\n" for scene in chosen), encoding="utf-8")
    task = "i2v" if name.startswith("i2v") else "t2v"
    launcher = world.repository / "examples" / "wan2.2" / "A14B" / task / "inference.sh"
    world.run(Command(f"generate_{name}", [
        "bash", str(launcher), "--ckpt_dir", str(model), "--prompt_file", str(prompts), "--negative_prompt", "",
        "--num_videos", str(copies or world.effort.copies), "--base_seed", str(FIRST_SEED), "--size", SIZE,
        "--frame_num", str(scenes.NUM_FRAMES), "--sample_steps", str(world.effort.steps),
        "--sample_shift", str(SHIFT), "--sample_guide_scale", f"{GUIDANCE},{GUIDANCE}", "--dtype", "fp32",
        "--noise", "diffusers", "--sigma_grid", "diffusers", "--crf", "8",
        "--save_path", str(world.videos(name)), *more,
    ], {"DEVICE": "cpu", "NPROC_PER_NODE": "1"}))


def judge(world: World, name: str, chosen: Sequence[Scene], *, copies: int | None = None) -> dict[str, Any]:
    """Mark the videos of ``videos/NAME``: shares of right colour, shape, motion, and of all three."""
    from mindspeed_wan.evaluation.frames import read_frames

    wanted = asked(chosen, copies or world.effort.copies)
    marks = []
    for index, item in enumerate(wanted):
        seen = detect(read_frames(world.videos(name) / f"video_{index}.mp4")[0])
        scene = item.scene
        marks.append((seen.colour == scene.colour, seen.shape == scene.shape, seen.motion == scene.motion))
    table = np.array(marks, bool)
    wrong = [item.title for item, mark in zip(wanted, table) if not mark.all()]
    shares = dict(zip(("colour", "shape", "motion"), np.round(table.mean(axis=0), 4).tolist()))
    return {"videos": len(wanted), "right": round(float(table.all(axis=1).mean()), 4), **shares, "wrong": wrong}


def likeness(world: World, reference: str, name: str, count: int) -> dict[str, Any]:
    """Return mean PSNR and SSIM of ``videos/NAME`` against those of ``videos/REFERENCE``."""
    from mindspeed_wan.evaluation.frames import read_frames
    from mindspeed_wan.evaluation.metrics import psnr, ssim

    values = []
    for index in range(count):
        true, other = (read_frames(world.videos(which) / f"video_{index}.mp4")[0] for which in (reference, name))
        values.append((float(np.mean(psnr(true, other))), float(np.mean(ssim(true, other)))))
    means = np.mean(values, axis=0)
    return {"psnr_db": round(float(means[0]), 2), "ssim": round(float(means[1]), 4)}


def text_to_video(world: World, name: str, model: str) -> dict[str, Any]:
    """Generate and mark the held-out combinations."""
    generate(world, name, world.model(model), scenes.held_out())
    return judge(world, name, scenes.held_out())


def diffusers_text_to_video(world: World) -> dict[str, Any]:
    """The same by diffusers' WanPipeline from the exported folder: with equal noise and steps, the same videos."""
    settings = {"model": str(world.model("t2v_trained")), "out": str(world.videos("diffusers")),
                "steps": world.effort.steps, "copies": world.effort.copies}
    world.run(Command("generate_diffusers",
                      [*python("mindspeed_wan.demo.world.diffusers_videos"), json.dumps(settings)]))
    found = judge(world, "diffusers", scenes.held_out())
    return {**found, **likeness(world, "t2v", "diffusers", found["videos"])}


def image_to_video(world: World) -> dict[str, Any]:
    """Animate the first frame of a true clip of each held-out combination; the first frame must stay."""
    from PIL import Image

    from mindspeed_wan.evaluation.frames import read_frames
    from mindspeed_wan.evaluation.metrics import psnr

    rng = np.random.default_rng(world.seed + 3)
    folder = world.out / "files" / "first_frames"
    folder.mkdir(parents=True, exist_ok=True)
    frames, paths = [], []
    for number, scene in enumerate(scenes.held_out()):
        frames.append(scenes.render(scene, rng)[0])
        paths.append(folder / f"{number}.png")
        Image.fromarray(frames[-1]).save(paths[-1])
    generate(world, "i2v", world.model("i2v_trained"), scenes.held_out(), "--image", *map(str, paths))
    found = judge(world, "i2v", scenes.held_out())
    firsts = [read_frames(world.videos("i2v") / f"video_{i}.mp4")[0][:1] for i in range(found["videos"])]
    values = [float(psnr(frames[i // world.effort.copies][None], first)[0]) for i, first in enumerate(firsts)]
    return {**found, "first_frame_psnr_db": round(float(np.mean(values)), 2),
            "first_frame_psnr_db_least": round(min(values), 2)}


def new_colour(world: World, name: str, *more: str) -> dict[str, Any]:
    """Generate and mark the new colour, with or without the adapters."""
    chosen = scenes.combinations((scenes.NEW_COLOUR,))
    generate(world, name, world.model("t2v_trained"), chosen, *more)
    return judge(world, name, chosen)
