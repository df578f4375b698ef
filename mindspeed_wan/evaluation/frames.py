"""Frames of a video file as an array.

Shapes: frames [T, H, W, 3] uint8, RGB.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_wan.errors import DataError
from mindspeed_wan.evaluation.metrics import MIN_SIDE

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    """Read every frame of a video.

    Returns:
        frames [T, H, W, 3] uint8 and the average frame rate in Hz.

    Raises:
        DataError: the file is missing, empty, no video, or its frames are too small for any metric.
    """
    import av

    if not path.is_file() or path.stat().st_size == 0:
        raise DataError("the video is missing or empty", where=str(path))
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"cannot be decoded: {error}", where=str(path)) from None
    if not frames:
        raise DataError("holds no frame", where=str(path))
    height, width = frames[0].shape[:2]
    if any(frame.shape != frames[0].shape for frame in frames):
        raise DataError("changes its size from frame to frame", where=str(path))
    if min(height, width) < MIN_SIDE:
        raise DataError(f"frames of {width}x{height} are smaller than {MIN_SIDE} pixels", where=str(path))
    return np.stack(frames), rate


def align(reference: np.ndarray, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut both to the shorter length and resize ``video`` to the reference's size (area-aware, antialiased)."""
    num_frames = min(len(reference), len(video))
    reference, video = reference[:num_frames], video[:num_frames]
    if reference.shape[1:3] != video.shape[1:3]:
        from PIL import Image

        height, width = reference.shape[1:3]
        resample = Image.Resampling.BICUBIC
        video = np.stack([np.asarray(Image.fromarray(f).resize((width, height), resample)) for f in video])
    return reference, video


def find_videos(folder: Path) -> dict[str, Path]:
    """Return {stem: path} of the videos directly inside ``folder``, hidden files left out.

    Raises:
        DataError: no folder, no video in it, two of one name, or a name that no table or page can hold.
    """
    if not folder.is_dir():
        raise DataError("is not a folder", where=str(folder))
    videos: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        if str(path) != str(path).encode(errors="replace").decode():
            raise DataError("the file's name is not UTF-8", where=ascii(str(path)), fix="rename the file")
        if path.stem in videos:
            raise DataError(f"holds both {videos[path.stem].name} and {path.name}", where=str(folder),
                            fix="videos pair by file name without its ending: rename or move one of them")
        videos[path.stem] = path
    if not videos:
        raise DataError(f"holds no video ({', '.join(VIDEO_SUFFIXES)})", where=str(folder))
    return videos
