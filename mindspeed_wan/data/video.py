"""One reader for every video file: which frames there are, and exactly the frames asked for.

Frame ``i`` is the i-th frame in order of presentation, whatever the frame rate does in between. PyAV decodes from the
start (or from a key frame before the first wanted one) and counts, so it is the reference and what ``auto`` takes.
decord gives the same pixels at the same speed where it works, but finds frames by time (wrong on a variable frame rate,
so those files are refused), ignores rotation, and decord2 3.4 fails on widths that are not a multiple of 64. torchcodec
is used when asked for.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mindspeed_wan.errors import DataError, ResourceError

Backend = Literal["auto", "pyav", "decord", "torchcodec"]

_SEEK_FROM = 48
"""First wanted frame from which PyAV looks for a key frame instead of decoding from the start."""
_EVEN_SPACING = 0.02
"""Largest deviation from evenly spaced timestamps, in frames, that still counts as a constant frame rate."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds; sizes are those of the upright picture (rotation applied) in pixels as stored.

    ``pixel_aspect`` is width by height of a pixel; nothing is stretched where it is not 1.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    rotation: int = 0
    codec: str = ""
    constant_rate: bool = True
    pixel_aspect: float = 1.0


def read_frames(path: Path, indices: Sequence[int], *, backend: Backend = "auto", threads: int = 1) -> np.ndarray:
    """Decode frames.

    Args:
        path: the file.
        indices: wanted frames, ascending (repeats allowed).
        backend: ``auto`` takes PyAV, or decord where only that is installed.
        threads: decoder threads; 1 when several worker processes decode at once.

    Returns:
        uint8 [len(indices), H, W, 3] RGB, upright; with PyAV a view of planar memory [3, F, H, W].

    Raises:
        DataError: the file cannot be decoded, or has fewer frames than asked for.
        ResourceError: the backend that was asked for is not installed.
    """
    if not len(indices):
        raise DataError("no frames were asked for", where=str(path))
    readers = {"pyav": _read_pyav, "decord": _read_decord, "torchcodec": _read_torchcodec}
    return readers[resolve_backend(backend)](path, indices, threads)


def resolve_backend(backend: Backend) -> str:
    """Return the decoder that ``backend`` means here.

    Raises:
        ResourceError: asked for by name and not installed.
    """
    if backend == "auto":
        return "decord" if importlib.util.find_spec("decord") and not importlib.util.find_spec("av") else "pyav"
    module = {"pyav": "av"}.get(backend, backend)
    if importlib.util.find_spec(module) is None:
        package = {"pyav": "av", "decord": "decord2"}.get(backend, backend)
        raise ResourceError(f"the video reader {backend} is not installed", fix=f"pip install {package}")
    return backend


# ---- PyAV ------------------------------------------------------------------------------------------------------------


def _open(path: Path, threads: int) -> tuple[Any, Any]:
    """Open a file; returns (container, video stream)."""
    try:
        import av
    except ImportError:
        raise ResourceError("PyAV is not installed", fix="pip install 'mindspeed-wan[train]' (or pip install av)"
                            ) from None
    av.logging.set_level(None)
    try:
        container = av.open(str(path), mode="r", metadata_errors="ignore")
    except Exception as error:  # FFmpeg's errors are classes of many bases
        raise DataError(f"cannot open: {_reason(error)}", where=str(path)) from None
    if not container.streams.video:
        only = ", only audio" if container.streams.audio else ""
        container.close()
        raise DataError(f"has no video stream{only}", where=str(path))
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise DataError("its video stream names no codec, or one without a decoder here", where=str(path))
    stream.codec_context.thread_count = threads
    stream.thread_type = "AUTO" if threads != 1 else "SLICE"
    return container, stream


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def probe(path: Path) -> VideoInfo:
    """Return what a video file holds, without decoding more than one frame.

    The packets are counted, because the number in the header is often missing or wrong.

    Raises:
        DataError: not a video, or damaged so that not even its first frame decodes.
    """
    container, stream = _open(path, 1)
    with container:
        first = _first_frame(container, stream, path)
        rotation = _rotation(first)
        timeline = _timeline(container, stream, path, first)
        height, width = (first.width, first.height) if rotation in (90, 270) else (first.height, first.width)
        constant = _evenly_spaced(timeline.stamps)
        return VideoInfo(
            num_frames=len(timeline.stamps), fps=_rate(stream, timeline, constant), height=height, width=width,
            rotation=rotation, codec=stream.codec_context.name, constant_rate=constant,
            pixel_aspect=_pixel_aspect(stream, rotation),
        )


def _first_frame(container: Any, stream: Any, path: Path) -> Any:
    try:
        return next(container.decode(stream))
    except StopIteration:
        raise DataError("holds no frame", where=str(path)) from None
    except Exception as error:
        raise DataError(f"cannot decode the first frame: {_reason(error)}", where=str(path)) from None


