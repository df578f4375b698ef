"""The pages people look at: a comparison with players that run in step, and the rating sheet. One file each.

Small videos are embedded, so a page can be mailed; larger ones, and those of a page that would become too large, are
linked by relative path.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from mindspeed_wan.evaluation.charts import grouped
from mindspeed_wan.evaluation.compare import ClipResult, ModelResult, remarks
from mindspeed_wan.evaluation.output import write_text
from mindspeed_wan.evaluation.score import CRITERIA

EMBED_LIMIT_BYTES = 2_000_000
PAGE_LIMIT_BYTES = 100_000_000
"""A page with more videos than this links them all: browsers would choke on it."""

MIME_TYPES = {".webm": "video/webm", ".mkv": "video/x-matroska", ".avi": "video/x-msvideo"}
"""Of what is not called MP4; browsers play QuickTime's files under that name only."""

PLOTS = {
    "psnr_db": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker (1 is still)", "motion": "motion, pixels per frame",
    "text_similarity": "text similarity (CLIP)", "frame_consistency": "frame consistency (CLIP)",
}
"""Metrics of clips that are drawn, with their titles."""

_COLUMNS = {
    **PLOTS, "num_clips": "clips", "ms_ssim": "MS-SSIM", "frechet_distance": "Frechet distance",
    "num_ratings": "ratings", "subjective": "subjective, of 20",
}
"""Heads of the table of means where the field's own name does not do."""

_STYLE = """
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}body{margin:2rem auto;max-width:1200px;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #8886;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}.row{display:flex;gap:1rem;flex-wrap:wrap;margin:.5rem 0 1.5rem}
figure{margin:0}video{max-width:280px;background:#0003}figcaption{font-size:.85em}.bar{height:.7rem;background:#2a7}
"""

SYNC = """
// The longest player of a row goes round; a shorter one waits on its last frame until then. Where one is moved by hand,
// the others follow; `led` are those moved by another one, the end of whose seek moves nobody.
for (const row of document.querySelectorAll('.row')) {
  const all = [...row.querySelectorAll('video')], led = new Set(), length = o => o.duration || 0;
  const longest = () => all.reduce((a, b) => length(b) > length(a) ? b : a);
  const follow = (o, v) => {
    const time = Math.min(v.currentTime, length(o));
    if (Math.abs(o.currentTime - time) > 0.05) { led.add(o); o.currentTime = time; }
    if (!v.paused && o.paused && time < length(o)) o.play().catch(() => {});
  };
  for (const v of all) {
    const others = all.filter(o => o !== v);
    v.addEventListener('play', () => {
      all.forEach(o => { o.loop = o === longest(); });
      others.forEach(o => { if (o.paused) follow(o, v); });
    });
    v.addEventListener('pause', () => { if (!v.ended) others.forEach(o => o.pause()); });
    v.addEventListener('seeked', () => { if (!led.delete(v)) others.forEach(o => follow(o, v)); });
  }
}
"""

_EXPORT = """
document.querySelector('#export').onclick = () => {
  const rows = [['model', 'clip', ...criteria]]; const open = [];
  for (const row of document.querySelectorAll('tr[data-clip]')) {
    const points = criteria.map(c => row.querySelector(`[data-c=${c}]`).value);
    if (points.includes('')) open.push(row.dataset.model + '/' + row.dataset.clip);
    rows.push([row.dataset.model, row.dataset.clip, ...points]);
  }
  if (open.length) { alert('not rated yet: ' + open.join(', ')); return; }
  const quote = s => '"' + String(s).replaceAll('"', '""') + '"';
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([rows.map(r => r.map(quote).join(',')).join('\\n')], {type: 'text/csv'}));
  link.download = 'ratings.csv'; link.click();
};
"""


def comparison_page(out: Path, clips: list[ClipResult], models: list[ModelResult]) -> Path:
    """Write ``comparison.html``: a table of means, then each clip with reference and models side by side."""
    notes = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks(clips))
    parts = [_summary_table(models), f"<ul>{notes}</ul>" if notes else "", *_plots(clips, models), "<h2>Clips</h2>"]
    embed = may_embed(Path(v) for c in clips for v in (c.video, c.reference) if v is not None)
    for name in dict.fromkeys(c.clip for c in clips):
        own = [c for c in clips if c.clip == name]
        figures = []
        if own[0].reference is not None:
            told = f"motion {own[0].reference_motion:.2f} px"
            figures.append(figure(Path(own[0].reference), out, "reference", told, embed=embed))
        figures += [figure(Path(c.video), out, c.model, _caption(c), embed=embed) for c in own]
        prompt = f"<p>{html.escape(own[0].prompt)}</p>" if own[0].prompt else ""
        parts.append(f"<h3>{html.escape(name)}</h3>{prompt}<div class=row>{''.join(figures)}</div>")
    return write_page(out / "comparison.html", "Comparison", "".join(parts), SYNC)


