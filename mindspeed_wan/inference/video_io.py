"""What a generation leaves on disk: mp4, frames, latents, sidecar JSON, contact sheet, gallery page.

Every file is written under a temporary name beside its final place and renamed, so a killed run leaves either the
whole file or none, and a finished sidecar means a finished video.
"""

from __future__ import annotations

import html
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.checkpoint.tensor_file import write_tensor_file
from mindspeed_wan.data.video_writer import atomic_path, to_frames, write_mp4

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["atomic_path", "check_writable", "read_json", "to_frames", "write_contact_sheet", "write_frames",
           "write_gallery", "write_json", "write_latents", "write_mp4"]  # fmt: skip


def check_writable(paths: Sequence[Path]) -> None:
    """Find out now whether ``paths`` can be written, rather than after minutes of computing.

    Raises:
        ResourceError: one cannot.
    """
    for path in paths:
        probe = path.with_name(f".{path.name}.probe")
        with atomic_path(probe) as temporary:
            temporary.touch()
        probe.unlink()


def write_frames(folder: Path, frames: np.ndarray) -> None:
    """Write uint8 frames [F, H, W, 3] as ``folder/00000.png`` and so on; an existing folder is replaced."""
    from PIL import Image

    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(temporary / f"{index:05d}.png")
        if folder.is_dir():
            shutil.rmtree(folder)


def write_latents(path: Path, latents: torch.Tensor, settings: Mapping[str, Any]) -> None:
    """Write normalised latents [16, f, h, w] as safetensors; ``settings`` goes into its metadata as JSON."""
    told = {"format": "pt", "settings": json.dumps(settings, ensure_ascii=False, default=str)}
    write_tensor_file(path, {"latents": latents.detach().cpu()}, told)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file (UTF-8, indented)."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read what ``write_json`` wrote; None when the file is absent or not ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_contact_sheet(path: Path, frames: np.ndarray, *, count: int = 12, width: int = 320) -> None:
    """Write ``count`` frames spread evenly from first to last as one PNG, each ``width`` pixels wide."""
    from PIL import Image

    count = min(count, len(frames))
    chosen = [round(index * (len(frames) - 1) / max(1, count - 1)) for index in range(count)]
    height = max(1, round(width * frames.shape[1] / frames.shape[2]))
    columns = min(count, 4)
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for place, index in enumerate(chosen):
        tile = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (place % columns * width, place // columns * height))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem;background:#fafafa;color:#222}}
main{{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))}}
figure{{margin:0;background:#fff;border:1px solid #ddd;border-radius:8px;overflow:hidden}}
video{{width:100%;display:block;background:#000}}figcaption{{padding:.75rem}}small{{color:#666}}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""


def write_gallery(path: Path, records: Sequence[Mapping[str, Any]], *, title: str = "Generated videos") -> None:
    """Write one HTML page over the sidecar ``records`` of videos; links are relative, nothing comes from the net."""
    figures = []
    for record in records:
        source = html.escape(Path(os.path.relpath(record["video"], path.parent)).as_posix())
        facts = f"seed {record['seed']} &middot; {record['width']}x{record['height']}x{record['num_frames']}"
        figures.append(
            f'<figure><video controls loop muted preload="metadata" src="{source}"></video>'
            f"<figcaption>{html.escape(record['prompt'])}<br><small>{facts}</small></figcaption></figure>"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), figures="\n".join(figures)), encoding="utf-8")