@dataclass(frozen=True)
class _Timeline:
    """The shown frames of a file in order of presentation: their timestamps, and the numbers of the key frames.

    ``is_timed`` is False where the file has no timestamps and ``stamps`` only count.
    """

    stamps: list[int]
    keys: list[int]
    is_timed: bool = True


def _timeline(container: Any, stream: Any, path: Path, first: Any) -> _Timeline:
    """Read packet headers; ``first`` is the first frame that decodes, what is shown before it is lost.

    A file that was cut out of a stream begins with frames that refer to others it does not have.
    """
    try:
        container.seek(0, stream=stream, backward=True, any_frame=False)
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    except Exception as error:
        raise DataError(f"damaged: {_reason(error)}", where=str(path)) from None
    shown = [(p.pts if p.pts is not None else p.dts, bool(p.is_keyframe)) for p in packets]
    is_timed = first.pts is not None and all(stamp is not None for stamp, _ in shown)
    if is_timed:
        shown = sorted(entry for entry in shown if entry[0] >= first.pts)
    keys = [number for number, (_, is_key) in enumerate(shown) if is_key]
    return _Timeline([stamp for stamp, _ in shown] if is_timed else list(range(len(shown))), keys, is_timed)


def _rate(stream: Any, timeline: _Timeline, constant: bool) -> float:
    """Return frames per second: what the header says, unless evenly spaced timestamps say something else."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    stamps = timeline.stamps
    if not (constant and timeline.is_timed and len(stamps) > 2):
        return rate
    measured = (len(stamps) - 1) / float((stamps[-1] - stamps[0]) * stream.time_base)
    # A stream without a frame table (MPEG-TS) repeats what its encoder wrote, such as its clock's 90,000 a second.
    return rate if abs(rate - measured) <= 0.1 * measured else measured


def _pixel_aspect(stream: Any, rotation: int) -> float:
    """Return width by height of a pixel of the upright picture."""
    aspect = float(stream.codec_context.sample_aspect_ratio or 1)
    return 1 / aspect if rotation in (90, 270) else aspect


def _evenly_spaced(stamps: Sequence[float] | np.ndarray, *, clock: float = 1.0) -> bool:
    """True when timestamps rise by equal steps, to the rounding of the file's clock (one tick is ``clock``)."""
    if len(stamps) < 3:
        return True
    times = np.asarray(stamps, np.float64)
    step = (times[-1] - times[0]) / (len(times) - 1)
    if step <= 0:
        return False
    deviation = np.abs(times - times[0] - step * np.arange(len(times)))
    # Clocks count in whole ticks; a step of 33.37 ticks shows as 33 and 34.
    return bool(deviation.max() <= max(clock, _EVEN_SPACING * step))


def _rotation(frame: Any) -> int:
    """Return by how many degrees counter-clockwise the picture must be turned: 0, 90, 180 or 270.

    Read from the display matrix itself, because ``frame.rotation`` is missing in PyAV before 15.
    """
    for entry in frame.side_data:
        if "DISPLAYMATRIX" in str(entry.type):
            across, down = struct.unpack("<2i", bytes(entry)[:8])
            return round(-math.degrees(math.atan2(down, across)) / 90) * 90 % 360
    return 0


