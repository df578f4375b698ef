"""What a generation leaves on disk: mp4, frames, latents, sidecar JSON, contact sheet, gallery page.

Every file is written under a temporary name beside its final place and renamed, so a killed run leaves either the
whole file or none, and a finished sidecar means a finished video.
"""

from __future__ import annotations

import contextlib
import errno
import html
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_wan.checkpoint.tensor_file import write_tensor_file
from mindspeed_wan.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    import torch

_H264_ENCODERS = ("libx264", "libopenh264", "h264_nvenc", "h264")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it there when the block ends, remove it when it raises.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            raise ResourceError(
                f"cannot write: {error.strerror}", where=str(path), fix="free space or name another output folder"
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink()


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


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Turn a video [3, F, H, W] in [-1, 1] into uint8 frames [F, H, W, 3], rounded to nearest."""
    scaled = video.float().add(1).mul(127.5).clamp(0, 255).round()
    return scaled.byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_mp4(path: Path, frames: np.ndarray, *, fps: int, crf: int = 18) -> None:
    """Write uint8 frames [F, H, W, 3] as H.264 yuv420p with the index first: plays in browsers and on phones.

    ``crf`` is x264's constant quality (0 lossless, 18 visually lossless, 51 worst).
    """
    import av

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ConfigError(f"H.264 with yuv420p needs even sides, got {width}x{height}")
    encoder = next((name for name in _H264_ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise ResourceError("this PyAV has no H.264 encoder", fix="pip install --force-reinstall av")
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream: Any = container.add_stream(encoder, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"} if encoder == "libx264" else {}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


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
