"""PipeFusion against the exact video: relative error and PSNR by patches and warm-up steps, on two stages.

    python benchmarks/pipefusion.py --out benchmarks/results/pipefusion.json              # tiny model, CPU, a minute
    python benchmarks/pipefusion.py --model ./Wan2.2-T2V-A14B-Diffusers --device cuda --steps 40 --size 480x832

The default model has random weights, whose keys and values change far more from step to step than a trained model's:
its figures check the measurement and bound the error from above, they do not say what a trained model loses. On a CPU
whose cores the stages share, patches cost time instead of saving it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_wan.platforms import get_platform

PROMPT = "a red circle moves to the left"
PATCHES = (2, 8)


def main() -> None:
    """Measure and print one JSON object."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        model = args.model or _tiny_model(Path(folder) / "model")
        mp.start_processes(_rank, (args.stages, str(model), vars(args), str(result)), nprocs=args.stages,
                           start_method="spawn")
        rows = json.loads(result.read_text(encoding="utf-8"))
    found = {
        "benchmark": "pipefusion", "command": shlex.join(["python", *sys.argv]),
        "machine": get_platform(args.device).device_name(), "model": args.model or "tiny, random weights",
        "stages": args.stages, "steps": args.steps, "size": args.size, "frames": args.frames,
        "torch": torch.__version__, "rows": rows,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of weights; default: a tiny model made for the purpose")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="80x96", help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--out", help="write the JSON here as well")
    return parser.parse_args()


def _tiny_model(folder: Path) -> Path:
    from mindspeed_wan.demo.model_folder import write_model_folder

    return write_model_folder(folder, num_layers=4)


def _rank(rank: int, stages: int, model: str, args: dict[str, Any], result: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(stages), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=os.environ.get("MASTER_PORT", "29517"))
    from mindspeed_wan.inference.pipeline import WanGenerator
    from mindspeed_wan.parallel.groups import destroy
    from mindspeed_wan.parallel.inference_layout import InferenceLayout
    from mindspeed_wan.parallel.pipefusion_options import PipeFusionOptions

    torch.set_num_threads(1)
    height, width = (int(side) for side in args["size"].split("x"))
    generator = WanGenerator.from_pretrained(
        model, dtype=args["dtype"], device=args["device"], steps=args["steps"], size=(height, width),
        num_frames=args["frames"], layout=InferenceLayout(world_size=stages, pipeline=stages),
    )
    exact = generator(PROMPT, seed=0)
    rows = []
    for warmup in (1, max(2, args["steps"] // 4)):
        for patches in PATCHES:
            video = generator(PROMPT, seed=0, pipefusion=PipeFusionOptions(on=True, patches=patches, warmup=warmup))
            row = {"warmup": warmup, "patches": patches, "latent_error": _relative(video.latents, exact.latents),
                   "seconds": sum(map(sum, video.steps.values())), "exact_seconds": sum(map(sum, exact.steps.values()))}
            if video.video is not None and exact.video is not None:
                row["psnr_db"] = _psnr(video.video, exact.video)
            rows.append({key: float(f"{value:.4g}") for key, value in row.items()})
    if rank == 0:
        Path(result).write_text(json.dumps(rows), encoding="utf-8")
    destroy()


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def _psnr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Peak is 2: values are in [-1, 1]."""
    error = (found - exact).square().mean()
    return float(10 * torch.log10(4 / error.clamp(min=1e-12)))


if __name__ == "__main__":
    main()
