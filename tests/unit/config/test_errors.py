"""One broken thing, one clear line: where, what, and how to put it right. And all of them together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mindspeed_wan.config.flags import parse
from mindspeed_wan.errors import ConfigError
from tests.unit.config.world import World

Break = Callable[[World], object]


def _pop(block: dict, key: str) -> object:
    return block.pop(key)


def _cache(world: World) -> None:
    world.model.update(load_video_features=True, load_text_features=False)
    world.data["dataset_param"]["dataset_type"] = "feature"


def _wan21_i2v(world: World) -> None:
    world.model["task"] = "i2v"
    world.model["predictor"].update(model_type="i2v", in_dim=36)


BROKEN_FILES: list[tuple[str, Break, str]] = [
    ("unknown key", lambda w: w.model["predictor"].update(num_head=4), "did you mean 'num_heads'"),
    ("wrong block", lambda w: w.model["predictor"].update(shift=3), "it belongs in 'diffusion'"),
    ("wrong type", lambda w: w.model["predictor"].update(num_layers="40"), "expected a whole number"),
    ("fraction", lambda w: w.model["predictor"].update(num_layers=2.5), "expected a whole number"),
    ("bool for int", lambda w: w.frames.update(num_frames=True), "expected a whole number"),
    ("refused", lambda w: w.model["predictor"].update(FPDT=True), "Ulysses"),
    ("ti2v channels", lambda w: w.model["predictor"].update(in_dim=48, out_dim=48), "TI2V-5B, which is out of scope"),
    ("ti2v", lambda w: w.model["predictor"].update(seperated_timestep=True), "out of scope"),
    ("dtype", lambda w: w.model["ae"].update(dtype="fp16"), "'bf16'"),
    ("task", lambda w: w.model.update(task="t2i"), "'t2v' or 'i2v'"),
    ("i2v with t2v", lambda w: w.model["predictor"].update(in_dim=36), "does not fit task t2v"),
    ("model_type", lambda w: w.model["predictor"].update(model_type="wan2.2-i2v"), "contradicts task"),
    ("heads", lambda w: w.model["predictor"].update(num_heads=24), "not divisible by num_heads"),
    ("odd head", lambda w: w.model["predictor"].update(num_heads=1024), "is odd"),
    ("patch", lambda w: w.model["predictor"].update(patch_size=[2, 2, 2]), "one latent frame"),
    ("patch length", lambda w: w.model["predictor"].update(patch_size=[2, 2]), "patch_size"),
    ("range", lambda w: w.model["diffusion"].update(min_timestep_boundary=0.5), "leave no timestep"),
    ("boundary", lambda w: w.model["diffusion"].update(boundary=0.9), "contradicts"),
    ("expert", lambda w: w.model["diffusion"].update(expert="low"), "contradicts"),
    ("negative shift", lambda w: w.model["diffusion"].update(shift=-1), "must be greater than 0"),
    ("placeholder", lambda w: w.model["ae"].update(from_pretrained="/path/to/vae"), "was not filled in"),
    ("your", lambda w: w.model["ae"].update(from_pretrained="./your/vae"), "was not filled in"),
    ("no vae", lambda w: w.model["ae"].update(from_pretrained="weights/va"), "holds:"),
    ("no vae key", lambda w: _pop(w.model["ae"], "from_pretrained"), "ae.from_pretrained is not given"),
    ("both tiles", lambda w: w.model["ae"]["tiling_param"].update(tile_size=[30, 52]), "pixels and in latent units"),
    ("frames", lambda w: w.frames.update(num_frames=80), "use 77 or 81"),
    ("few frames", lambda w: w.frames.update(min_num_frames=97), "no clip is left"),
    ("height", lambda w: w.frames.update(max_height=490), "use 480 or 496"),
    ("small", lambda w: w.frames.update(max_width=8), "max_width"),
    ("stride", lambda w: w.frames.update(hw_stride=12), "use 16"),
    ("area", lambda w: w.frames.update(min_hxw=400000), "no clip is left"),
    ("norm", lambda w: w.frames["train_pipeline"]["video"][2]["param"].update(mean=0.4), "[-1, 1]"),
    ("transform", lambda w: w.frames["train_pipeline"]["video"][0].update(trans_type="Resize"), "'ResizeVideo'"),
    ("size", lambda w: w.frames["train_pipeline"]["video"][0]["param"].update(transform_size=[9, 9]), "differs"),
    ("cfg", lambda w: w.frames.update(cfg=10), "at most 1"),
    ("no data_path", lambda w: _pop(w.data["dataset_param"]["basic_parameters"], "data_path"), "data_path' is missing"),
    ("data gone", lambda w: (w.root / "data.txt").unlink(), "data.txt does not exist"),
    ("long captions", lambda w: w.data["dataset_param"]["tokenizer_config"].update(model_max_length=600),
     "model_max_length 600 is more than the 512"),
    ("cached", lambda w: w.model.update(load_video_features=True), "cached features"),
    ("feature", lambda w: w.data["dataset_param"].update(dataset_type="feature"), "load_video_features"),
    ("fsdp key", lambda w: setattr(w, "fsdp2", w.fsdp2 + "shard_size: 8\n"), "did you mean 'sharding_size'"),
    ("fsdp size", lambda w: setattr(w, "fsdp2", w.fsdp2.replace("auto", "3")), "does not divide the 8 ranks"),
    ("fsdp zero", lambda w: setattr(w, "fsdp2", w.fsdp2.replace("auto", "0")), "less than 1"),
    ("fsdp word", lambda w: setattr(w, "fsdp2", w.fsdp2.replace("auto", "all")), "'auto'"),
    ("pattern", lambda w: setattr(w, "fsdp2", w.fsdp2.replace(".head", ".{1}.{2}")), "not a module pattern"),
    ("num_train_timesteps", lambda w: w.model["diffusion"].update(num_train_timesteps=500), "t = 1000 sigma"),
    ("sigma_min", lambda w: w.model["diffusion"].update(sigma_min=0.1), "ends at 0"),
    ("half cached", _cache, "cached together"),
    ("wan2.1 i2v", _wan21_i2v, "image_encoder.from_pretrained is not given"),
    (
        "tiling",
        lambda w: w.model["ae"].update(i2v_processor={"i2v_vae_encod_tiling": True}),
        "differs from enable_tiling",
    ),
    ("moe", lambda w: setattr(w, "fsdp2", w.fsdp2 + "expert_parallel_size: 2\n"), "dense experts"),
]


@pytest.mark.parametrize(("name", "change", "expected"), BROKEN_FILES, ids=[row[0] for row in BROKEN_FILES])
def test_broken_file(world: World, name: str, change: Break, expected: str):
    change(world)
    with pytest.raises(ConfigError) as caught:
        parse(world.argv(), {"WORLD_SIZE": "8"})
    text = str(caught.value)
    assert expected in text
    assert str(world.root) in text  # the file is named
    assert caught.value.exit_code == 2
    assert "mistakes in" not in text  # one slip, one error


BROKEN_FLAGS: list[tuple[list[str], str]] = [
    (["--learning-rate", "1"], "unknown flag --learning-rate"),
    (["--tensor-model-paralel-size", "2"], "did you mean '--tensor-model-parallel-size'"),
    (["--micro_batch_size", "2"], "did you mean '--micro-batch-size'"),
    (["--micro-batch"], "did you mean '--micro-batch-size'"),
    (["--lr"], "--lr needs a value"),
    (["--lr", "fast"], "needs a number"),
    (["--lr", "nan"], "needs a number"),
    (["--seed", "1.5"], "needs a whole number"),
    (["--bf16", "true"], "unexpected word 'true' after --bf16"),
    (["--bf16=true"], "takes no value"),
    (["-lr", "1"], "did you mean '--lr'"),
    (["--lr-decay-style", "cosin"], "did you mean 'cosine'"),
    (["--context-parallel-algo", "ring"], "choose from"),
    (["--ckpt-format", "torch_dist"], "save torch_dcp"),
    (["--fp16"], "use --bf16"),
    (["--attention-mask-type", "causal"], "use general"),
    (["--num-layers", "40"], "predictor.num_layers"),
    (["--train-iters", "0"], "must be at least 1"),
    (["--adam-beta1", "1.0"], "must be less than 1"),
    (["--pipeline-model-parallel-size", "4"], "with --use-torch-fsdp2"),
    (["--virtual-pipeline-model-parallel-size", "2"], "without pipeline stages"),
    (["--tensor-model-parallel-size", "3", "--world-size", "3"], "make tensor x Ulysses one of: 1, 2, 4, 5, 8"),
    (["--tensor-model-parallel-size", "5", "--world-size", "5"], "ffn_dim 13824 is not divisible"),
    (["--context-parallel-size", "5"], "8 ranks cannot be split into groups of 5"),
    (["--context-parallel-algo", "hybrid_cp_algo"], "needs --ulysses-degree-in-cp"),
    (["--ulysses-degree-in-cp", "2"], "not read with ulysses_cp_algo"),
    (["--sequence-parallel"], "above 1"),
    (["--global-batch-size", "12"], "is not a multiple of 8"),
    (["--lr-warmup-iters", "6000"], "does not end before"),
    (["--min-lr", "1e-4"], "is above --lr"),
    (["--lr-decay-style", "WSD"], "--lr-wsd-decay-iters"),
    (["--start-weight-decay", "0.1"], "constant style"),
    (["--weight-decay-incr-style", "linear"], "needs a start and an end"),
    (["--recompute-granularity", "full", "--recompute-num-layers", "99"], "the model's 40 blocks"),
    (["--load-base-model", "/tmp"], "without LoRA"),
    (["--load", "path to save your weights"], "was not filled in"),
    (["--save", "path", "to", "save"], "needs quotes"),
    (["--save", ""], "--save is empty"),
    (["--lora-rank-pattern", "ffn.0"], "write it like ffn.0=64"),
    (["--train-samples", "100"], "keep one of them"),
    (["--ckpt-format", "torch"], "mm-convert dcp_to_mm"),
    (["--recompute-granularity", "selective"], "use full"),
    (["--recompute-num-layers", "2"], "add --recompute-granularity full"),
    (["--recompute-every", "2"], "add --recompute-granularity full"),
    (["--recompute-skip-core-attention"], "add --recompute-granularity full"),
    (["--recompute-granularity", "full", "--recompute-ofload"], "did you mean '--recompute-offload'"),
    (["--optimizer", "muon"], "choose from: adam, adamw, adam8bit"),
    (["--optimizer-offload-fraction", "0.5"], "add --optimizer-cpu-offload"),
    (["--optimizer-cpu-offload", "--optimizer-offload-fraction", "1.5"], "--optimizer-offload-fraction = 1.5"),
    (["--optimizer-cpu-offload", "--optimizer", "adam8bit"], "8-bit moments stay on the device"),
    (["--swap-optimizer"], "use --optimizer-cpu-offload"),
    (["--swap-attention"], "--recompute-offload"),
    (["--ulysses-overlap-chunks", "2"], "with one context rank"),
    (["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo", "--ulysses-overlap-chunks", "2"],
     "a ring, whose transfers overlap already"),
    (["--context-parallel-size", "8", "--ulysses-overlap-chunks", "6"], "use at most 5"),
    (["--attention", "sage"], "has no backward and cannot train"),
    (["--attention", "flash"], "did you mean"),
    (["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo", "--attention", "cudnn"],
     "with a ring of 2"),
    (["--mm-model", "/nowhere/model.json"], "does not exist"),
    (["--trust-remote-code"], "no code"),
    (["--expert", "low"], "contradicts"),
]


@pytest.mark.parametrize(("flags", "expected"), BROKEN_FLAGS, ids=[" ".join(flags) for flags, _ in BROKEN_FLAGS])
def test_broken_flag(world: World, flags: list[str], expected: str):
    with pytest.raises(ConfigError) as caught:
        parse(world.argv(*flags), {"WORLD_SIZE": "8"})
    assert expected in str(caught.value)
    assert "mistakes in" not in str(caught.value)


def test_nothing_to_start_from(world: World):
    argv = world.argv()
    at = argv.index("--load")
    del argv[at : at + 2]
    with pytest.raises(ConfigError, match="--from-scratch"):
        parse(argv, {"WORLD_SIZE": "8"})
    assert parse([*argv, "--from-scratch"], {"WORLD_SIZE": "8"}).checkpoint.from_scratch
    (world.root / "out").mkdir()
    (world.root / "out/latest_checkpointed_iteration.txt").write_text("10")
    assert parse(argv, {"WORLD_SIZE": "8"}).checkpoint.load is None  # it goes on from --save


def test_no_files_at_all():
    with pytest.raises(ConfigError) as caught:
        parse([], {})
    for needed in ("--mm-model is missing", "--mm-data is missing", "--train-iters is missing", "no weights"):
        assert needed in str(caught.value)


def test_all_mistakes_of_all_files_at_once(world: World):
    world.model["predictor"]["num_head"] = 40
    world.model["ae"]["dtype"] = "fp8"
    world.frames["num_frame"] = 81
    world.data["dataset_param"]["tokenizer_config"]["from_pretrained"] = "/path/to/tokenizer"
    world.fsdp2 += "reshard: true\n"
    argv = world.argv("--lrr", "1", "--global-batch-size", "12", "--sequence-parallel")
    with pytest.raises(ConfigError) as caught:
        parse(argv, {"WORLD_SIZE": "8"})
    text = str(caught.value)
    expected = ["num_heads", "ae.dtype", "num_frames", "reshard_after_forward", "--lr", "multiple of 8", "above 1"]
    for part in expected:
        assert part in text, part
    lines = (world.root / "model.json").read_text().splitlines()
    line = next(number for number, line in enumerate(lines, 1) if 'num_head"' in line)
    assert f"model.json:{line}: unknown key 'predictor.num_head'" in text


def test_an_error_in_a_file_raises_no_second_one_about_its_values(world: World):
    world.model["predictor"]["in_dmi"] = world.model["predictor"].pop("in_dim")
    world.model["task"] = "i2v"
    world.model["predictor"]["model_type"] = "wan2.2-i2v"
    with pytest.raises(ConfigError) as caught:
        parse(world.argv(), {"WORLD_SIZE": "8"})
    assert "did you mean 'in_dim'" in str(caught.value)
    assert "mistakes in" not in str(caught.value)


def test_rule_errors_carry_the_line(world: World):
    world.frames["num_frames"] = 80
    with pytest.raises(ConfigError) as caught:
        parse(world.argv(), {"WORLD_SIZE": "8"})
    lines = (world.root / "data.json").read_text().splitlines()
    line = next(number for number, line in enumerate(lines, 1) if '"num_frames"' in line)
    assert caught.value.where == f"{world.root / 'data.json'}:{line}"


def test_offload_of_block_inputs_needs_recomputed_blocks(world: World):
    """The flag goes with --recompute-granularity or with recompute_modules of an FSDP2 file that is in use."""
    env = {"WORLD_SIZE": "8"}
    assert "recompute_modules" in world.fsdp2
    assert parse(world.argv("--recompute-offload"), env).training.recompute.offload
    world.fsdp2 = world.fsdp2.split("recompute_modules")[0]
    with pytest.raises(ConfigError, match="add --recompute-granularity full"):
        parse(world.argv("--recompute-offload"), env)
    assert parse(world.argv("--recompute-offload", "--recompute-granularity", "full"), env).training.recompute.offload


def test_optimizer_state_is_offloaded_once(world: World):
    env = {"WORLD_SIZE": "8"}
    config = parse(world.argv("--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5"), env).optimizer
    assert config.cpu_offload and config.offload_fraction == 0.5
    world.fsdp2 = world.fsdp2.replace("offload_to_cpu: False", "offload_to_cpu: True")
    with pytest.raises(ConfigError, match="on the host too"):
        parse(world.argv("--optimizer-cpu-offload"), env)


def test_optimizer_by_name(world: World):
    env = {"WORLD_SIZE": "8"}
    assert parse(world.argv("--optimizer", "adam"), env).optimizer.name == "adamw"
    assert parse(world.argv("--optimizer", "adam8bit"), env).optimizer.name == "adam8bit"
