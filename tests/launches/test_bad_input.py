"""What users get wrong: one clear error each, with the exit code of the design, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_wan.errors import WanError
from mindspeed_wan.platforms import reset_platform
from mindspeed_wan.training.pretrain import main
from tests.helpers.world import REPOSITORY, World, make_world, write_json

Change = Callable[[World, list[str]], list[str]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    reset_platform()
    return make_world(tmp_path / "world", num_frames=5, size=(32, 48))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    write_json(path, values)


def set_flag(argv: list[str], flag: str, value: str) -> list[str]:
    return [*argv, flag, value]


def own_data(world: World) -> Path:
    """Give the world a private copy of its clips and return the folder."""
    folder = world.files / "clips"
    shutil.copytree(world.data, folder)
    for name in ("data.txt", "data.json"):
        text = (folder / name).read_text(encoding="utf-8").replace(str(world.data), str(folder))
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(folder / "data.json", world.files / "data.json")
    return folder


def i2v_model(world: World, argv: list[str]) -> list[str]:
    def change(values: dict[str, Any]) -> None:
        values["task"] = "i2v"
        values["predictor"].update(in_dim=36, model_type="wan2.2-i2v")
        values["diffusion"]["max_timestep_boundary"] = 0.358

    edit(world.files / "model_high.json", change)
    return argv


def misspelt_key(world: World, argv: list[str]) -> list[str]:
    edit(world.files / "model_high.json", lambda v: v["predictor"].update(num_head=4))
    return argv


def empty_clip(world: World, argv: list[str]) -> list[str]:
    next(iter(sorted((own_data(world) / "videos").glob("*.mp4")))).write_bytes(b"")
    return argv


def missing_clip(world: World, argv: list[str]) -> list[str]:
    next(iter(sorted((own_data(world) / "videos").glob("*.mp4")))).unlink()
    return argv


def empty_caption(world: World, argv: list[str]) -> list[str]:
    file = own_data(world) / "data.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[1]["cap"] = "  "
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return argv


def damaged_save(world: World, argv: list[str]) -> list[str]:
    save = world.files / "save"
    (save / "iter_0000004").mkdir(parents=True)
    (save / "latest_checkpointed_iteration.txt").write_text("garbage", encoding="utf-8")
    return set_flag(argv, "--save", str(save))


def emptied_save(world: World, argv: list[str]) -> list[str]:
    """``--load`` names weights, but starting from them would bury what the folder held."""
    save = world.files / "save"
    (save / "iter_0000004").mkdir(parents=True)
    (save / "latest_checkpointed_iteration.txt").write_text("4", encoding="utf-8")
    return set_flag(argv, "--save", str(save))


def save_is_a_file(world: World, argv: list[str]) -> list[str]:
    (world.files / "file").write_text("x", encoding="utf-8")
    return set_flag(argv, "--save", str(world.files / "file" / "run"))


CASES: dict[str, tuple[int, str, Change]] = {
    "t2v weights, i2v model file": (4, "T2V weights", i2v_model),
    "pipeline root": (4, "root of a pipeline", lambda w, a: set_flag(a, "--load", str(w.model))),
    "swapped experts": (4, "low-noise expert", lambda w, a: set_flag(a, "--load", str(w.model / "transformer_2"))),
    "no weights there": (4, "", lambda w, a: set_flag(a, "--load", str(w.files / "nothing"))),
    "vae folder as weights": (4, "", lambda w, a: set_flag(a, "--load", str(w.model / "vae"))),
    "heads not divisible": (2, "heads", lambda w, a: [*a, "--world-size", "3", "--context-parallel-size", "3",
                                                      "--dry-run"]),
    "world does not factor": (2, "cannot be split", lambda w, a: [
        *a, "--world-size", "3", "--tensor-model-parallel-size", "2", "--dry-run"]),
    "typo in a flag": (2, "--train-iters", lambda w, a: [*a, "--train-itres", "3"]),
    "typo in a key": (2, "num_heads", misspelt_key),
    "absent device": (3, "not usable", lambda w, a: set_flag(a, "--device", "npu")),
    "more stages than blocks": (2, "blocks cannot be split into 64 pipeline stages", lambda w, a: [
        *a, "--pipeline-model-parallel-size", "64", "--world-size", "64", "--dry-run"]),
    "missing mp4": (7, "does not exist", missing_clip),
    "0-byte mp4": (7, "empty (0 bytes)", empty_clip),
    "empty caption": (7, "caption", empty_caption),
    "torn tracker": (4, "tracker", damaged_save),
    "emptied save": (4, "names iteration 4, which is not a complete checkpoint", emptied_save),
    "save path below a file": (3, "", save_is_a_file),
    "iteration that is not there": (4, "", lambda w, a: [*a, "--ckpt-step", "9"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    code, phrase, change = CASES[case]
    argv = change(world, world.flags(world.files / "run", iters=1))
    with pytest.raises(WanError) as caught:
        main(argv)
    assert caught.value.exit_code == code, str(caught.value)
    assert phrase in str(caught.value)
    assert "iteration 1/" not in capsys.readouterr().out


def test_dry_run_finds_what_the_run_would_and_writes_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*world.flags(world.files / "run"), "--dry-run"]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "everything this run needs is in place" in output and "6 clips" in output
    assert not (world.files / "run").exists()
    with pytest.raises(WanError, match="root of a pipeline"):
        main(set_flag(argv, "--load", str(world.model)))


def launcher(world: World, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the shell launcher for one iteration on two ranks."""
    variables = {"DEVICE": "cpu", "NPROC_PER_NODE": "2", "MM_DATA": str(world.files / "data.json"),
                 "MM_MODEL": str(world.files / "model_high.json"), "LOAD_PATH": str(world.model / "transformer"),
                 "SAVE_PATH": str(world.files / "run"), "NUM_WORKERS": "0", **environment}
    script = REPOSITORY / "examples" / "wan2.2" / "A14B" / "t2v" / "pretrain_high.sh"
    return subprocess.run(["bash", str(script), "--train-iters", "1"], env={**os.environ, **variables}, check=False,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("name", "value", "code"), [
    ("LOAD_PATH", "model/transformer_2", 4), ("TP", "4", 2), ("MM_DATA", "absent.json", 2),
])
def test_the_shell_launcher_passes_the_exit_code_through(name: str, value: str, code: int, world: World) -> None:
    if name == "LOAD_PATH":
        value = str(world.model / "transformer_2")
    result = launcher(world, **{name: value})
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "error:" in result.stderr


def test_the_shell_launcher_trains(world: World) -> None:
    result = launcher(world)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "iteration 1/1" in result.stdout
    assert (world.files / "run" / "iter_0000001" / "manifest.json").is_file()
    assert json.loads((world.files / "run" / "config.json").read_text())["diffusion"]["expert"] == "high"
