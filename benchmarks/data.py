"""Data: frames per second against the bare decoder, the wait for data in a training step, bytes of a cached clip.

    python benchmarks/data.py                 # 6 clips of 480x832, 81 frames of 97
    python benchmarks/data.py --size 720x1280 --clips 3

Decoding is measured in one thread each (as in a worker) on files that are in the page cache. ``bare`` counts frames
that PyAV decodes and throws away, up to the last frame that a sample needs; ``rgb`` adds the conversion that any reader
has to do. Ours are the whole way to the sample that a worker hands over. Loader rates are wall time and fall with
whatever else runs on the machine (``load_average_at_start``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from mindspeed_wan.data import manifest, video
from mindspeed_wan.data.dataset import ClipDataset, prepare
from mindspeed_wan.data.loader import Schedule, build_loader
from mindspeed_wan.data.plan import ClipSettings, size_plan
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.data.transforms import to_sample
from mindspeed_wan.demo.clips import write_mp4

RESULTS = Path(__file__).parent / "results"
FRAMES = 81


def write_clips(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """Write clips of a moving texture: unlike flat shapes it costs a decoder what camera footage costs."""
    paths, rows = [], []
    for number in range(count):
        rng = np.random.default_rng(number)
        texture = rng.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        frames = np.stack([texture[3 * i : 3 * i + height, 2 * i : 2 * i + width] for i in range(FRAMES + 16)])
        noise = rng.integers(0, 24, frames.shape, np.uint8)
        path = folder / f"{number}.mp4"
        write_mp4(path, np.clip(frames.astype(np.int16) + noise - 12, 0, 255).astype(np.uint8), fps=24, quality=18)
        paths.append(path)
        rows.append({"path": path.name, "cap": "texture", "num_frames": FRAMES + 16, "fps": 24,
                     "resolution": [height, width]})
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def bare(path: Path, frames: int, *, convert: bool) -> None:
    """Decode the first ``frames`` frames with PyAV in one thread."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in islice(container.decode(stream), frames):
            if convert:
                frame.to_ndarray(format="rgb24")


def rate(work: Callable[[Path], Any], paths: Sequence[Path], repeats: int) -> float:
    """Return frames per CPU second, the best of ``repeats`` rounds over all clips (other load only slows down)."""
    best = 0.0
    for _ in range(repeats):
        started = time.process_time()
        for path in paths:
            work(path)
        best = max(best, FRAMES * len(paths) / (time.process_time() - started))
    return best


def decoding(paths: Sequence[Path], settings: ClipSettings, height: int, width: int, repeats: int) -> dict[str, float]:
    """Return frames per CPU second of every stage."""
    plan = size_plan(settings, height, width)
    found = {
        "bare": rate(lambda path: bare(path, FRAMES, convert=False), paths, repeats),
        "rgb": rate(lambda path: bare(path, FRAMES, convert=True), paths, repeats),
    }
    readers = ["pyav", *(["decord"] if video.importlib.util.find_spec("decord") and width % 64 == 0 else [])]
    for reader in readers:
        read = partial(video.read_frames, indices=range(FRAMES), backend=reader)
        found[f"read_{reader}"] = rate(read, paths, repeats)
    found["sample"] = rate(
        lambda path: to_sample(video.read_frames(path, range(FRAMES)), plan, settings, (0.0, 0.0)), paths, repeats
    )
    return found


def loading(folder: Path, settings: ClipSettings, workers: int, batches: int) -> float:
    """Return frames per second of wall time through the loader, start-up excluded."""
    dataset = ClipDataset(prepare(manifest.load(folder / "d.jsonl"), settings), settings)
    loader = build_loader(dataset, GlobalBatchSampler(len(dataset)), Schedule(global_batch_size=1), num_workers=workers)
    next(loader)
    started = time.perf_counter()
    for _ in islice(loader, batches):
        pass
    return FRAMES * batches / (time.perf_counter() - started)