def _upright(array: np.ndarray, rotation: int) -> np.ndarray:
    """Turn frames [F, H, W, 3] counter-clockwise by ``rotation`` degrees (a view)."""
    return np.rot90(array, rotation // 90, axes=(1, 2)) if rotation else array


def _read_pyav(path: Path, indices: Sequence[int], threads: int, *, seek: bool = True) -> np.ndarray:
    wanted = list(indices)
    container, stream = _open(path, threads)
    with container:
        numbers = _seek_near(container, stream, path, wanted[0]) if seek and wanted[0] >= _SEEK_FROM else None
        filled, position, rotation, convert = 0, -1, 0, _PlanarConverter(threads)
        planes = np.empty(0, np.uint8)  # [3, F, H, W], allocated when the first frame tells its size
        try:
            for count, frame in enumerate(container.decode(stream)):
                position = count if numbers is None else numbers.get(frame.pts, -1)
                if position > wanted[filled]:
                    break  # the seek went too far
                if position == wanted[filled]:
                    if filled == 0:
                        rotation = _rotation(frame)
                        planes = np.empty((3, len(wanted), frame.height, frame.width), np.uint8)
                    elif (frame.height, frame.width) != planes.shape[2:]:
                        raise DataError("the picture size changes within the file", where=str(path))
                    filled = _store(convert(frame), planes, filled, wanted)
                    if filled == len(wanted):
                        return _upright(planes.transpose(1, 2, 3, 0), rotation)
        except DataError:
            raise
        except Exception as error:
            if numbers is None:
                raise DataError(f"cannot decode frame {position + 1}: {_reason(error)}", where=str(path)) from None
    if numbers is not None:
        return _read_pyav(path, indices, threads, seek=False)
    if position < 0:
        raise DataError("no frame can be decoded", where=str(path))
    raise DataError(f"has {position + 1} frames, frame {wanted[filled]} was asked for", where=str(path),
                    fix="correct num_frames or cut in the annotation")


class _PlanarConverter:
    """Converts frames to 8-bit planes: green, blue, red.

    Planar from the start: the values are those of rgb24 (10-bit files come out a little more exact), and nothing has to
    be transposed afterwards, which costs half as much as decoding. ``frame.reformat`` would start a set of threads for
    every frame; they cost more than they give, and a process forked meanwhile hangs when it frees them.
    """

    def __init__(self, threads: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter, self._options = VideoReformatter(), {"threads": threads}

    def __call__(self, frame: Any) -> Any:
        try:
            return self._reformatter.reformat(frame, format="gbrp", **self._options)
        except TypeError:
            if not self._options:
                raise
            self._options = {}  # PyAV before 17 has no threads here
            return self._reformatter.reformat(frame, format="gbrp")


def _store(picture: Any, planes: np.ndarray, filled: int, wanted: Sequence[int]) -> int:
    """Copy a planar frame into ``planes`` [3, F, H, W] wherever it is wanted; returns how many frames are filled."""
    height, width = planes.shape[2:]
    for channel, plane in zip((1, 2, 0), picture.planes):  # green, blue, red
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        planes[channel, filled] = rows[:height, :width]
    number, first = wanted[filled], filled
    filled += 1
    while filled < len(wanted) and wanted[filled] == number:
        planes[:, filled] = planes[:, first]
        filled += 1
    return filled


def _seek_near(container: Any, stream: Any, path: Path, first: int) -> dict[int, int] | None:
    """Seek to a key frame before frame ``first``.

    Returns:
        the number of each frame by its timestamp, since a seek does not always land where it should (MPEG-TS has no
        index); ``None``, at the start of the file, where timestamps do not tell frames apart.
    """
    timeline = _timeline(container, stream, path, _first_frame(container, stream, path))
    numbers = {stamp: number for number, stamp in enumerate(timeline.stamps)}
    is_usable = timeline.is_timed and len(numbers) == len(timeline.stamps)
    keys = [number for number in timeline.keys if number <= first]
    # Frames shown before a key frame but coded after it (an open group of pictures) are lost by a seek to it, so one
    # group earlier is taken.
    target = timeline.stamps[keys[-2]] if is_usable and len(keys) > 1 else 0
    container.seek(target, stream=stream, backward=True, any_frame=False)
    return numbers if is_usable else None


# ---- decord and torchcodec -------------------------------------------------------------------------------------------


def _read_decord(path: Path, indices: Sequence[int], threads: int) -> np.ndarray:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=threads)
        count, stamps = len(reader), reader.get_frame_timestamp(range(len(reader)))[:, 0]
    except Exception as error:
        raise DataError(f"decord cannot open it: {_reason(error)}", where=str(path)) from None
    if not _evenly_spaced(stamps, clock=1e-3):
        raise DataError("its frame rate varies, and decord then returns wrong frames", where=str(path),
                        fix="use the reader pyav")
    if indices[-1] >= count:
        raise DataError(f"has {count} frames, frame {indices[-1]} was asked for", where=str(path))
    try:
        return np.asarray(reader.get_batch(list(indices)).asnumpy())
    except Exception as error:
        raise DataError(f"decord cannot decode it: {_reason(error)}", where=str(path), fix="use the reader pyav"
                        ) from None


def _read_torchcodec(path: Path, indices: Sequence[int], threads: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact")
        return np.asarray(decoder.get_frames_at(indices=list(indices)).data.numpy())
    except Exception as error:
        raise DataError(f"torchcodec cannot decode it: {_reason(error)}", where=str(path)) from None


# ---- images ----------------------------------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """Read an image as a clip of one frame: uint8 [1, H, W, 3] RGB, turned upright by its EXIF orientation.

    Transparent pixels are put on white; a moving image gives its first frame.

    Raises:
        DataError: not an image, damaged, or too large to be real.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = _eight_bit(ImageOps.exif_transpose(opened))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
            return np.asarray(image.convert("RGB"))[None].copy()
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(f"cannot read the image: {_reason(error)}", where=str(path)) from None


def _eight_bit(image: Any) -> Any:
    """Scale grey values of 16 bits, which Pillow's own conversion would cut off at 255 (a white picture)."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    return Image.fromarray((values / 257).round().astype(np.uint8))
