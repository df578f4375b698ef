"""The pages people look at: a comparison with players that run in step, and the rating sheet. One file each.

Small videos are embedded, so a page can be mailed; larger ones are linked by relative path.
"""

from __future__ import annotations

import base64
import html
import json
import os
from dataclasses import asdict
from pathlib import Path

from mindspeed_wan.evaluation.charts import grouped
from mindspeed_wan.evaluation.compare import ClipResult, ModelResult
from mindspeed_wan.evaluation.score import CRITERIA

EMBED_LIMIT_BYTES = 2_000_000

PLOTS = {
    "psnr_db": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker (1 is still)", "motion": "motion, pixels per frame",
    "text_similarity": "text similarity (CLIP)", "frame_consistency": "frame consistency (CLIP)",
}
"""Metrics of clips that are drawn, with their titles."""

_STYLE = """
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}body{margin:2rem auto;max-width:1200px;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #8886;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}.row{display:flex;gap:1rem;flex-wrap:wrap;margin:.5rem 0 1.5rem}
figure{margin:0}video{max-width:280px;background:#0003}figcaption{font-size:.85em}.bar{height:.7rem;background:#2a7}
"""

SYNC = """
for (const row of document.querySelectorAll('.row')) {
  const all = [...row.querySelectorAll('video')];
  for (const v of all) {
    v.addEventListener('play', () => all.forEach(o => {
      if (o !== v && o.paused) { o.currentTime = v.currentTime; o.play(); } }));
    v.addEventListener('pause', () => all.forEach(o => { if (o !== v) o.pause(); }));
    v.addEventListener('seeked', () => all.forEach(o => {
      if (o !== v && Math.abs(o.currentTime - v.currentTime) > 0.05) o.currentTime = v.currentTime; }));
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
    parts = [_summary_table(models), *_plots(clips, models), "<h2>Clips</h2>"]
    for name in dict.fromkeys(c.clip for c in clips):
        own = [c for c in clips if c.clip == name]
        figures = []
        if own[0].reference is not None:
            figures.append(figure(Path(own[0].reference), out, "reference", f"motion {own[0].reference_motion:.2f} px"))
        figures += [figure(Path(c.video), out, c.model, _caption(c)) for c in own]
        prompt = f"<p>{html.escape(own[0].prompt)}</p>" if own[0].prompt else ""
        parts.append(f"<h3>{html.escape(name)}</h3>{prompt}<div class=row>{''.join(figures)}</div>")
    return write_page(out / "comparison.html", "Comparison", "".join(parts), SYNC)


def rating_page(out: Path, clips: list[ClipResult]) -> Path:
    """Write ``rating.html``: the four criteria for every clip, exported as the CSV that ``--ratings`` reads."""
    head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in CRITERIA)
    rows = []
    for clip in clips:
        cells = "".join(
            f"<td><select data-c={c}><option value=''>-</option>"
            + "".join(f"<option>{n}</option>" for n in range(1, 6)) + "</select></td>" for c in CRITERIA)
        rows.append(
            f"<tr data-model='{html.escape(clip.model, quote=True)}' data-clip='{html.escape(clip.clip, quote=True)}'>"
            f"<td>{figure(Path(clip.video), out, clip.model, clip.clip)}</td>{cells}</tr>")
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
    head = "".join(f"<th>{n.replace('_', ' ')}</th>" for n in ("model", *names))
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


def figure(video: Path, out: Path, title: str, text: str) -> str:
    """Return a player with its caption; ``out`` is the folder that a linked video is relative to."""
    if video.stat().st_size <= EMBED_LIMIT_BYTES:
        source = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    else:
        source = html.escape(os.path.relpath(video, out), quote=True)
    return (f"<figure><video controls loop muted playsinline preload=metadata src='{source}'></video>"
            f"<figcaption><b>{html.escape(title)}</b> {html.escape(text)}</figcaption></figure>")


def write_page(path: Path, title: str, body: str, script: str = "") -> Path:
    """Write one self-contained page (temporary name, then renamed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{body}<script>{script}</script></html>")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path
