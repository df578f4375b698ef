"""All stages of the world in order: what `mindspeed-wan world` and `make world` run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_wan.demo.world import accelerators, files, judging, pages, scenes, training
from mindspeed_wan.demo.world.job import EXPERTS, World

StageFunction = Callable[[World], dict[str, Any] | None]


def _lora_flags(world: World) -> list[str]:
    high, low = (str(training.adapter(world, expert)) for expert in EXPERTS)
    return ["--lora_high_path", high, "--lora_path", low]


def _swapped(world: World) -> dict[str, Any]:
    training.swap(world)
    return judging.text_to_video(world, "swapped", "t2v_swapped")


def _train_i2v(world: World) -> dict[str, Any]:
    training.start_i2v(world)
    return training.pretrain(world, "i2v")


STAGES: list[tuple[str, str, StageFunction]] = [
    ("models", "write the model folders: frozen UMT5, trained VAE", files.write_models),
    ("clips", "write captioned clips; an eighth of the combinations is held out", files.write_clips),
    ("files", "write model.json and data.json of every run", files.write_run_files),
    ("features", "encode clips and captions once", training.encode),
    ("train_t2v", "pretrain both T2V experts", lambda world: training.pretrain(world, "t2v")),
    ("export_t2v", "export them to Diffusers", lambda world: training.export(world, "t2v")),
    ("t2v", "generate and mark held-out captions", lambda world: judging.text_to_video(world, "t2v", "t2v_trained")),
    ("diffusers", "the same with diffusers' WanPipeline", judging.diffusers_text_to_video),
    ("swapped", "the same with the experts exchanged", _swapped),
    ("train_i2v", "train both I2V experts, starting from T2V", _train_i2v),
    ("export_i2v", "export them to Diffusers", lambda world: training.export(world, "i2v")),
    ("i2v", "animate first frames", judging.image_to_video),
    ("new_base", "ask for a new colour", lambda world: judging.new_colour(world, "new_base")),
    ("train_lora", "teach it by LoRA", training.finetune),
    ("new_lora", "ask again, with the adapters",
     lambda world: judging.new_colour(world, "new_lora", *_lora_flags(world))),
    ("accelerators", "quality against speed: step caches, guidance plans, 8-bit weights", accelerators.measure),
]
"""(name, title, function), in order."""


def build(world: World) -> str:
    """Run every stage that is not done yet, write the pages and return a summary."""
    seconds = world.walk(STAGES)
    pages.write_results(world)
    sheet = pages.write_sheet(world, "t2v", scenes.held_out(), world.out / "frames.png")
    report = pages.write_report(world)
    lines = ["", "The world is complete."]
    for name, title in pages.JUDGEMENTS.items():
        found = world.result(name)
        lines.append(f"  {found['right']:>7.1%} of {found['videos']} right: {title}")
    i2v = world.result("i2v")
    lines += [
        f"  first frame of I2V: {i2v['first_frame_psnr_db']} dB PSNR",
        f"  frames   {sheet}", f"  report   {report}", f"  figures  {world.out / 'results.json'}",
        f"  time     {seconds / 60:.1f} minutes",
    ]
    return "\n".join(lines)
