"""Odd and damaged media files as they turn up in real data sets, written on the spot.

``odd_files`` are unusual and must be read; ``damaged_files`` must be refused in one line.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from mindspeed_wan.demo.clips import write_mp4


def numbered_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Return frames [count, H, W, 3] that say which they are: the number in binary as bright and dark blocks."""
    frames = np.full((count, height, width, 3), 40, np.uint8)
    step = width // 8
    for number in range(count):
        for bit in range(8):
            if number >> bit & 1:
                frames[number, height // 4 : 3 * height // 4, bit * step : (bit + 1) * step] = 220
    return frames


def number_of(frame: np.ndarray) -> int:
    """Read back which frame of ``numbered_frames`` this is, at any size."""
    height, width = frame.shape[:2]
    row = frame[height * 3 // 8 : height * 5 // 8].mean(axis=(0, 2))
    step = width / 8
    bits = [row[int((bit + 0.3) * step) : int((bit + 0.7) * step)].mean() > 130 for bit in range(8)]
    return sum(1 << bit for bit, on in enumerate(bits) if on)


def write_stream(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    stamps: list[int] | None = None,
    clock: int = 600,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
) -> Path:
    """Encode with explicit timestamps (in ticks of ``1/clock`` s), for files with a variable frame rate."""
    import av

    stamps = stamps or [i * clock // 24 for i in range(len(frames))]
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        stream.codec_context.time_base = Fraction(1, clock)
        for frame, stamp in zip(frames, stamps):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixel_format)
            picture.pts, picture.time_base = stamp, Fraction(1, clock)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_audio(path: Path) -> Path:
    """Write a file with an audio stream and nothing else."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        for start in range(0, 9600, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def set_rotation(path: Path, degrees: int) -> Path:
    """Write the display matrix of a phone held ``degrees`` clockwise into the mp4's track header."""
    raw = bytearray(path.read_bytes())
    at = raw.find(b"tkhd") + 4
    matrix = at + (52 if raw[at] == 1 else 40)
    one = 0x10000
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    for offset, value in zip((0, 4, 12, 16), (a, b, c, d)):
        raw[matrix + offset : matrix + offset + 4] = (value & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(raw)
    return path


def odd_files(root: Path) -> dict[str, tuple[Path, int, int, int]]:
    """Write unusual files that must be read: name -> (path, frames, height, width)."""
    frames, odd = numbered_frames(21), numbered_frames(21, 65, 97)
    made: dict[str, tuple[Path, int, int, int]] = {}

    def add(name: str, path: Path, count: int = 21, height: int = 64, width: int = 96) -> None:
        made[name] = (path, count, height, width)

    vfr = [0]
    for number in range(1, 21):
        vfr.append(vfr[-1] + (25 if number % 3 else 75))
    add("constant rate", write_stream(root / "cfr.mp4", frames))
    add("variable rate", write_stream(root / "vfr.mp4", frames, stamps=vfr))
    add("long gap", write_stream(root / "gap.mp4", frames, stamps=[i * 25 + (3000 if i > 9 else 0) for i in range(21)]))
    add("starts late", write_stream(root / "late.mp4", frames, stamps=[1200 + i * 25 for i in range(21)]))
    for degrees, (h, w) in ((90, (96, 64)), (180, (64, 96)), (270, (96, 64))):
        path = set_rotation(write_stream(root / f"rotated{degrees}.mp4", frames), degrees)
        add(f"rotated {degrees}", path, 21, h, w)
    add("odd size", write_stream(root / "odd.mp4", odd, pixel_format="yuv444p"), 21, 65, 97)
    add("10 bit", write_stream(root / "ten.mp4", frames, pixel_format="yuv420p10le"))
    add("4:2:2", write_stream(root / "yuv422.mp4", frames, pixel_format="yuv422p"))
    for name, x264 in (("open groups", "keyint=7:open-gop=1:bframes=2"), ("no b frames", "bframes=0:keyint=1")):
        add(name, write_stream(root / f"{name}.mp4", frames, options={"x264-params": x264}))
    add("mkv", write_stream(root / "clip.mkv", frames))
    add("mpeg-ts", write_stream(root / "clip.ts", frames))
    add("hevc", write_stream(root / "hevc.mp4", frames, codec="libx265", options={"x265-params": "log-level=none"}))
    add("webm vp9", write_stream(root / "clip.webm", frames, codec="libvpx-vp9", clock=1000,
                                 options={"crf": "10", "b": "0", "cpu-used": "8"}))
    add("avi mpeg4", _simple(root / "clip.avi", frames, "mpeg4"))
    add("mov mjpeg", _simple(root / "clip.mov", frames, "mjpeg", "yuvj420p"))
    add("upper case", write_stream(root / "CLIP.MP4", frames))
    add("unicode name", write_stream(root / "一只 猫, çok güzel.mp4", frames))
    add("one frame", write_stream(root / "one.mp4", frames[:1]), 1)
    add("gif", _gif(root / "clip.gif", frames))
    os.symlink(root / "cfr.mp4", root / "link.mp4")
    add("symbolic link", root / "link.mp4")
    return made


def _simple(path: Path, frames: np.ndarray, codec: str, pixel_format: str = "yuv420p") -> Path:
    write_mp4(path, frames, fps=24, codec=codec, pixel_format=pixel_format)
    return path


def _gif(path: Path, frames: np.ndarray) -> Path:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    return path


def damaged_files(root: Path) -> dict[str, Path]:
    """Write files that cannot be read: name -> path."""
    good = write_stream(root / "good.mp4", numbered_frames(21))
    raw = good.read_bytes()
    rng = np.random.default_rng(0)
    made: dict[str, Path] = {}

    def add(name: str, content: bytes, suffix: str = ".mp4") -> None:
        path = root / f"bad{len(made):02d}{suffix}"
        path.write_bytes(content)
        made[name] = path

    header_last = raw.find(b"moov") > raw.find(b"mdat")
    assert header_last  # truncation then loses the index of frames, as with an interrupted copy
    add("empty", b"")
    for share in (1, 2, 5, 10, 25, 50, 75, 90, 99):
        add(f"truncated to {share} %", raw[: max(1, len(raw) * share // 100)])
    add("html", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    add("text", b"this is not a video\n" * 40)
    add("json", b'{"error": "access denied"}')
    add("zeros", bytes(5000))
    add("ones", b"\xff" * 5000)
    add("noise", rng.bytes(20000))
    add("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    add("zip", b"PK\x03\x04" + rng.bytes(3000))
    add("png named mp4 torn", b"\x89PNG\r\n\x1a\n" + rng.bytes(500))
    add("header only", raw[:40])
    add("tail only", raw[len(raw) // 2 :])
    add("moov zeroed", raw[: raw.find(b"moov")] + bytes(len(raw) - raw.find(b"moov")))
    add("mdat zeroed", _blank(raw, raw.find(b"mdat") + 4, raw.find(b"moov") - 4))
    add("mdat noise", raw[: raw.find(b"mdat") + 4] + rng.bytes(raw.find(b"moov") - raw.find(b"mdat") - 8)
        + raw[raw.find(b"moov") - 4 :])
    for box in (b"stsd", b"stsz", b"stco", b"stsc", b"avcC", b"trak", b"mvhd", b"mdhd"):
        at = raw.find(box)
        add(f"{box.decode()} renamed", raw[:at] + b"free" + raw[at + 4 :])
    add("stco beyond the end", _patch(raw, raw.find(b"stco") + 12, b"\x7f\xff\xff\xff"))
    add("stsz huge", _patch(raw, raw.find(b"stsz") + 8, b"\x7f\xff\xff\xff"))
    made["audio only"] = write_audio(root / "audio.mp4")
    made["audio only mkv"] = write_audio(root / "audio.mkv")
    for suffix in (".mkv", ".webm", ".avi", ".mov", ".gif"):
        add(f"noise {suffix}", rng.bytes(4000), suffix)
        add(f"empty {suffix}", b"", suffix)
    made["missing"] = root / "nowhere.mp4"
    made["folder"] = root / "folder.mp4"
    made["folder"].mkdir()
    made["link loop"] = root / "loop.mp4"
    os.symlink(made["link loop"], made["link loop"])
    made["dead link"] = root / "dead.mp4"
    os.symlink(root / "gone.mp4", made["dead link"])
    return made


def _patch(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def _blank(raw: bytes, start: int, end: int) -> bytes:
    return raw[:start] + bytes(end - start) + raw[end:]


def damaged_images(root: Path) -> dict[str, Path]:
    """Write images that cannot be read: name -> path."""
    from PIL import Image

    good = root / "good.png"
    Image.fromarray(numbered_frames(1)[0]).save(good)
    raw, made = good.read_bytes(), {}
    contents: dict[str, bytes] = {
        "empty": b"", "torn": raw[: len(raw) // 2], "html": b"<html>", "noise": np.random.default_rng(1).bytes(999),
        "header only": raw[:20],
    }
    for name, content in contents.items():
        for suffix in (".png", ".jpg"):
            made[f"{name} {suffix}"] = root / f"{name.replace(' ', '_')}{suffix}"
            made[f"{name} {suffix}"].write_bytes(content)
    return made