def training(folder: Path, iterations: int) -> dict[str, dict[str, float]]:
    """Return seconds per step and the share spent waiting for data, online and from a cache (tiny model)."""
    from mindspeed_wan.cli import features
    from mindspeed_wan.demo.clips import write_clips as demo_clips
    from mindspeed_wan.demo.model_folder import write_model_folder
    from mindspeed_wan.models.wan.config import WanConfig
    from mindspeed_wan.training.pretrain import main

    model, clips = write_model_folder(folder / "model"), demo_clips(folder / "clips", size=(96, 160), num_frames=17)
    config = WanConfig.from_diffusers(json.loads((model / "transformer" / "config.json").read_text()))
    values = _model_json(model, config)
    (folder / "model.json").write_text(json.dumps(values))
    parser = argparse.ArgumentParser()
    features.add_arguments(parser)
    features.run(parser.parse_args(["build", "--mm-data", str(clips.data_json), "--mm-model",
                                    str(folder / "model.json"), "--out", str(folder / "cache"), "--device", "cpu"]))
    data = json.loads(clips.data_json.read_text())
    data["dataset_param"].update(dataset_type="feature", basic_parameters={"data_path": str(folder / "cache")})
    (folder / "cached.json").write_text(json.dumps(data))
    (folder / "cached_model.json").write_text(json.dumps({**values, "load_video_features": True,
                                                          "load_text_features": True}))
    found = {}
    for name, model_file, data_file in (("online", "model.json", clips.data_json),
                                        ("cached", "cached_model.json", folder / "cached.json")):
        save = folder / name
        main(["--mm-model", str(folder / model_file), "--mm-data", str(data_file), "--load",
              str(model / "transformer"), "--save", str(save), "--device", "cpu", "--fp32", "--micro-batch-size", "1",
              "--global-batch-size", "1", "--train-iters", str(iterations), "--lr", "1e-4", "--num-workers", "1"])
        rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()][2:]
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        waited = sum(row.get("data_seconds", 0.0) for row in rows) / len(rows)
        found[name] = {"step_seconds": round(seconds, 4), "data_wait_percent": round(100 * waited / seconds, 2)}
    return found


def _model_json(model: Path, config: Any) -> dict[str, Any]:
    return {
        "task": "t2v", "diffusion": {"max_timestep_boundary": 0.417, "min_timestep_boundary": 0.0},
        "predictor": {"model_type": "wan2.2-t2v", "in_dim": 16, "hidden_size": config.dim, "ffn_dim": config.ffn_dim,
                      "freq_dim": config.freq_dim, "text_dim": config.text_dim, "num_heads": config.num_heads,
                      "num_layers": config.num_layers},
        "ae": {"from_pretrained": str(model / "vae")}, "text_encoder": {"from_pretrained": str(model / "text_encoder")},
    }


def cache_bytes(frames: int, height: int, width: int, tokens: int, *, i2v: bool) -> int:
    """Return the bytes of one cached clip of the real model: fp32 latents, bf16 states of 4,096 channels."""
    latents = 16 * (1 + (frames - 1) // 4) * (height // 8) * (width // 8) * 4
    return latents * (2 if i2v else 1) + tokens * 4096 * 2


def main() -> None:
    """Run the benchmark and write ``results/data.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    height, width = map(int, args.size.split("x"))
    settings = ClipSettings(num_frames=FRAMES, max_height=height, max_width=width, max_pixels=height * width)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_clips(folder, args.clips, height, width)
        result: dict[str, Any] = {
            "machine": f"{host.machine()}, {os.cpu_count()} CPUs", "torch": torch.__version__, "size": args.size,
            "load_average_at_start": round(os.getloadavg()[0], 1),
            "file_megabytes": round(sum(path.stat().st_size for path in paths) / len(paths) / 1e6, 2),
            "frames_per_cpu_second": {k: round(v, 1) for k, v in decoding(paths, settings, height, width,
                                                                         args.repeats).items()},
            "loader_frames_per_second": {str(workers): round(loading(folder, settings, workers, 2 * args.clips), 1)
                                         for workers in (0, 1, 2)},
            "training_tiny": training(folder, args.iterations),
            "cache_megabytes_per_clip": {
                name: round(cache_bytes(*shape, 150, i2v=i2v) / 1e6, 2)
                for name, shape, i2v in (("t2v 49x480x832", (49, 480, 832), False),
                                         ("t2v 81x480x832", (81, 480, 832), False),
                                         ("i2v 81x720x1280", (81, 720, 1280), True))
            },
        }
    stages = result["frames_per_cpu_second"]
    result["share_of_rgb_limit"] = {key: round(stages[key] / stages["rgb"], 3)
                                    for key in stages if key.startswith("read") or key == "sample"}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
