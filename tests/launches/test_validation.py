"""Validation as a user runs it: clips of its own, the loss of a checkpoint alone, videos that disturb nothing."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mindspeed_wan.config.flags import parse
from mindspeed_wan.errors import ConfigError
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_clips
from tests.helpers.world import World, losses, make_world, metrics, train_rank

EVALUATE = ("--eval-interval", "2", "--eval-iters", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder, num_frames=5, size=(32, 48))
    others = tiny_clips(num_clips=3, num_frames=5, size=(32, 48), fps=16, seed=11)
    shutil.copy(others / "data.json", folder / "valid.json")
    return made


def set_aside(world: World) -> tuple[str, str]:
    return "--valid-mm-data", str(world.files / "valid.json")


def evaluate_rank(rank: int, world_size: int, argv: list[str]) -> int:
    from mindspeed_wan.cli import eval as command
    from mindspeed_wan.platforms import reset_platform

    reset_platform()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["loss", *argv]))


def rows(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "validation.jsonl").read_text().splitlines()]


def test_clips_set_aside_and_the_same_number_alone(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    run_ranks(train_rank, 1, world.flags(save, *EVALUATE, *set_aside(world), iters=4), init=False)
    run_ranks(train_rank, 1, world.flags(tmp_path / "first clips", *EVALUATE, iters=2), init=False)
    reported = rows(save)
    assert [row["iteration"] for row in reported] == [2, 4]
    assert reported[0]["loss"] != rows(tmp_path / "first clips")[0]["loss"]
    last = reported[-1]
    assert sum(last["quartiles"]) / 4 == pytest.approx(last["loss"], rel=1e-9)
    bounds = last["sigma_bounds"]
    assert bounds[0] == pytest.approx(0.875) and bounds[-1] == 1.0 and bounds == sorted(bounds)
    # Naming the folder is enough, on one rank and on two; every flag given again changes nothing.
    alone = ["--device", "cpu", "--load", str(save), "--json"]
    run_ranks(evaluate_rank, 1, [*alone, str(tmp_path / "one.json")], init=False)
    run_ranks(evaluate_rank, 2, [*alone, str(tmp_path / "two.json"), "--use-torch-fsdp2"])
    for name in ("one", "two"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["loss"], found["quartiles"]) == (last["loss"], last["quartiles"])
        assert found["expert"] == "high"


@pytest.mark.slow
def test_an_adapter_is_measured_on_its_base(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    lora = ("--lora-r", "4", "--lora-target-modules", "proj_q", "ffn.0", "--lora-rank-pattern", "ffn.0=2")
    run_ranks(train_rank, 1, world.flags(save, *EVALUATE, *lora, iters=2), init=False)
    run_ranks(evaluate_rank, 1, ["--device", "cpu", "--load", str(save), "--json", str(tmp_path / "alone.json")],
              init=False)
    assert json.loads((tmp_path / "alone.json").read_text())["loss"] == rows(save)[-1]["loss"]


@pytest.mark.parametrize(("more", "expected"), [
    (("--valid-mm-data", "{valid}"), "without evaluations"),
    (("--validation-video-interval", "2"), "without --validation-prompts"),
    (("--validation-steps", "2"), "no video is made"),
    (("--validation-prompts", "{valid}", "--validation-video-interval", "2", "--expert", "low"), "start from noise"),
    (("--validation-prompts", "/nowhere.txt", "--validation-video-interval", "2"), "/nowhere.txt does not exist"),
])
def test_what_cannot_work_is_refused(world: World, tmp_path: Path, more: tuple[str, ...], expected: str) -> None:
    words = [word.replace("{valid}", str(world.files / "valid.json")) for word in more]
    expert = "low" if "low" in words else "high"
    with pytest.raises(ConfigError, match=expected):
        parse(world.flags(tmp_path, *words, expert=expert), {})


def videos(world: World, *more: str, interval: int = 2) -> tuple[str, ...]:
    prompts = world.files / "prompts.txt"
    prompts.write_text("# what to look at\na red square moves left\n\na blue circle moves up\na cat\n")
    return ("--validation-prompts", str(prompts), "--validation-video-interval", str(interval),
            "--validation-steps", "6", "--validation-shift", "5", *more)


def frames(path: Path) -> Any:
    from mindspeed_wan.evaluation.frames import read_frames

    return read_frames(path)[0]


def test_videos_disturb_nothing_and_both_experts_make_them(world: World, tmp_path: Path) -> None:
    other = ("--validation-other-expert", str(world.model / "transformer_2"))
    run_ranks(train_rank, 1, world.flags(tmp_path / "plain", iters=4), init=False)
    run_ranks(train_rank, 1, world.flags(tmp_path / "shown", *videos(world, *other), iters=4), init=False)
    assert losses(tmp_path / "shown") == losses(tmp_path / "plain")
    shown = tmp_path / "shown" / "validation"
    assert sorted(path.name for path in shown.iterdir()) == ["iter_0000002", "iter_0000004"]
    told = json.loads((shown / "iter_0000004" / "videos.json").read_text())
    assert [video["prompt"] for video in told["videos"]][2] == "a cat" and "note" not in told
    assert frames(shown / "iter_0000004" / "002.mp4").shape == (5, 32, 48, 3)


@pytest.mark.slow
def test_every_layout_shows_the_same_video(world: World, tmp_path: Path) -> None:
    flags = ("--lr", "0", "--min-lr", "0", *videos(world, "--validation-guidance", "1", interval=1))
    run_ranks(train_rank, 1, world.flags(tmp_path / "one", *flags, iters=1), init=False)
    layout = ("--tensor-model-parallel-size", "2", "--use-torch-fsdp2")
    run_ranks(train_rank, 4, world.flags(tmp_path / "four", *flags, *layout, iters=1))
    for number in range(3):
        one, four = (frames(tmp_path / name / "validation" / "iter_0000001" / f"{number:03d}.mp4").astype(int)
                     for name in ("one", "four"))
        assert one.std() > 20 and abs(one - four).mean() < 1  # a rounding apart, which H.264 spreads over some pixels
    told = json.loads((tmp_path / "four" / "validation" / "iter_0000001" / "videos.json").read_text())
    assert "predicts at the boundary" in told["note"]


def test_the_other_expert_leaves_no_trace_in_an_adapter_run(world: World, tmp_path: Path) -> None:
    lora = ("--lora-r", "4", "--lora-target-modules", "proj_q", "ffn.0", "--use-torch-fsdp2", "--bf16")
    run_ranks(train_rank, 2, world.flags(tmp_path / "plain", *lora, expert="low", iters=3))
    shown = videos(world, "--validation-other-expert", str(world.model / "transformer"), interval=1)
    run_ranks(train_rank, 2, world.flags(tmp_path / "shown", *lora, *shown, expert="low", iters=3))
    assert losses(tmp_path / "shown") == losses(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["i2v", "wan2.1-i2v"])
def test_image_to_video_begins_with_the_image(task: str, tmp_path: Path) -> None:
    from PIL import Image

    world = make_world(tmp_path / "world", task=task, num_frames=5, size=(32, 48))
    Image.new("RGB", (96, 64), (200, 30, 30)).save(world.files / "start.png")
    prompts = world.files / "prompts.txt"
    prompts.write_text('{"prompt": "a boat", "image": "start.png"}\n')
    other = () if task != "i2v" else ("--validation-other-expert", str(world.model / "transformer_2"))
    flags = world.flags(tmp_path / "run", "--validation-prompts", str(prompts), "--validation-video-interval", "1",
                        "--validation-steps", "4", *other, iters=1)
    run_ranks(train_rank, 1, flags, init=False)
    assert frames(tmp_path / "run" / "validation" / "iter_0000001" / "000.mp4").shape == (5, 32, 48, 3)


def abandon(rank: int, world_size: int, argv: list[str]) -> bool:
    """Sample with a stop request on the last rank only; returns whether the weights are what they were."""
    import torch

    from mindspeed_wan.parallel.dtensor import local
    from mindspeed_wan.parallel.groups import init_distributed
    from mindspeed_wan.platforms import get_platform, reset_platform
    from mindspeed_wan.training.setup import prepare

    reset_platform()
    platform, config = get_platform("cpu"), parse(argv)
    platform.activate()
    init_distributed(platform, 1)
    run = prepare(config, platform)
    before = [local(p.detach()).clone() for p in run.step.model.parameters()]
    calls = iter(range(100))
    assert run.show is not None
    run.show(7, lambda: rank == world_size - 1 and next(calls) >= 2)
    assert run.step.model.training
    return all(torch.equal(a, local(p.detach())) for a, p in zip(before, run.step.model.parameters()))


def test_a_stop_request_ends_sampling_on_all_ranks(world: World, tmp_path: Path) -> None:
    other = ("--validation-other-expert", str(world.model / "transformer"))  # visits in the steps that are cut short
    argv = world.flags(tmp_path, "--use-torch-fsdp2", *videos(world, *other), expert="low")
    assert run_ranks(abandon, 2, argv) == [True, True]
    assert not (tmp_path / "validation").exists()


def test_a_dry_run_looks_at_what_validation_reads(world: World, tmp_path: Path) -> None:
    from mindspeed_wan.errors import CheckpointError
    from mindspeed_wan.training.dry_run import check

    flags = [*EVALUATE, *set_aside(world), *videos(world), "--dry-run", "--validation-other-expert"]
    told = check(parse(world.flags(tmp_path, *flags, str(world.model / "transformer_2")), {}))
    assert "3 prompts, other expert" in told and "validation data: 3 clips" in told
    assert "loss every 2 steps on 2 batches of" in told
    with pytest.raises(CheckpointError, match="high"):
        check(parse(world.flags(tmp_path, *flags, str(world.model / "transformer")), {}))


@pytest.mark.slow
def test_pipeline_stages_report_the_same_loss(world: World, tmp_path: Path) -> None:
    flags = ("--eval-interval", "1", "--eval-iters", "2", "--lr", "0", "--min-lr", "0")
    run_ranks(train_rank, 1, world.flags(tmp_path / "one", *flags, iters=1), init=False)
    run_ranks(train_rank, 2, world.flags(tmp_path / "two", *flags, "--pipeline-model-parallel-size", "2", iters=1))
    one, two = (rows(tmp_path / name)[0] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["quartiles"] == pytest.approx(one["quartiles"], rel=1e-5)
    counts = [metrics(tmp_path / name)[0]["sigma_counts"] for name in ("one", "two")]
    assert counts[0] == counts[1] and sum(counts[0]) == 4 and not any(counts[0][:17])
