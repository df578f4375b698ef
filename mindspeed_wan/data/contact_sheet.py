"""A data set at a glance: one HTML file with three frames, caption and numbers of every clip; opens without network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mindspeed_wan.data import video
from mindspeed_wan.data.survey import Surveyed
from mindspeed_wan.errors import DataError

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:24px;background:#fafafa;color:#222}
h1{font-size:20px}pre{background:#fff;border:1px solid #ddd;padding:10px;white-space:pre-wrap}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
.clip{background:#fff;border:1px solid #ddd;border-radius:6px;padding:10px;overflow:hidden}
.clip.bad{border-color:#c33;background:#fff4f4}.frames{display:flex;gap:4px}.frames img{width:33%;height:auto}
.where{color:#777;font-size:12px;word-break:break-all}.cap{margin:6px 0}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre,.clip{background:#222;border-color:#444}
.clip.bad{background:#3a2020}.where{color:#999}}
"""


def contact_sheet(clips: Sequence[Surveyed], title: str, summary: Iterable[str], *, width: int = 160) -> str:
    """Return the HTML text.

    Args:
        clips: surveyed clips, shown in their order.
        title: of the page.
        summary: lines above the clips.
        width: of a frame in pixels.
    """
    cards = "\n".join(_card(clip, width) for clip in clips)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1><pre>{html.escape(chr(10).join(summary))}</pre>"
        f'<div class="grid">{cards}</div></body></html>\n'
    )


def _card(clip: Surveyed, width: int) -> str:
    record, info = clip.record, clip.info
    captions = "<br>".join(html.escape(caption) for caption in record.captions)
    where = f'<div class="where">{html.escape(record.path.name)} &middot; {html.escape(record.where)}</div>'
    if info is None:
        return f'<div class="clip bad">{where}<div class="cap">{captions}</div>{html.escape(clip.problem or "")}</div>'
    rate = f" at {info.fps:.2f} fps" if info.fps else ""
    numbers = f"{info.num_frames} frames{rate}, {info.height}x{info.width}, {html.escape(info.codec or 'image')}"
    return (f'<div class="clip">{_pictures(clip, width)}<div class="cap">{captions}</div>'
            f"<div>{numbers}</div>{where}</div>")


def _pictures(clip: Surveyed, width: int) -> str:
    assert clip.info is not None
    try:
        frames = _some_frames(clip.record.path, clip.record.kind, clip.info.num_frames)
    except DataError as error:
        return f"<div>{html.escape(error.message)}</div>"
    images = "".join(f'<img alt="" src="data:image/jpeg;base64,{_jpeg(frame, width)}">' for frame in frames)
    return f'<div class="frames">{images}</div>'


def _some_frames(path: Path, kind: str, count: int) -> np.ndarray:
    """Return the first, middle and last frame."""
    if kind == "image":
        return video.read_image(path)
    return video.read_frames(path, sorted({0, count // 2, count - 1}))


def _jpeg(frame: np.ndarray, width: int) -> str:
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((width, width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
