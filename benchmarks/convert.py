"""Converters at the size of the real model: speed against the disk's own copy rate, memory, start-up.

    python benchmarks/convert.py                      # one A14B expert, 28.6 GB bf16: needs 60 GB of disk
    python benchmarks/convert.py --layers 8           # scaled down

Writes random weights in the Diffusers layout, converts hf_to_dcp, dcp_to_hf and hf_to_mm through the command line,
each as a process of its own, and samples its anonymous memory (RssAnon of all its processes). Before and after each
one it copies a shard with ``cp`` and flushes it: the disk's rate under the same load. Every result is compared with
its source. Beside it the ordinary way, loading everything and saving it with torch, at a scaled-down size. All data
is removed again; at most one source and one result exist at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

SHARD = 5 * 10**9
_RESULTS = Path(__file__).parent / "results"
_NAIVE = """
import sys, torch, torch.distributed.checkpoint as dcp
from pathlib import Path
from safetensors.torch import load_file
state = {}
for file in Path(sys.argv[1]).glob("*.safetensors"):
    state.update(load_file(file))
state = {name: tensor.clone() for name, tensor in state.items()}
dcp.save({"model": state}, checkpoint_id=sys.argv[2])
"""


def write_source(folder: Path, config: WanConfig) -> int:
    """Write random bf16 weights as sharded safetensors with Diffusers' names; return their bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_diffusers()))
    pool, total, weight_map = os.urandom(64 << 20), 0, {}
    shards: list[list[Any]] = [[]]
    room = SHARD
    for param in parameter_table(config):
        size = 2
        for extent in param.shape:
            size *= extent
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD
        shards[-1].append((param, size))
        room -= size
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        table, at = {}, 0
        for param, size in shard:
            table[param.hf] = {"dtype": "BF16", "shape": param.shape, "data_offsets": [at, at + size]}
            weight_map[param.hf] = name
            at += size
        header = json.dumps(table).encode()
        with open(folder / name, "wb", buffering=0) as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            left, start = at, (7919 * number) % (1 << 20)
            while left:
                left -= stream.write(pool[start:start + min(left, len(pool) - start)])
                start = (start + 104729) % (1 << 20)
            os.fsync(stream.fileno())
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Drop the folder's pages from the page cache, so that every run reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy_rate(source: Path, work: Path) -> float:
    """Return bytes/s of ``cp`` plus fsync of the largest file below ``source``, read from a cold cache."""
    largest = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    forget(source)
    target, limit = work / "copy", 25 * 10**8
    start = time.perf_counter()
    subprocess.run(["dd", f"if={largest}", f"of={target}", "bs=8M", f"count={limit // (8 << 20)}", "conv=fsync",
                    "status=none"], check=True)
    seconds = time.perf_counter() - start
    size = target.stat().st_size
    target.unlink()
    return size / seconds


def rss_anon(pid: int) -> int:
    """Return the anonymous resident memory in bytes of a process and its children."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return total
    return total + sum(rss_anon(int(child)) for child in children)


def timed(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return wall seconds, CPU seconds and peak RssAnon in bytes."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], rss_anon(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    after = os.times()
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, peak[0]


def measure(verb: str, source: Path, target: Path, size: int, work: Path) -> dict[str, Any]:
    """Convert once between two measurements of the disk, then compare the result with the source."""
    command = [sys.executable, "-m", "mindspeed_wan_converters"]
    rates = [copy_rate(source, work)]
    forget(source)
    seconds, cpu, peak = timed([*command, verb, str(source), str(target), "--quiet"])
    rates.append(copy_rate(source, work))
    equal = timed([*command, "verify", str(source), str(target), "--quiet"])[0]
    rate = size / seconds
    disk = len(rates) / sum(1 / r for r in rates)  # bytes of both copies over their seconds
    result = {"verb": verb, "seconds": round(seconds, 1), "GB_per_s": round(rate / 1e9, 3),
              "copy_GB_per_s": [round(r / 1e9, 3) for r in rates], "share_of_copy_rate": round(rate / disk, 3),
              "cpu_seconds": round(cpu, 1), "load_average": round(os.getloadavg()[1], 1),
              "peak_rss_anon_MiB": round(peak / 2**20),
              "bit_equal": True, "compare_seconds": round(equal, 1)}
    print(json.dumps(result), flush=True)
    return result


def measure_naive(work: Path, config: WanConfig) -> dict[str, Any]:
    """Load everything and save it with torch, at a scaled-down size."""
    source, target = work / "small", work / "naive"
    size = write_source(source, config)
    forget(source)
    seconds, _, peak = timed([sys.executable, "-W", "ignore", "-c", _NAIVE, str(source), str(target)])
    shutil.rmtree(target)
    forget(source)
    command = [sys.executable, "-m", "mindspeed_wan_converters", "hf_to_dcp", str(source), str(target), "--quiet"]
    ours, _, our_peak = timed(command)
    shutil.rmtree(source)
    shutil.rmtree(target)
    result = {"bytes": size, "naive_seconds": round(seconds, 1), "naive_peak_rss_anon_MiB": round(peak / 2**20),
              "mm_convert_seconds": round(ours, 1), "mm_convert_peak_rss_anon_MiB": round(our_peak / 2**20)}
    print(json.dumps(result), flush=True)
    return result


def startup_seconds() -> dict[str, float]:
    """Return the median wall and CPU time of ``mm-convert --help``, and make sure that it did not import torch."""
    command = [sys.executable, "-X", "importtime", "-m", "mindspeed_wan_converters", "--help"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    if any(line.split("|")[-1].strip() in ("torch", "numpy") for line in report.splitlines()):
        raise SystemExit("mm-convert --help imported torch or numpy")
    del command[1:3]
    runs = [timed(command)[:2] for _ in range(9)]
    return {"wall": round(sorted(wall for wall, _ in runs)[4], 3), "cpu": round(sorted(cpu for _, cpu in runs)[4], 3)}


def main() -> None:
    """Run everything and write ``results/convert_<name>.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40, help="blocks of the model (40 is the real size)")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--name", default=None, help="name of the result file")
    args = parser.parse_args()
    config = PRESETS["t2v-A14B"].with_changes(num_layers=args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-bench-") as name:
        work = Path(name)
        parameters = sum(_numel(p.shape) for p in parameter_table(config))
        need, free = 2 * 2 * parameters + 4 * 10**9, shutil.disk_usage(work).free
        if need > free:
            raise SystemExit(f"needs {need / 1e9:.0f} GB of disk, {work} has {free / 1e9:.0f} GB; use fewer --layers")
        result: dict[str, Any] = {
            "benchmark": "convert", "command": shlex.join(["python", *sys.argv]),
            "layers": args.layers, "parameters": parameters, "dtype": "bf16",
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform(),
                        "load_at_start": os.getloadavg()[0]},
            "startup_seconds": startup_seconds(),
            "naive": measure_naive(work, config.with_changes(num_layers=min(4, args.layers)))}
        hf, out = work / "hf", work / "dcp"
        size = write_source(hf, config)
        result["bytes"], result["verbs"] = size, []
        result["verbs"].append(measure("hf_to_mm", hf, work / "mm", size, work))
        shutil.rmtree(work / "mm")
        result["verbs"].append(measure("hf_to_dcp", hf, out, size, work))
        shutil.rmtree(hf)
        result["verbs"].append(measure("dcp_to_hf", out, hf, size, work))
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"convert_{args.name or f'{args.layers}_layers'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


if __name__ == "__main__":
    main()
