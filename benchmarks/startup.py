"""Seconds from a command until it does something: help, a mistake named, a configuration checked, the first step.

    python benchmarks/startup.py [--repeats 3]

Every figure is a fresh process with its files in the page cache; the best of the repeats counts. ``seconds`` is wall
time, ``processor_seconds`` what the process computed until then, which others on the machine disturb less. The floors
are the interpreter alone and ``import torch``; the peer of the first denoising step is diffusers on the same folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform as host
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DIFFUSERS_STEP = """
import sys, torch
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
def after(pipe, step, t, inputs):
    print("step", step, flush=True)
    return inputs
pipe("x", height=64, width=96, num_frames=17, num_inference_steps=2, output_type="latent", callback_on_step_end=after)
"""


@dataclass(frozen=True)
class Case:
    """A command and when it counts as started.

    Attributes:
        what: the row's title.
        words: after the interpreter.
        until: a line of output that matches ends the measurement; ``None`` is the end of the process.
        code: exit code that is right.
        floor: title of the row it cannot be faster than.
    """

    what: str
    words: Sequence[str]
    until: str | None = None
    code: int = 0
    floor: str = "interpreter"


def cases(folder: Path) -> list[Case]:
    """Return every case; ``folder`` holds the tiny model and clips of ``write_inputs``."""
    generate = ["inference_sora.py", "--ckpt_dir", str(folder / "model"), "--prompt", "x", "--size", "96*64", "--dtype",
                "fp32", "--frame_num", "17", "--sample_steps", "2", "--resume", "false", "--save_path", str(folder)]
    train = ["pretrain_sora.py", "--mm-data", str(folder / "data" / "data.json"), "--mm-model",
             str(folder / "model.json"), "--from-scratch", "--save", str(folder / "run_{new}"), "--train-iters", "1",
             "--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "1e-4", "--num-workers", "0"]
    torch = "import torch"
    return [
        Case("interpreter", ["-c", "pass"]),
        Case("import torch", ["-c", torch]),
        Case("import mindspeed_wan", ["-c", "import mindspeed_wan"]),
        Case("mindspeed-wan --help", ["-m", "mindspeed_wan.cli.main", "--help"]),
        Case("mm-convert --help", ["-m", "mindspeed_wan_converters", "--help"]),
        Case("inference_sora.py --help", ["inference_sora.py", "--help"]),
        Case("pretrain_sora.py --help", ["pretrain_sora.py", "--help"]),
        Case("generation: a mistyped flag is named", ["inference_sora.py", "--frme_num", "81"], code=2),
        Case("training: a mistyped flag is named", ["pretrain_sora.py", "--trian-iters", "1"], code=2),
        Case("training: configuration checked", [*train, "--dry-run"]),
        Case("generation: first step", generate, until=r"step 1/2", floor=torch),
        Case("generation: first step, diffusers", ["-c", DIFFUSERS_STEP, str(folder / "model")], until=r"step 0",
             floor=torch),
        Case("training: first step", train, until=r"iteration 1/1", floor=torch),
    ]


def write_inputs(folder: Path) -> None:
    """Write the tiny model, clips and the training files."""
    from mindspeed_wan.demo.clips import write_clips
    from mindspeed_wan.demo.model_folder import write_model_folder
    from mindspeed_wan.demo.model_json import write_model_json

    write_model_folder(folder / "model")
    write_clips(folder / "data", num_clips=4, size=(64, 96), num_frames=17, fps=16, seed=0,
                tokenizer=folder / "model" / "tokenizer")
    write_model_json(folder / "model.json", ROOT, folder / "model", "t2v", "high")


_new = itertools.count()


def measure(case: Case) -> tuple[float, float]:
    """Run the command once; return (wall seconds, processor seconds) until its line or its end.

    Raises:
        RuntimeError: another exit code than the right one, or the line did not come.
    """
    environment = {**os.environ, "MINDSPEED_WAN_DEVICE": os.environ.get("MINDSPEED_WAN_DEVICE", "cpu"),
                   "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    words = [word.replace("{new}", str(next(_new))) for word in case.words]  # a finished run would only be resumed
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    shown, reached = [], None
    for line in process.stdout:
        shown.append(line)
        if reached is None and case.until is not None and re.search(case.until, line):
            reached = time.perf_counter() - started, _processor_seconds(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code  # it has been waited for
    if code != case.code or (case.until is not None and reached is None):
        raise RuntimeError(f"{case.what}: exit code {code}\n{''.join(shown[-20:])}")
    return reached or (time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def _processor_seconds(pid: int) -> float:
    """Return what a running process has computed (Linux; elsewhere nan)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run every case and write ``results/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "startup.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        for case in cases(folder):
            runs = [measure(case) for _ in range(arguments.repeats + 1)][1:]  # the first fills the page cache
            seconds, processor = (min(values) for values in zip(*runs, strict=True))
            floor = next((row["processor_seconds"] for row in rows if row["what"] == case.floor), processor)
            rows.append({"what": case.what, "seconds": seconds, "processor_seconds": processor, "floor": case.floor,
                         "times_the_floor": processor / floor})
            print(f"{case.what:<40} {seconds:7.2f} s  {processor:7.2f} s of processor", flush=True)
    import torch

    from mindspeed_wan.platforms import get_platform

    record = {"command": " ".join(["python", *sys.argv]),
              "machine": {"device": get_platform("cpu").device_name(), "torch": torch.__version__,
                          "python": host.python_version()}, "cases": rows}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