def rating_page(out: Path, clips: list[ClipResult]) -> Path:
    """Write ``rating.html``: the four criteria for every clip, exported as the CSV that ``--ratings`` reads."""
    head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in CRITERIA)
    embed = may_embed(Path(c.video) for c in clips)
    rows = []
    for clip in clips:
        cells = "".join(
            f"<td><select data-c={c}><option value=''>-</option>"
            + "".join(f"<option>{n}</option>" for n in range(1, 6)) + "</select></td>" for c in CRITERIA)
        told = f"{clip.clip}: {clip.prompt}" if clip.prompt else clip.clip
        rows.append(
            f"<tr data-model='{html.escape(clip.model, quote=True)}' data-clip='{html.escape(clip.clip, quote=True)}'>"
            f"<td>{figure(Path(clip.video), out, clip.model, told, embed=embed)}</td>{cells}</tr>")
    body = (f"<p>Rate each clip from 1 (bad) to 5 (good), then export.</p><table><tr><th>clip</th>{head}</tr>"
            f"{''.join(rows)}</table><button id=export>Export CSV</button>")
    return write_page(out / "rating.html", "Rating sheet", body, f"const criteria={json.dumps(CRITERIA)};{_EXPORT}")


def _caption(clip: ClipResult) -> str:
    """Return the figures under a player: against the reference where there is one, else on the video's own."""
    parts = [] if clip.psnr_db is None else [f"PSNR {clip.psnr_db:.2f} dB", f"SSIM {clip.ssim:.3f}"]
    if clip.text_similarity is not None:
        parts.append(f"text {clip.text_similarity:.3f}")
    return ", ".join(parts or [f"flicker {clip.flicker:.3f}", f"motion {clip.motion:.2f} px"])


def _plots(clips: list[ClipResult], models: list[ModelResult]) -> list[str]:
    """Return one chart a metric: every clip by model, and the score of the models."""
    charts = []
    for key, title in PLOTS.items():
        values = {model.model: {clip.clip: value for clip in clips if clip.model == model.model and
                                (value := getattr(clip, key)) is not None} for model in models}
        if any(values.values()):
            charts.append(grouped(title, values))
    scores = {model.model: {"score": model.score} for model in models if model.score is not None}
    return [*charts, *([grouped("score", scores)] if scores else [])]


def _summary_table(models: list[ModelResult]) -> str:
    names = [k for k in asdict(models[0]) if k != "model" and any(asdict(m)[k] is not None for m in models)]
    head = "".join(f"<th>{_COLUMNS.get(n, n)}</th>" for n in ("model", *names))
    body = ""
    for model in models:
        values = asdict(model)
        cells = "".join(f"<td>{_number(values[n])}</td>" for n in names)
        body += f"<tr><td>{html.escape(model.model)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def may_embed(videos: Iterable[Path]) -> bool:
    """Tell whether a page with all the small ones of these videos inside stays of a size that browsers open."""
    sizes = [path.stat().st_size for path in set(videos)]
    return sum(size for size in sizes if size <= EMBED_LIMIT_BYTES) <= PAGE_LIMIT_BYTES


def figure(video: Path, out: Path, title: str, text: str, *, embed: bool = True) -> str:
    """Return a player with its caption; ``out`` is the folder that a linked video is relative to."""
    if embed and video.stat().st_size <= EMBED_LIMIT_BYTES:
        kind = MIME_TYPES.get(video.suffix.lower(), "video/mp4")
        source = f"data:{kind};base64," + base64.b64encode(video.read_bytes()).decode()
    else:
        source = quote(os.path.relpath(video, out))
    return (f"<figure><video controls loop muted playsinline preload=metadata src='{source}'></video>"
            f"<figcaption><b>{html.escape(title)}</b> {html.escape(text)}</figcaption></figure>")


def write_page(path: Path, title: str, body: str, script: str = "") -> Path:
    """Write one self-contained page."""
    head = (f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
            f"<style>{_STYLE}</style>")
    text = f"<!doctype html><html lang=en>{head}<h1>{title}</h1>{body}<script>{script}</script></html>"
    write_text(path, text + "\n")
    return path
