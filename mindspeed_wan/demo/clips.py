"""Real mp4 clips of coloured shapes that move, with captions and annotations in MindSpeed-MM's three files.

``write_clips`` writes ``videos/*.mp4`` (H.264, yuv420p), ``data.jsonl`` (one annotated clip a line), ``data.txt``
("<folder>,<annotation>" lines) and ``data.json`` (the dataset section that ``--mm-data`` reads).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (41, 98, 255),
    "yellow": (240, 200, 40),
    "white": (235, 235, 235),
    "purple": (140, 70, 190),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {"dark": (24, 26, 34), "sandy": (180, 160, 120), "grey": (110, 112, 116)}


@dataclass(frozen=True)
class ClipSet:
    """Where ``write_clips`` put things."""

    folder: Path
    data_txt: Path
    data_json: Path
    annotation: Path
    videos: tuple[Path, ...]


def write_clips(
    folder: str | Path,
    *,
    num_clips: int = 8,
    size: tuple[int, int] = (64, 96),
    num_frames: int = 17,
    fps: int = 16,
    seed: int = 0,
    tokenizer: str | Path | None = None,
) -> ClipSet:
    """Write captioned clips and their annotation files.

    Args:
        folder: created; existing files are overwritten.
        num_clips: how many; each has its own shape, colour, motion and caption.
        size: (height, width) in pixels, both even (yuv420p).
        num_frames: frames per clip; ``data.json`` asks for the largest 4k+1 that fits.
        fps: frame rate of the files.
        seed: names the content; the same seed gives the same files.
        tokenizer: written into ``data.json`` when given.
    """
    root = Path(folder).resolve()
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    videos, rows = [], []
    for index in range(num_clips):
        caption, frames = _scene(rng, size, num_frames)
        path = root / "videos" / f"clip_{index:04d}.mp4"
        write_mp4(path, frames, fps=fps)
        videos.append(path)
        rows.append({
            "path": f"videos/{path.name}",
            "cap": caption,
            "num_frames": num_frames,
            "fps": fps,
            "resolution": {"height": size[0], "width": size[1]},
        })
    annotation, data_txt, data_json = root / "data.jsonl", root / "data.txt", root / "data.json"
    annotation.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data_txt.write_text(f"{root},{annotation}\n", encoding="utf-8")
    settings = mm_data_settings(data_txt, root, size=size, num_frames=num_frames, fps=fps, tokenizer=tokenizer)
    data_json.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return ClipSet(root, data_txt, data_json, annotation, tuple(videos))


def mm_data_settings(
    data_txt: Path,
    root: Path,
    *,
    size: tuple[int, int],
    num_frames: int,
    fps: int,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Return the dataset section that MindSpeed-MM's ``data.json`` for Wan2.2 holds, for clips of this size."""
    height, width = size
    settings: dict[str, Any] = {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {
                "data_path": str(data_txt), "data_folder": str(root), "data_storage_mode": "combine",
            },
            "preprocess_parameters": {
                "video_processor_type": "OpensoraplanVideoProcessor",
                "video_reader_type": "DecordVideo",
                "image_reader_type": "Image",
                "num_frames": (num_frames - 1) // 4 * 4 + 1,
                "min_num_frames": 1,
                "frame_interval": 1,
                "auto_interval": False,
                "max_height": height,
                "max_width": width,
                "max_hxw": height * width,
                "train_fps": fps,
                "speed_factor": 1.0,
                "drop_short_ratio": 0.0,
                "cfg": 0.0,
                "hw_stride": 16,
                "force_resolution": True,
                "hw_aspect_thr": 5.0,
                "truncate_t_by_sp": False,
                "train_pipeline": {
                    "video": [
                        {"trans_type": "ResizeVideo", "param": {"transform_size": {"max_height": height,
                         "max_width": width}, "mode": "shortside"}},
                        {"trans_type": "ToTensorVideo"},
                        {"trans_type": "norm_fun", "param": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
                        {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": {"max_height": height,
                         "max_width": width}}},
                    ]
                },
            },
            "use_text_processer": True,
            "text_preprocess_methods": [
                {"method": "basic_clean"}, {"method": "whitespace_clean"},
            ],
        },
        "dataloader_param": {
            "dataloader_mode": "sampler",
            "sampler_type": "LengthGroupedSampler",
            "shuffle": True,
            "drop_last": True,
            "pin_memory": True,
            "group_frame": False,
            "group_resolution": True,
        },
    }
    if tokenizer is not None:
        settings["dataset_param"]["tokenizer_config"] = {
            "autotokenizer_name": "AutoTokenizer", "hub_backend": "hf", "from_pretrained": str(tokenizer),
            "model_max_length": 512,
        }
    return settings


def write_mp4(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int | Fraction = 16,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    quality: int = 12,
) -> None:
    """Encode ``frames`` [F, H, W, 3] uint8 RGB as an mp4; ``quality`` is x264's crf (lower is better)."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = int(frames.shape[1]), int(frames.shape[2])
        stream.pix_fmt = pixel_format
        if codec == "libx264":
            # The same frames must give the same bytes: one thread, and no macroblock tree (measured: with it, one
            # encoding in a few differs).
            stream.thread_count = 1
            stream.options = {"crf": str(quality), "preset": "fast", "x264-params": "mbtree=0"}
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            for packet in stream.encode(frame.reformat(format=pixel_format)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _scene(rng: np.random.Generator, size: tuple[int, int], num_frames: int) -> tuple[str, np.ndarray]:
    """Draw one clip: a caption and frames [F, H, W, 3] uint8."""
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    motion, backdrop = str(rng.choice(list(MOTIONS))), str(rng.choice(list(BACKGROUNDS)))
    height, width = size
    radius = 0.18 * min(size) * (0.8 + 0.4 * rng.random())
    direction, start = MOTIONS[motion], rng.random(2) * 0.3 + 0.35
    travel = 0.5 * np.array([width, height])
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        progress = index / max(1, num_frames - 1) - 0.5
        centre = start * [width, height] + progress * travel * direction
        frames[index] = draw_frame(size, shape, centre, radius, (colour, backdrop))
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} moves {motion} over a {backdrop} background", frames


def draw_frame(
    size: tuple[int, int], shape: str, centre: np.ndarray, radius: float, colours: tuple[str, str]
) -> np.ndarray:
    """Return one frame [H, W, 3] uint8: the shape with a soft edge on a backdrop that darkens downwards."""
    colour, backdrop = COLOURS[colours[0]], BACKGROUNDS[colours[1]]
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    dx, dy = columns - centre[0], rows - centre[1]
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    else:
        slope = math.sqrt(3.0) / 2
        distance = np.maximum(dy - 0.5 * radius, slope * np.abs(dx) - 0.5 * dy - 0.5 * radius)
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    shade = 1.0 - 0.25 * rows[..., None] / size[0]
    picture = np.array(backdrop, np.float32) * shade * (1 - cover) + np.array(colour, np.float32) * cover
    return (picture + 0.5).astype(np.uint8)
