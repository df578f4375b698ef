"""Stream a reward-LoRA-shaped adapter into an expert on disk: seconds, GB/s and peak anonymous memory.

    python benchmarks/lora_merge.py --layers 40 --dtype fp32      # the whole A14B: writes 57 GB
    python benchmarks/lora_merge.py --layers 4                    # same widths, a tenth of the depth

The base is a sparse file of zeros in bf16 (no disk space); the adapter has the real sizes (rank 128, every linear but
the FFNs'). Memory does not depend on the depth: one run of rows and the adapter itself are held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mindspeed_wan.lora.formats import read_lora
from mindspeed_wan.lora.merge_files import merge_files
from mindspeed_wan.lora.spec import linear_modules
from mindspeed_wan.models.wan.config import PRESETS, WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table

RANK, ALPHA = 128, 64.0


def sparse_expert(folder: Path, config: WanConfig) -> None:
    """Write an expert of zeros in bf16 whose data are a hole in the file."""
    table, offset = {}, 0
    for param in parameter_table(config):
        size = 2 * torch.Size(param.shape).numel()
        table[param.hf] = {"dtype": "BF16", "shape": list(param.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table).encode()
    folder.mkdir()
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def write_adapter(path: Path, config: WanConfig) -> int:
    """Write a kohya file with the reward LoRA's grammar and sizes; returns its bytes."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module in linear_modules(config).values():
        if ".ffn." in module.original:
            continue
        stem = "lora_unet__" + module.original.replace(".", "_")
        down = torch.randn(RANK, module.in_features, generator=generator) * 0.008388
        up = torch.randn(module.out_features, RANK, generator=generator) * 0.001245
        tensors.update({f"{stem}.lora_down.weight": down.bfloat16(), f"{stem}.lora_up.weight": up.bfloat16(),
                        f"{stem}.alpha": torch.tensor(ALPHA, dtype=torch.bfloat16)})
    save_file(tensors, path)
    return path.stat().st_size


def anonymous_mib() -> float:
    """Return the anonymous resident memory of this process in MiB (Linux; the counters of ``status`` lag behind)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1024


def measure(layers: int, dtype: str, scratch: Path) -> dict[str, object]:
    """Merge once and return the figures."""
    config = PRESETS["t2v-A14B"].with_changes(num_layers=layers)
    sparse_expert(scratch / "base", config)
    adapter_bytes = write_adapter(scratch / "lora.safetensors", config)
    peak = [0.0]
    started, cpu = time.monotonic(), time.process_time()
    lora = read_lora(scratch / "lora.safetensors", config)
    done = merge_files(scratch / "base", [(lora, 0.55)], scratch / "out", config,
                       dtype={"keep": None, "fp32": torch.float32}[dtype],
                       on_parameter=lambda *_: peak.append(anonymous_mib()))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    return {
        "layers": layers, "dtype": "bf16" if dtype == "keep" else dtype, "modules": len(done.report.losses),
        "adapter_mb": round(adapter_bytes / 1e6, 1), "written_gb": round(done.bytes_written / 1e9, 2),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "gb_per_cpu_second": round(done.bytes_written / 1e9 / cpu, 3),
        "peak_anonymous_mib": round(max(peak)),
        # with the pages of the files that the kernel keeps mapped as long as nobody needs the memory
        "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs", "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--dtype", choices=["keep", "fp32"], default="keep")
    parser.add_argument("--scratch", type=Path, help="folder with room for the result (default: the system's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora_merge.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        figures = measure(args.layers, args.dtype, Path(scratch))
    print(json.dumps(figures, indent=2))
    results = json.loads(args.out.read_text()) if args.out.is_file() else []
    kept = [r for r in results if (r["layers"], r["dtype"]) != (figures["layers"], figures["dtype"])]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*kept, figures], indent=2) + "\n")


if __name__ == "__main__":
    main()
