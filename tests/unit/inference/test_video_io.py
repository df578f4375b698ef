"""Files of a generation: they open, say what was written, and never exist half."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference import video_io


@pytest.fixture
def frames() -> np.ndarray:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    return np.stack([np.stack([np.roll(ramp, 4 * i, 1)] * 3, -1) for i in range(9)]).astype(np.uint8)


def test_mp4_is_h264_yuv420p_with_the_index_first(tmp_path, frames):
    path = tmp_path / "new folder" / "video.mp4"
    video_io.write_mp4(path, frames, fps=16)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_odd_sizes_are_named(tmp_path, frames):
    with pytest.raises(ConfigError, match="63x48"):
        video_io.write_mp4(tmp_path / "v.mp4", frames[:, :, :63], fps=16)


def test_to_frames_rounds_to_nearest_and_clamps():
    video = torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5, 1.0, 3.0]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert video_io.to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    video_io.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), video_io.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert video_io.read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_frames_latents_sheet_and_gallery(tmp_path, frames):
    for _ in range(2):  # the second call replaces the first
        video_io.write_frames(tmp_path / "frames", frames)
    assert len(list((tmp_path / "frames").glob("*.png"))) == len(frames)
    assert (np.asarray(Image.open(tmp_path / "frames" / "00003.png")) == frames[3]).all()

    latents = torch.randn(16, 3, 6, 8)
    video_io.write_latents(tmp_path / "l.safetensors", latents, {"seed": 3})
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("latents"), latents)
        assert json.loads(file.metadata()["settings"]) == {"seed": 3}

    video_io.write_contact_sheet(tmp_path / "sheet.png", frames, count=6, width=32)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 32, 2 * 24)

    record = {"video": tmp_path / "out" / "a.mp4", "prompt": "<b>cat</b>", "seed": 1, "width": 64, "height": 48}
    video_io.write_gallery(tmp_path / "index.html", [{**record, "num_frames": 9}])
    page = (tmp_path / "index.html").read_text()
    assert 'src="out/a.mp4"' in page and "&lt;b&gt;cat" in page
