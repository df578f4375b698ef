"""Both dialects of the command line, and what they refuse: everything at once, with what would be legal."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.flags import help_text, parse
from mindspeed_wan.inference.options import GenerateOptions, parse_guidance, parse_size, settings_hash
from mindspeed_wan.models.wan.config import SAMPLING_DEFAULTS
from mindspeed_wan.parallel.inference_layout import InferenceLayout

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "examples" / "wan2.2" / "A14B" / "t2v" / "inference_model.json"


def test_wan_dialect():
    words = shlex.split(
        "--task t2v-A14B --ckpt_dir W --size 832*480 --frame_num 49 --sample_steps 20 --sample_shift 5 "
        "--sample_solver dpm++ --sigma_grid diffusers --sample_guide_scale 3.0,4.0 --base_seed 7 --dtype fp32 "
        "--offload_model True --dit_fsdp --t5_fsdp --cfg_size 2 --ulysses-size=4 --vae_parallel --t5_cpu "
        "--save_file out.mp4 --save_latents z.safetensors --prompt 'a cat' --negative_prompt ''"
    )
    options = parse(words, world_size=8)
    assert options.layout == InferenceLayout(
        world_size=8, cfg=2, ulysses=4, dit_fsdp=True, t5_fsdp=True, vae_parallel=True
    )
    assert (options.size, options.num_frames, options.guidance) == ((480, 832), 49, (3.0, 4.0))
    assert (options.memory, options.text_device, options.negative_prompt) == ("sequential", "cpu", "")
    assert (options.solver, options.grid, options.base_seed, options.dtype) == ("dpm++", "diffusers", 7, "fp32")


def test_a_first_and_last_frame_model_needs_both(tmp_path):
    image = tmp_path / "a.png"
    image.touch()
    options = GenerateOptions(prompts=("a fox",), images=(str(image),))
    options.check()
    with pytest.raises(ConfigError, match="give --last_image FILE too"):
        options.check(both_ends=True)
    replace(options, last_images=(str(image),)).check(both_ends=True)


def test_mm_dialect_with_the_shell_scripts_training_flags(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\n  second  \n")
    text = EXAMPLE.read_text().replace("./examples/wan2.2/A14B/t2v/samples_t2v_prompts.txt", str(prompts))
    path = tmp_path / "inference_model.json"
    path.write_text(text)
    options = parse(
        f"--mm-model {path} --load high --lr 5e-6 --train-iters 5010 --bf16 --attention-mask-type general --finetune "
        "--context-parallel-algo ulysses_cp_algo --context-parallel-size 2 --sample_steps 8".split(), world_size=2
    )
    assert "--lr --train-iters --attention-mask-type --finetune" in capsys.readouterr().out
    assert options.prompts == ("first", "second")
    assert options.guidance == (3.0, 4.0)  # the file says [high, low]
    assert (options.size, options.num_frames, options.steps, options.shift) == ((480, 832), 81, 8, 12.0)
    assert (options.grid, options.solver, options.memory, options.layout.ulysses) == (
        "diffusers", "unipc", "sequential", 2)
    assert str(options.low_noise_ckpt).endswith("transformer_2")
    assert options.high_noise_ckpt == Path("high") and options.predictor.num_heads == 40


def test_defaults_are_the_official_ones():
    options = parse(["--ckpt_dir", "w", "--prompt", "x"], world_size=1)
    t2v, i2v = options.resolve("t2v-A14B"), options.resolve("i2v-A14B")
    assert (t2v.steps, t2v.shift, t2v.boundary, t2v.guidance, t2v.num_frames, t2v.fps) == (
        40, 12.0, 0.875, (3.0, 4.0), 81, 16)
    assert (i2v.steps, i2v.shift, i2v.boundary, i2v.guidance) == (40, 5.0, 0.9, (3.5, 3.5))
    assert options.max_text_length == 512 and options.negative_prompt.startswith("色调艳丽，过曝，静态")
    assert options.negative_prompt.endswith("背景人很多，倒着走") and "," not in options.negative_prompt


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--frme_num 81", "did you mean 'frame_num'"),
        ("--size 1281*719", "height 719 is not a multiple of 16; the nearest is 720"),
        ("--size 720p", "is not WIDTH*HEIGHT"),
        ("--frame_num 80", "is not 4k+1; the nearest is 81"),
        ("--sample_solver unpc", "did you mean 'unipc'"),
        ("--cfg_size 3", "it is 1 or 2"),
        ("--ulysses_size 3", "world size 4 does not factor: cfg 1 x ulysses 3 x ring 1 x TP 1 = 3"),
        ("--ulysses_size 2", "makes 2 videos at a time but only 1 asked for"),
        ("--sample_steps many", "not a valid whole number"),
        ("--sample_guide_scale 1,2,3", "is not LOW,HIGH"),
        ("--dit_fsdp perhaps", "is not true or false"),
        ("--offload_model true --memory resident", "contradicts --memory resident"),
        ("--use_prompt_extend", "needs a language model"),
        ("--task t2v-A14B --image a.png", "takes no image"),
        ("--last_image a.png", "needs a first one"),
        ("--mm_model nowhere.json", "does not exist"),
        ("--vae_tile 30,52 --vae_parallel --ulysses_size 4", "drop the VAE tiles"),
        ("stray", "is not a flag"),
        ("--save_file", "needs a value"),
    ],
)
def test_bad_flags_are_named(flags, expected):
    with pytest.raises(ConfigError) as error:
        parse([*flags.split(), "--ckpt_dir", "w", "--prompt", "x"], world_size=4)
    assert expected in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as error:
        parse(shlex.split("--ckpt_dir w --size 100*100 --frame_num 2 --sample_steps 0 --dtype int3"), world_size=1)
    for part in ("width 100", "height 100", "--frame_num 2", "--sample_steps is 0", "dtype is 'int3'", "no prompt"):
        assert part in str(error.value)


def test_prompt_files(tmp_path):
    good, empty = tmp_path / "p.txt", tmp_path / "e.txt"
    good.write_text("one\n\ntwo\n")
    empty.write_text("\n \n")
    assert parse(["--ckpt_dir", "w", "--prompt_file", str(good)], world_size=1).prompts == ("one", "two")
    with pytest.raises(ConfigError, match="empty|no prompt"):
        parse(["--ckpt_dir", "w", "--prompt_file", str(empty)], world_size=1)


def test_mm_file_errors_have_lines(tmp_path):
    path = tmp_path / "m.json"
    values = {"prompt": ["x"], "save_path": "o", "pipeline_config": {"expand_timesteps": True}, "fsp": 16}
    path.write_text(json.dumps(values, indent=1))
    with pytest.raises(ConfigError) as error:
        parse(["--mm-model", str(path)], world_size=1)
    assert "TI2V-5B" in str(error.value) and "did you mean 'fps'" in str(error.value) and "m.json:9" in str(error.value)


def test_heads_must_split_over_tensor_times_ulysses():
    layout = InferenceLayout(world_size=16, ulysses=16)
    (problem,) = layout.problems(num_heads=40, num_videos=1)
    assert "40 attention heads" in problem and "1, 2, 4, 5, 8, 10, 20, 40" in problem


def test_layout_places_ranks():
    layout = InferenceLayout(world_size=16, cfg=2, ulysses=2, tensor=2)
    assert layout.replicas == 2 and layout.replica_ranks(1) == list(range(8, 16))
    assert layout.place(13) == (1, 1) and layout.cfg_ranks(13) == [9, 13] and layout.cfg_ranks(2) == [2, 6]
    assert layout.describe() == "16 ranks = 2 videos at a time x CFG 2 x Ulysses 2 x TP 2"


def test_jobs_have_seeds_of_their_own():
    options = GenerateOptions(prompts=("a", "b"), videos_per_prompt=2, base_seed=5, save_path=Path("o"))
    assert [(job.prompt, job.seed, job.output.name) for job in options.jobs()] == [
        ("a", 5, "video_0.mp4"), ("a", 6, "video_1.mp4"), ("b", 5, "video_2.mp4"), ("b", 6, "video_3.mp4")]
    one = GenerateOptions(prompts=("a",), save_file=Path("x/y.mp4"))
    assert [job.output for job in one.jobs()] == [Path("x/y.mp4")]


def test_settings_hash_sees_content_and_not_layout():
    options = GenerateOptions(prompts=("a",)).resolve("t2v-A14B")
    other_layout = GenerateOptions(prompts=("a",), layout=InferenceLayout(world_size=2, ulysses=2), memory="block")
    job = options.jobs()[0]
    name = settings_hash(options.settings(job, "w"))
    assert name == settings_hash(other_layout.resolve("t2v-A14B").settings(job, "w"))
    assert name != settings_hash(options.settings(job, "other weights"))
    assert name != settings_hash(GenerateOptions(prompts=("a",), steps=3).resolve("t2v-A14B").settings(job, "w"))


def test_task_must_be_the_weights():
    with pytest.raises(ConfigError, match="weights are i2v-A14B"):
        GenerateOptions(prompts=("a",), task="t2v-A14B").resolve("i2v-A14B")


def test_small_parsers():
    assert parse_size("1280*720") == (720, 1280) == parse_size("1280x720")
    assert parse_guidance("3.5") == (3.5, 3.5) and parse_guidance("3,4") == (3.0, 4.0)


def test_help_and_errors_need_no_torch():
    code = (
        "import sys; from mindspeed_wan.inference.flags import parse, help_text; help_text()\n"
        "try: parse(['--nothing'])\n"
        "except Exception as error: assert 'nothing' in str(error)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    assert "--sample_guide_scale" in help_text()


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_shipped_files_are_read(task, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = f"examples/wan2.2/A14B/{task}/inference_model.json"
    options = parse(["--mm-model", path, "--load", "high"], world_size=1).resolve(f"{task}-A14B")
    official = SAMPLING_DEFAULTS[f"{task}-A14B"]
    assert (options.steps, options.shift, options.guidance, options.boundary) == (
        official.num_steps, official.shift, official.guidance, official.boundary)
    assert len(options.prompts) >= 2 and len(options.images) == (len(options.prompts) if task == "i2v" else 0)


def test_image_lists_of_another_length(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    words = ["--ckpt_dir", "w", "--prompt", "1", "2", "3", "--image", *[str(tmp_path / "a.png")] * 2]
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        parse(words, world_size=1)


def test_ti2v_is_out_of_scope():
    with pytest.raises(ConfigError, match="TI2V-5B is out of scope"):
        parse(["--task", "ti2v-5B", "--ckpt_dir", "w", "--prompt", "x"], world_size=1)


def test_the_environment_names_the_device_before_the_file_does(tmp_path, monkeypatch):
    path = tmp_path / "inference_model.json"
    path.write_text('{"device": "npu", "prompt": "a fox", "save_path": "out"}')
    monkeypatch.delenv("MINDSPEED_WAN_DEVICE", raising=False)
    assert parse(["--mm-model", str(path), "--load", "x"], world_size=1).device == "npu"
    monkeypatch.setenv("MINDSPEED_WAN_DEVICE", "cpu")
    assert parse(["--mm-model", str(path), "--load", "x"], world_size=1).device is None
