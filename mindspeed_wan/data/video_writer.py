"""A video on its way to disk: frames of a tensor, H.264, whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
