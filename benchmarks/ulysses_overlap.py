"""Ulysses attention with and without overlap: forward and backward on the ranks this machine can start.

    python benchmarks/ulysses_overlap.py                # two gloo ranks on a CPU
    torchrun --nproc-per-node 8 benchmarks/ulysses_overlap.py --tokens 75600 --heads 40 --channels 128 --dtype bf16

On a CPU nothing can overlap (the cores that would compute also copy), so what is seen there is the price of more and
smaller calls. On accelerators the first line under ``rows`` is the exchange as one piece.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_wan.parallel.attention import make_attention
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.groups import build_groups, destroy, init_distributed
from mindspeed_wan.platforms import get_platform

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> int:
    """Measure and write ``benchmarks/results/ulysses_overlap_<device>.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the whole clip")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--chunks", type=int, action="append", help="repeatable; default 1, 2 and 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="result file")
    options = parser.parse_args()
    options.chunks = options.chunks or [1, 2, 4]
    if "RANK" in os.environ:
        init_distributed(get_platform().activate())
        rows = measure(dist.get_rank(), dist.get_world_size(), options)
        if dist.get_rank():
            return 0
        ranks = dist.get_world_size()
    else:
        from tests.helpers.spawn import run_ranks

        os.environ["MINDSPEED_WAN_DEVICE"] = "cpu"  # two ranks on one GPU would measure nothing
        ranks = 2
        rows = run_ranks(measure, ranks, options)[0]
    platform = get_platform()
    result = {"benchmark": "ulysses_overlap", "command": shlex.join(["python", *sys.argv]),
              "device": platform.device_name(), "ranks": ranks, "torch": torch.__version__,
              "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "rows": rows}
    path = Path(options.out or RESULTS / f"ulysses_overlap_{platform.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


def measure(rank: int, world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per number of chunks; the ways are tried in turn, so that other load hits all of them."""
    platform = get_platform()
    groups = build_groups(ParallelDims(world_size=world_size, context=world_size), platform)
    shape = (options.tokens // world_size, 1, options.heads, options.channels)
    q, k, v = (torch.randn(shape, device=platform.device(), dtype=DTYPES[options.dtype]).requires_grad_()
               for _ in range(3))
    ways = {count: make_attention(groups, count) for count in options.chunks}
    seconds: dict[int, list[float]] = {count: [] for count in ways}
    for turn in range(options.repeats + 1):
        for count, attend in ways.items():
            dist.barrier(group=groups.cp)
            start = time.perf_counter()
            attend(q, k, v, length=options.tokens).sum().backward()
            platform.synchronize()
            if turn:  # the first one warms up
                seconds[count].append(time.perf_counter() - start)
    first = statistics.median(seconds[options.chunks[0]])
    rows = [{"chunks": count, "tokens": options.tokens, "heads": options.heads, "channels": options.channels,
             "dtype": options.dtype, "seconds": statistics.median(times), "ratio": first / statistics.median(times)}
            for count, times in seconds.items()]
    destroy()
    return rows


if __name__ == "__main__":
    sys.exit(main())
