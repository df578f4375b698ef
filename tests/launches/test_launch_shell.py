"""The launch scripts: variables become flags, later flags win, mistakes are named before anything starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_wan.cli.variables import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "wan2.2"
HIGH, LOW = (EXAMPLES / "A14B" / "t2v" / f"pretrain_{expert}.sh" for expert in ("high", "low"))

PRINT_ARGUMENTS = """
import json, os, sys
if os.environ["RANK"] == "0":
    keys = ("WORLD_SIZE", "MINDSPEED_WAN_DEVICE", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS",
            "CUDA_VISIBLE_DEVICES", "HCCL_CONNECT_TIMEOUT")
    print(json.dumps({"argv": sys.argv[1:], "env": {key: os.environ.get(key) for key in keys}}))
"""
SETTABLE = (  # names the machine running the tests might have set
    *("DEVICE", "NPROC_PER_NODE", "NPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TP", "PP", "VP", "CP", "SP", "MBS", "GRAD_ACC_STEP", "GBS", "MM_DATA", "MM_MODEL", "MM_TOOL", "FSDP_CONFIG"),
    *("LOAD_PATH", "SAVE_PATH", "PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"),
)

OF_OTHERS = {"CONDA_PREFIX", "VIRTUAL_ENV", "MINDSPEED_WAN_DEVICE"}
"""Variables that the scripts read and other programs set."""


@pytest.fixture
def place(tmp_path):
    """A working directory with spaces, a checkpoint folder, and a script that prints what it gets."""
    folder = tmp_path / "a run"
    (folder / "weights here").mkdir(parents=True)
    (folder / "rank.py").write_text(PRINT_ARGUMENTS)
    return folder


def environment(place, **variables):
    clean = {key: value for key, value in os.environ.items() if key not in SETTABLE}
    defaults = {
        "PYTHON": sys.executable,
        "LAUNCH_SCRIPT": str(place / "rank.py"),
        "DEVICE": "cpu",
        "LOAD_PATH": str(place / "weights here"),
        "SAVE_PATH": str(place / "saved here"),
    }
    return {**clean, **defaults, **variables}


def launch(place, *flags, script=HIGH, **variables):
    return subprocess.run(
        ["bash", str(script), *map(str, flags)],
        env=environment(place, **variables),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def arguments(place, *flags, script=HIGH, **variables):
    """Return (value of each flag as the ranks see it, environment of rank 0)."""
    result = launch(place, *flags, script=script, **variables)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    values: dict[str, str | bool] = {}
    words = seen["argv"]
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            values[word] = True if following.startswith("--") else following
    return values, seen["env"]


def test_the_defaults_are_those_of_a14b(place):
    values, env = arguments(place, DEVICE="cpu", PRECISION="bf16")
    expected = {
        "--tensor-model-parallel-size": "1",
        "--pipeline-model-parallel-size": "1",
        "--context-parallel-size": "1",
        "--context-parallel-algo": "ulysses_cp_algo",
        "--micro-batch-size": "1",
        "--global-batch-size": "1",
        "--lr": "1e-5",
        "--min-lr": "1e-5",
        "--lr-decay-style": "constant",
        "--adam-beta1": "0.9",
        "--adam-beta2": "0.999",
        "--adam-eps": "1e-8",
        "--weight-decay": "1e-2",
        "--clip-grad": "1.0",
        "--bf16": True,
        "--train-iters": "5000",
        "--save-interval": "500",
        "--ckpt-format": "torch_dcp",
        "--use-torch-fsdp2": True,
        "--mm-model": str(HIGH.parent / "pretrain_model_high.json"),
        "--mm-data": str(HIGH.parent / "data.json"),
        "--load": str(place / "weights here"),
        "--save": str(place / "saved here"),
    }
    assert {name: values.get(name) for name in expected} == expected
    assert Path(values["--fsdp2-config-path"]).resolve() == EXAMPLES / "A14B" / "fsdp2_config.yaml"
    assert env["MINDSPEED_WAN_DEVICE"] == "cpu" and env["CUDA_VISIBLE_DEVICES"] == ""
    assert "--sequence-parallel" not in values and "--from-scratch" not in values


def test_the_experts_differ_in_their_files_only(place):
    high, _ = arguments(place)
    low, _ = arguments(place, script=LOW)
    assert {name for name in high if high[name] != low[name]} == {"--mm-model"}
    lines = [script.read_text().splitlines() for script in (HIGH, LOW)]
    assert all(len(text) <= 15 for text in lines)


@pytest.mark.parametrize(
    ("variables", "flag", "value"),
    [
        ({"TP": "2"}, "--tensor-model-parallel-size", "2"),
        ({"PP": "2"}, "--pipeline-model-parallel-size", "2"),
        ({"VP": "2"}, "--virtual-pipeline-model-parallel-size", "2"),
        ({"CP": "2"}, "--context-parallel-size", "2"),
        ({"SP": "1"}, "--sequence-parallel", True),
        ({"CP_ALGO": "hybrid_cp_algo"}, "--context-parallel-algo", "hybrid_cp_algo"),
        ({"ULYSSES_DEGREE": "2"}, "--ulysses-degree-in-cp", "2"),
        ({"MBS": "3"}, "--micro-batch-size", "3"),
        ({"GBS": "24"}, "--global-batch-size", "24"),
        ({"LR": "2e-4"}, "--lr", "2e-4"),
        ({"LR": "2e-4"}, "--min-lr", "2e-4"),
        ({"MIN_LR": "1e-6"}, "--min-lr", "1e-6"),
        ({"TRAIN_ITERS": "7"}, "--train-iters", "7"),
        ({"SAVE_INTERVAL": "3"}, "--save-interval", "3"),
        ({"KEEP_LAST": "5"}, "--keep-last", "5"),
        ({"WEIGHT_DECAY": "0"}, "--weight-decay", "0"),
        ({"CLIP_GRAD": "0.5"}, "--clip-grad", "0.5"),
        ({"NUM_WORKERS": "0"}, "--num-workers", "0"),
        ({"SEED": "5"}, "--seed", "5"),
        ({"PRECISION": "fp32"}, "--fp32", True),
        ({"MM_TOOL": "tools.json"}, "--mm-tool", "tools.json"),
        ({"MM_DATA": "my data.json"}, "--mm-data", "my data.json"),
        ({"MM_MODEL": "my model.json"}, "--mm-model", "my model.json"),
        ({"FSDP_CONFIG": "my fsdp.yaml"}, "--fsdp2-config-path", "my fsdp.yaml"),
        ({"TIMEOUT_MINUTES": "5"}, "--distributed-timeout-minutes", "5"),
    ],
)
def test_every_variable_reaches_its_flag(place, variables, flag, value):
    assert arguments(place, **variables)[0][flag] == value


def test_parts_can_be_left_out(place):
    values, _ = arguments(place, "--from-scratch", FSDP_CONFIG="", SAVE_PATH="", KEEP_LAST="0")
    assert not {"--use-torch-fsdp2", "--save", "--load", "--keep-last"} & set(values)


@pytest.mark.parametrize(
    ("variables", "batch"),
    [
        ({"NPROC_PER_NODE": "4", "TP": "2", "GRAD_ACC_STEP": "3"}, "6"),
        ({"NPUS_PER_NODE": "4", "MBS": "2"}, "8"),
        ({"NPROC_PER_NODE": "2", "CP": "2"}, "1"),
    ],
)
def test_the_global_batch_follows_from_the_layout(place, variables, batch):
    assert arguments(place, **variables)[0]["--global-batch-size"] == batch


def test_leading_zeros_do_not_make_a_number_octal(place):
    values, environment = arguments(place, NPROC_PER_NODE="02", TP="01", MBS="08", GRAD_ACC_STEP="09")
    assert (environment["WORLD_SIZE"], values["--global-batch-size"]) == ("2", "144")


def test_a_misspelt_variable_is_noted(place):
    result = launch(place, GRAD_ACC_STEPS="4", GPUS_PER_NODE="8", TPS="2", SLURM_JOB_NUM_NODES="1")
    assert result.returncode == 0
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes == ["note: GPUS_PER_NODE is set, but nothing reads it; did you mean NPUS_PER_NODE?",
                     "note: GRAD_ACC_STEPS is set, but nothing reads it; did you mean GRAD_ACC_STEP?"]


def test_the_known_variables_are_those_the_scripts_read():
    scripts = [path for path in (ROOT / "examples").rglob("*.sh") if path.name not in ("cluster.sh", "entry.sh")
               and not path.name.startswith("env_")]
    text = "\n".join(path.read_text() for path in scripts)
    assert [name for name in VARIABLES if not re.search(rf"\b{name}\b", text)] == []
    with_default = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?-", text))
    assert with_default - set(VARIABLES) == OF_OTHERS


def test_a_layout_that_does_not_divide_the_ranks_is_left_to_the_program(place):
    assert "--global-batch-size" not in arguments(place, NPROC_PER_NODE="4", TP="3")[0]


def test_appended_flags_come_last(place):
    result = launch(place, "--lr", "3e-3", "--extra", "a b")
    words = json.loads(result.stdout)["argv"]
    assert words[-4:] == ["--lr", "3e-3", "--extra", "a b"] and words.index("--lr") < len(words) - 4


def test_ranks_share_the_cores(place):
    cores = len(os.sched_getaffinity(0))
    assert arguments(place)[1]["OMP_NUM_THREADS"] == str(cores)
    assert arguments(place, NPROC_PER_NODE=str(cores * 2))[1]["OMP_NUM_THREADS"] == "1"
    assert arguments(place, OMP_NUM_THREADS="3")[1]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("device", ["npu", "cuda"])
def test_accelerators_get_eight_ranks_and_their_environment(place, device):
    values, env = arguments(place, DEVICE=device, CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert env["WORLD_SIZE"] == "8" and values["--global-batch-size"] == "8" and values["--bf16"] is True
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == "2"
    assert (env["HCCL_CONNECT_TIMEOUT"] == "1200") == (device == "npu")


@pytest.mark.parametrize("flags", [("--device", "cpu"), ("--device=cpu",)])
def test_the_device_flag_wins_over_the_variable(place, flags):
    _, env = arguments(place, *flags, DEVICE="npu")
    assert env["MINDSPEED_WAN_DEVICE"] == "cpu" and env["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("variable", ["LOAD_PATH", "SAVE_PATH", "MM_DATA", "MM_MODEL", "FSDP_CONFIG"])
@pytest.mark.parametrize(
    "value", ["path to save your wandit ckpt", "/your/path", "your_ckpt_path", "<folder>", "[env_name]"]
)
def test_a_placeholder_is_named_with_its_variable(place, variable, value):
    result = launch(place, **{variable: value})
    assert result.returncode == 2
    assert re.search(rf"error: {variable} is still a placeholder: '{re.escape(value)}'", result.stderr)
    assert f"set {variable} to" in result.stderr and not (place / "path").exists()


def test_a_folder_that_exists_may_be_called_anything(place):
    (place / "your_weights").mkdir()
    assert arguments(place, LOAD_PATH="your_weights")[0]["--load"] == "your_weights"


def test_missing_weights_are_named_before_anything_starts(place):
    result = launch(place, LOAD_PATH="nothing here")
    assert result.returncode == 4 and "LOAD_PATH" in result.stderr and "mm-convert" in result.stderr
    assert launch(place, "--from-scratch", LOAD_PATH="nothing here").returncode == 0
    assert launch(place, "--load", "elsewhere", LOAD_PATH="nothing here").returncode == 0


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TP": "two"}, "TP is 'two'"),
        ({"TP": "0"}, "TP is '0'"),
        ({"CP": "-1"}, "CP is '-1'"),
        ({"MBS": "1.5"}, "MBS is '1.5'"),
        ({"GBS": "many"}, "GBS is 'many'"),
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE is 'all'"),
        ({"NNODES": "0"}, "NNODES is '0'"),
        ({"NODE_RANK": "first"}, "NODE_RANK is 'first'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"DEVICE": "tpu"}, "DEVICE is 'tpu'"),
        ({"PRECISION": "fp16"}, "PRECISION is 'fp16'"),
        ({"NODE_RANK": "1"}, "node 1 of 1 nodes"),
    ],
)
def test_a_wrong_value_is_one_clear_error(place, variables, words):
    result = launch(place, **variables)
    assert result.returncode == 2 and words in result.stderr
    assert "Traceback" not in result.stderr and "line " not in result.stderr


def test_the_script_is_only_started_as_pretrain_or_inference(place):
    result = launch(place, script=EXAMPLES / "common" / "launch.sh")
    assert result.returncode == 2 and "instead of pretrain or inference" in result.stderr


def test_inference_gets_its_own_flags_only(place):
    result = launch(place, "inference", "--prompt", "a fox", script=EXAMPLES / "common" / "launch.sh", SAVE_PATH="")
    assert json.loads(result.stdout)["argv"] == ["--prompt", "a fox"]


@pytest.mark.parametrize("code", [2, 4, 75])
def test_the_exit_code_of_a_rank_is_the_scripts(place, code):
    (place / "rank.py").write_text(f"import os, sys; sys.exit({code} if os.environ['RANK'] == '1' else 0)")
    assert launch(place, NPROC_PER_NODE="2").returncode == code


def test_the_log_lies_under_the_save_path_and_a_dry_run_writes_none(place):
    arguments(place, NPROC_PER_NODE="2")
    (log,) = (place / "saved here" / "logs").glob("pretrain_*_node0.log")
    assert "--tensor-model-parallel-size" in log.read_text()
    arguments(place, "--dry-run", SAVE_PATH="elsewhere")
    assert not (place / "elsewhere").exists()


def test_a_signal_to_the_script_reaches_the_ranks(place):
    (place / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open('ready' + os.environ['RANK'], 'w').close()\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(["bash", str(HIGH)], env=environment(place, NPROC_PER_NODE="2"), cwd=place)
    deadline = time.monotonic() + 20
    while not all((place / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_typo_in_a_flag_is_found_before_any_rank_starts(place):
    marker = place / "started"
    fake = place / "pretrain_sora.py"
    fake.write_text(f"open({str(marker)!r}, 'w').close()")
    result = launch(place, "--trian-iters", "3", LAUNCH_SCRIPT=str(fake), NPROC_PER_NODE="2")
    assert result.returncode == 2 and result.stderr.count("did you mean '--train-iters'?") == 1
    assert not marker.exists() and "Traceback" not in result.stderr


def test_the_shell_files_are_valid_bash():
    for path in (*EXAMPLES.glob("common/*.sh"), *EXAMPLES.glob("A14B/*/*.sh")):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert b"\r" not in path.read_bytes()
