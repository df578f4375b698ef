"""Decoding: the frames asked for and no others, on every kind of file; damaged files are refused in one line."""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest

from mindspeed_wan.data import video
from mindspeed_wan.data.video import probe, read_frames, read_image
from mindspeed_wan.errors import DataError, ResourceError
from tests.helpers.odd_media import (
    damaged_files,
    damaged_images,
    number_of,
    numbered_frames,
    odd_files,
    set_rotation,
    write_stream,
)

BACKENDS = ["pyav"] + (["decord"] if importlib.util.find_spec("decord") else [])


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return odd_files(tmp_path_factory.mktemp("odd"))


def _numbers(frames):
    return [number_of(frame) for frame in frames]


def test_exact_frames_of_unusual_files(odd):
    for name, (path, count, height, width) in odd.items():
        if "rotated" in name:
            continue
        wanted = sorted({0, count // 3, count // 2, count - 1})
        frames = read_frames(path, wanted)
        assert frames.shape == (len(wanted), height, width, 3), name
        assert _numbers(frames) == wanted, name


def test_probe_of_unusual_files(odd):
    for name, (path, count, height, width) in odd.items():
        info = probe(path)
        assert (info.num_frames, info.height, info.width) == (count, height, width), name
        assert info.constant_rate == (name not in ("variable rate", "long gap")), name


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_files_come_out_upright(odd, degrees):
    path, count, height, width = odd[f"rotated {degrees}"]
    frames = read_frames(path, range(count))
    assert frames.shape == (count, height, width, 3)
    # The display matrix says how far the picture must be turned clockwise to be upright.
    stored = np.rot90(frames, degrees // 90, axes=(1, 2))
    assert _numbers(stored) == list(range(count))


def test_every_backend_decodes_the_same_pixels(tmp_path):
    path = write_stream(tmp_path / "wide.mp4", numbered_frames(21, 64, 128))
    reference = read_frames(path, range(21), backend="pyav")
    for backend in BACKENDS:
        assert np.array_equal(read_frames(path, range(21), backend=backend), reference), backend
        assert np.array_equal(read_frames(path, [3, 3, 20], backend=backend), reference[[3, 3, 20]]), backend


def test_planar_conversion_equals_the_usual_one(odd):
    """Frames are converted straight to planes; FFmpeg's packed rgb24 conversion is the reference."""
    import av

    for name, (path, count, *_) in odd.items():
        if "rotated" in name:
            continue
        with av.open(str(path)) as container:
            reference = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        planar, source = read_frames(path, range(count)), numbered_frames(count).astype(int)
        if name == "10 bit":  # here the two differ by up to 2, and the planar one is nearer to what was encoded
            assert np.abs(planar - source).mean() < np.abs(reference - source).mean() < 3
        else:
            assert np.array_equal(planar, reference), name


@pytest.mark.skipif("decord" not in BACKENDS, reason="decord is not installed")
def test_decord_is_not_trusted_with_a_variable_rate(odd):
    with pytest.raises(DataError, match="frame rate varies"):
        read_frames(odd["variable rate"][0], [0, 9], backend="decord")


@pytest.mark.parametrize("first", [0, 47, 48, 49, 96, 100, 139, 180])
@pytest.mark.parametrize("options", ["keyint=250", "keyint=12:open-gop=1:bframes=3", "keyint=30:bframes=0", "keyint=1"])
def test_seeking_lands_on_the_frame_that_was_asked_for(tmp_path_factory, first, options):
    path = tmp_path_factory.getbasetemp() / f"long_{options.replace(':', '_').replace('=', '')}.mp4"
    if not path.exists():
        write_stream(path, numbered_frames(200, 32, 64), options={"x264-params": options})
    wanted = [first, first + 2, first + 5, first + 5, first + 19]
    assert _numbers(read_frames(path, wanted)) == wanted


def test_seeking_with_a_variable_rate(tmp_path):
    stamps = np.cumsum([25 if i % 4 else 90 for i in range(150)]).tolist()
    path = write_stream(tmp_path / "vfr.mp4", numbered_frames(150, 32, 64), stamps=stamps,
                        options={"x264-params": "keyint=20:bframes=2"})
    assert _numbers(read_frames(path, [60, 61, 99, 149])) == [60, 61, 99, 149]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A transport stream: it has no index, and its header repeats the encoder's clock as the frame rate."""
    return write_stream(tmp_path_factory.mktemp("ts") / "stream.ts", numbered_frames(200, 32, 64),
                        options={"x264-params": "keyint=24:bframes=2"})


@pytest.mark.parametrize("first", [48, 60, 99, 150, 190])
def test_seeking_in_a_file_without_an_index(stream, first):
    assert _numbers(read_frames(stream, [first, first + 1, first + 9])) == [first, first + 1, first + 9]


def test_the_rate_is_that_of_the_timestamps(stream):
    info = probe(stream)
    assert info.num_frames == 200 and info.fps == pytest.approx(24) and info.constant_rate


def test_a_file_cut_out_of_a_stream_is_counted_from_its_first_whole_frame(stream, tmp_path):
    """What is shown before its first key frame cannot be decoded; with and without a seek frames have one number."""
    import av

    path = tmp_path / "cut.ts"
    raw = stream.read_bytes()
    path.write_bytes(raw[188 * (len(raw) // 188 // 3) + 50 :])
    with av.open(str(path)) as container:
        shown = [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown[0] > 0 and probe(path).num_frames == len(shown) > 60
    assert _numbers(read_frames(path, range(len(shown)))) == shown
    assert _numbers(read_frames(path, range(50, len(shown)))) == shown[50:]


def test_pixels_that_are_not_square_are_reported(tmp_path):
    path = write_stream(tmp_path / "sar.mp4", numbered_frames(5), options={"x264-params": "sar=4/3"})
    assert probe(path).pixel_aspect == pytest.approx(4 / 3)
    assert probe(set_rotation(path, 90)).pixel_aspect == pytest.approx(3 / 4)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    files = damaged_files(tmp_path)
    images = damaged_images(tmp_path)
    assert len(files) + len(images) >= 60
    for name, path in files.items():
        start = time.monotonic()
        for backend in BACKENDS:
            try:
                frames = read_frames(path, range(21), backend=backend)
            except DataError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) <= 2, name
            else:  # FFmpeg can do without some boxes; what it returns has to be whole
                assert _numbers(frames) == list(range(21)), (name, backend)
        assert time.monotonic() - start < 10, name
        try:
            probe(path)
        except DataError as error:
            assert str(path) in str(error), name
    for name, path in images.items():
        with pytest.raises(DataError, match="cannot read the image"):
            read_image(path)
        assert path.exists(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_frames_than_the_file_has(odd, backend):
    path, count, *_ = odd["10 bit" if backend == "pyav" else "constant rate"]
    with pytest.raises(DataError, match=rf"has {count} frames, frame {count + 4} was asked for"):
        read_frames(path, [0, count + 4], backend=backend)


def test_no_frames_is_an_error(odd):
    with pytest.raises(DataError, match="no frames"):
        read_frames(odd["constant rate"][0], [])


def test_an_absent_backend_is_named(monkeypatch):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert video.resolve_backend("auto") == "pyav"
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: object() if name == "decord" else None)
    assert video.resolve_backend("auto") == "decord"
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="decord is not installed"):
        video.resolve_backend("decord")


def test_torchcodec_is_called_with_exact_seeking(monkeypatch, tmp_path):
    import sys
    import types

    import torch

    calls = {}

    class VideoDecoder:
        def __init__(self, path, **options):
            calls.update(options, path=path)

        def get_frames_at(self, indices):
            return types.SimpleNamespace(data=torch.zeros(len(indices), 4, 6, 3, dtype=torch.uint8))

    decoders = types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: object())
    assert read_frames(tmp_path / "a.mp4", [1, 2], backend="torchcodec").shape == (2, 4, 6, 3)
    assert calls["seek_mode"] == "exact" and calls["dimension_order"] == "NHWC"


def test_images_are_upright_and_opaque(tmp_path):
    from PIL import Image

    frame = numbered_frames(6)[5]
    image = Image.fromarray(frame)
    image.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.dstack([frame, np.zeros(frame.shape[:2], np.uint8)])).save(tmp_path / "clear.png")
    deep = np.linspace(0, 65535, 64 * 96).reshape(64, 96)
    for name, dtype in (("deep.png", np.uint16), ("deep.tif", np.uint16), ("wide.tif", np.int32)):
        Image.fromarray(deep.astype(dtype)).save(tmp_path / name)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    assert np.array_equal(read_image(tmp_path / "plain.png")[0], frame)
    assert np.array_equal(read_image(tmp_path / "turned.png")[0], np.rot90(frame, -1))
    assert (read_image(tmp_path / "clear.png") == 255).all()
    for name in ("deep.png", "deep.tif", "wide.tif"):
        assert np.abs(read_image(tmp_path / name)[0, ..., 0] - deep / 257).max() <= 1, name
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "float.tif")
