"""The command without its sub-commands: help, version, unknown names, cost of the start."""

import importlib.util
import resource
import subprocess
import sys

import pytest

from mindspeed_wan import __version__
from mindspeed_wan.cli import main
from mindspeed_wan.errors import ConfigError, ResourceError
from tests.faults.saves import file_size_limit
from tests.helpers.world import REPOSITORY

SPEC = str(REPOSITORY / "examples" / "wan2.2" / "cluster" / "cluster.yaml")
MODEL = "Wan-AI/Wan2.2-T2V-A14B"
DIFFSYNTH = ["accelerate", "launch", "train.py", "--dataset_base_path", "data", "--dataset_metadata_path", "m.csv",
             "--height", "480", "--width", "832", "--num_frames", "49", "--max_timestep_boundary", "0.417",
             "--trainable_models", "dit", "--output_path", "out", "--model_id_with_origin_paths",
             f"{MODEL}:high_noise_model/diffusion_pytorch_model*.safetensors,{MODEL}:Wan2.1_VAE.pth"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mindspeed_wan.cli.main", *arguments], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_names_only_commands_that_exist():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "usage: mindspeed-wan" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    for name, (module, _) in main.COMMANDS.items():
        assert (f"\n  {name} " in result.stdout) == (importlib.util.find_spec(module) is not None)


def test_help_imports_no_torch_and_no_command():
    code = (
        "import sys; from mindspeed_wan.cli import main; main.dispatch(['--help']);"
        "sys.exit('torch' in sys.modules or 'mindspeed_wan.cli.doctor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version():
    assert command("--version").stdout.split() == ["mindspeed-wan", __version__]


def test_without_a_command_the_overview_goes_to_stderr_with_exit_code_2():
    result = command()
    assert result.returncode == 2 and "usage" in result.stderr and not result.stdout


def test_an_unknown_command_gets_the_nearest_name_and_no_traceback():
    result = command("docter")
    assert result.returncode == 2
    assert "did you mean 'doctor'" in result.stderr and "Traceback" not in result.stderr


def test_a_command_without_its_module_is_not_offered(monkeypatch):
    monkeypatch.setitem(main.COMMANDS, "ghost", ("mindspeed_wan.cli.ghost", "does not exist"))
    assert "ghost" not in main.available_commands()
    with pytest.raises(ConfigError, match="'ghost' is not a command"):
        main.dispatch(["ghost"])


@pytest.mark.parametrize(("words", "message"), [
    (["plan", "--deviecs", "8"], "did you mean '--devices'?"),
    (["features", "build", "--mm-dta", "x"], "mindspeed-wan features"),
    (["features", "biuld"], "'biuld' is not an action\n  fix: did you mean 'build'? actions: build, info, check"),
    (["lora"], "no action is given\n  fix: actions: inspect, convert, merge,"),
    (["eval", "out/videos"], "actions: loss; without one, videos are measured: --model NAME=FOLDER"),
    (["lora", "convert", "x", "y", "--to", "pef"], "fix: did you mean 'peft'?"),
    (["lora", "inspect", "x", "--modle", "y"], "did you mean '--model'?"),
    (["plan", "--devices", "x"], "mindspeed-wan plan --help lists what it takes"),
])
def test_a_wrong_option_is_one_error_with_the_nearest_name(words, message):
    with pytest.raises(ConfigError) as caught:
        main.dispatch(words)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(("words", "count"), [
    (["schema", "OUT"], 6), (["cluster", "render", "--target", "all", "--out", "OUT", "--spec", SPEC], 5),
    (["import", "diffsynth", "--out", "OUT", "--", *DIFFSYNTH], 4),
])
def test_a_full_disk_leaves_the_old_files_whole(words, count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main.dispatch(words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "OUT").iterdir()}
    with file_size_limit(100), pytest.raises(ResourceError, match="OUT/.*cannot write: File too large"):
        main.dispatch(words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "OUT").iterdir()} == before and len(before) == count


def test_every_offered_command_describes_its_options(capsys):
    for name in main.available_commands():
        with pytest.raises(SystemExit) as stop:
            main.dispatch([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: mindspeed-wan {name}" in capsys.readouterr().out
