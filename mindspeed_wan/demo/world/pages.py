"""What people look at when a world is done: a sheet of frames, a page with players, and the figures as JSON."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_wan.demo.world import scenes
from mindspeed_wan.demo.world.job import EXPERTS, World
from mindspeed_wan.demo.world.judging import Asked, asked
from mindspeed_wan.demo.world.scenes import Scene

_MAGNIFIED = 2
_FRAMES = (0, 4, 8)
_CAPTION_HEIGHT = 16

JUDGEMENTS = {
    "t2v": "text to video, held-out combinations",
    "diffusers": "the same from the export by diffusers' WanPipeline",
    "swapped": "the same with the two experts exchanged",
    "i2v": "image to video, held-out combinations",
    "new_base": f"{scenes.NEW_COLOUR}, which the base has not seen, without adapters",
    "new_lora": f"{scenes.NEW_COLOUR} with the two adapters",
}
"""Name of a judgement -> what it shows."""


def write_results(world: World) -> Path:
    """Write ``results.json``: every judgement, and the losses of every run."""
    found: dict[str, Any] = {name: world.result(name) for name in JUDGEMENTS}
    found["accelerators"] = world.result("accelerators")["variants"]
    found["losses"] = {
        name: {expert: world.result(f"train_{name}")[expert] for expert in EXPERTS} for name in ("t2v", "i2v", "lora")
    }
    path = world.out / "results.json"
    staging = path.with_suffix(".tmp")
    staging.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(staging, path)
    return path


def write_sheet(world: World, name: str, chosen: Sequence[Scene], path: Path) -> Path:
    """Write a picture: one row per caption, the first, middle and last frame of two of its videos."""
    from PIL import Image, ImageDraw

    from mindspeed_wan.evaluation.frames import read_frames

    copies, shown = world.effort.copies, min(2, world.effort.copies)
    height, width = (side * _MAGNIFIED for side in scenes.SIZE)
    sheet = Image.new("RGB", (shown * (len(_FRAMES) * width + 8), len(chosen) * (height + _CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, scene in enumerate(chosen):
        top = row * (height + _CAPTION_HEIGHT)
        draw.text((2, top + 2), scene.caption, fill="black")
        for copy in range(shown):
            frames = read_frames(world.videos(name) / f"video_{row * copies + copy}.mp4")[0]
            strip = np.concatenate([frames[i] for i in _FRAMES], axis=1)
            picture = Image.fromarray(strip).resize((len(_FRAMES) * width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (copy * (len(_FRAMES) * width + 8), top + _CAPTION_HEIGHT))
    sheet.save(path)
    return path


def write_report(world: World) -> Path:
    """Write ``world.html``: the figures, then players for every judgement, marked wrong ones first."""
    from mindspeed_wan.evaluation.html import write_page

    parts = [_table(world), _accelerator_table(world)]
    for name, title in JUDGEMENTS.items():
        chosen = scenes.combinations((scenes.NEW_COLOUR,)) if name.startswith("new") else scenes.held_out()
        parts.append(f"<h2>{html.escape(title)}</h2>{_players(world, name, asked(chosen, world.effort.copies))}")
    return write_page(world.out / "world.html", "A small world", "".join(parts))


def _table(world: World) -> str:
    columns = ("videos", "right", "colour", "shape", "motion")
    rows = ""
    for name, title in JUDGEMENTS.items():
        found = world.result(name)
        rows += f"<tr><td>{html.escape(title)}</td>{''.join(f'<td>{found[c]}</td>' for c in columns)}</tr>"
    return f"<table><tr><th></th>{''.join(f'<th>{c}</th>' for c in columns)}</tr>{rows}</table>"


def _accelerator_table(world: World) -> str:
    variants = world.result("accelerators")["variants"]
    columns = list(next(iter(variants.values()), {}))
    rows = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{found[c]}</td>' for c in columns)}</tr>"
                   for name, found in variants.items())
    head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in columns)
    return f"<h2>Quality against speed</h2><table><tr><th></th>{head}</tr>{rows}</table>"


def _players(world: World, name: str, items: Sequence[Asked]) -> str:
    from mindspeed_wan.evaluation.html import figure

    wrong = set(world.result(name)["wrong"])
    order = sorted(range(len(items)), key=lambda i: items[i].title not in wrong)
    figures = [figure(world.videos(name) / f"video_{i}.mp4", world.out, items[i].scene.caption,
                      "wrong" if items[i].title in wrong else "right") for i in order]
    return f"<div class=row>{''.join(figures)}</div>"

