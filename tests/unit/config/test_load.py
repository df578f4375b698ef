"""From MindSpeed-MM's files and launcher to the resolved values."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_wan.config import load
from mindspeed_wan.config.describe import describe
from mindspeed_wan.config.expert_range import fraction_of_sigma, from_fractions, resolve, sigma_of_fraction
from mindspeed_wan.config.flags import parse, read_words
from mindspeed_wan.config.load import load_files
from mindspeed_wan.config.schema import LoraSection
from mindspeed_wan.config.translate import Report
from mindspeed_wan.errors import ConfigError
from tests.unit.config.world import FSDP2, I2V_CHANGES, World

EXAMPLES = Path(__file__).parents[3] / "examples/wan2.2/A14B"
EIGHT = {"WORLD_SIZE": "8"}


def test_the_launchers_line_with_the_example_values(world: World):
    config = parse(world.argv(), EIGHT)
    assert config.model.wan.num_layers == 40 and config.model.wan.image_dim is None
    assert config.model.encoder_offload_interval == 8
    assert config.model.vae.dtype == "bf16" and config.model.vae.path == str(world.root / "weights/vae")
    assert config.model.text_encoder.tokenizer_path == str(world.root / "weights/tokenizer")
    assert (config.diffusion.expert, config.diffusion.boundary) == ("high", 0.875)
    assert config.diffusion.sigma_range == (0.875, 1.0) and config.diffusion.weighting == "none"
    assert (config.data.num_frames, config.data.caption_dropout) == (81, 0.1)
    assert config.data.hw_stride == 16 and not config.data.force_resolution
    assert config.data.data_path == str(world.root / "data.txt")
    assert config.parallel.use_torch_fsdp2 and config.parallel.virtual_pipeline is None
    assert config.parallel.distributed_timeout_minutes == 20
    assert config.training.precision == "bf16" and config.training.train_iters == 5000
    assert config.optimizer.fused and config.optimizer.decay_style == "constant"
    assert config.fsdp2.recompute_modules == ("predictor.blocks.{*}",)
    assert (config.fsdp2.param_dtype, config.fsdp2.reduce_dtype) == ("bf16", "fp32")
    assert config.checkpoint.no_save_optim and config.checkpoint.save_interval == 10000
    assert config.lora is None
    assert any("beyond --train-iters" in note for note in config.notes)
    assert any("--mm-tool has no effect" in note for note in config.notes)
    assert any("'patch' has no effect" in note for note in config.notes)


def test_an_fsdp2_file_that_is_not_used_is_noted(world: World):
    def noted(argv: list[str]) -> bool:
        return any("without --use-torch-fsdp2" in note for note in parse(argv, EIGHT).notes)

    without = [word for word in world.argv() if word != "--use-torch-fsdp2"]
    assert noted([*without, "--fp32"])
    assert not noted(world.argv()) and not noted([*without, "--bf16"])  # bf16 shards as FSDP2 does


def test_i2v_low(world: World):
    for block, changes in I2V_CHANGES.items():
        world.model[block].update(changes)
    world.model["task"] = "i2v"
    config = parse(world.argv(), EIGHT)
    assert (config.diffusion.expert, config.diffusion.sigma_range) == ("low", (0.0, 0.9))


def test_lora_launcher(world: World):
    targets = "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2"
    more = ["--lora-r", "32", "--lora-alpha", "32", "--lora-register-forward-hook", "patch_embedding"]
    line = read_words(world.argv(*more, "--lora-target-modules", targets))
    assert not line.errors and line.values["extra.lora_target_modules"] == targets.split(",")
    tree = {"lora": {"r": 32}}
    load._derive_lora(tree, {"lora_target_modules": ["q", "k"], "lora_rank_pattern": ["q=4"]}, Report())
    lora = LoraSection(**tree["lora"])
    assert (lora.r, lora.target_modules, lora.rank_pattern) == (32, ("q", "k"), {"q": 4})
    config = parse(world.argv(*more, "--lora-target-modules", targets), EIGHT)
    assert config.lora is not None and config.lora.target_modules == tuple(targets.split(","))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_shipped_examples_load(task: str, expert: str):
    fsdp2 = EXAMPLES / "fsdp2_config.yaml"
    config = load_files(EXAMPLES / task / f"pretrain_model_{expert}.json", EXAMPLES / task / "data.json", fsdp2)
    assert config.model.task == task
    assert config.diffusion.expert == expert
    assert config.diffusion.boundary == {"t2v": 0.875, "i2v": 0.9}[task]
    assert config.fsdp2.sharding_size == "auto"
    assert (EXAMPLES / task / "data.txt").read_text().count(",") == 1


@pytest.mark.parametrize(
    ("start", "stop", "shift", "expert", "boundary"),
    [
        (0.0, 0.417, 5, "high", 0.875),
        (0.417, 1.0, 5, "low", 0.875),
        (0.0, 0.358, 5, "high", 0.9),
        (0.357, 1.0, 5, "low", 0.9),
        (0.0, 0.632, 12, "high", 0.875),
        (0.25, 1.0, 3, "low", 0.9),
        (0.0, 0.5, 5, "high", round(sigma_of_fraction(0.5, 5), 6)),
        (0.0, 1.0, 5, None, None),
        (0.2, 0.6, 5, None, None),
    ],
)
def test_index_fractions(start: float, stop: float, shift: float, expert: str | None, boundary: float | None):
    found = from_fractions(start, stop, shift, 1000)
    assert (found.expert, found.boundary) == (expert, boundary)
    assert 0 <= found.low < found.high <= 1


@pytest.mark.parametrize(
    ("sigma", "shift", "fraction"),
    [(0.9, 5.0, 0.35714), (0.875, 5.0, 0.41667), (0.875, 12.0, 0.6316), (0.9, 3.0, 0.25)],
)
def test_known_index_fractions(sigma: float, shift: float, fraction: float):
    assert fraction_of_sigma(sigma, shift) == pytest.approx(fraction, abs=5e-5)
    assert sigma_of_fraction(fraction_of_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-12)


def test_both_spellings_must_agree():
    same = {"task": "t2v", "shift": 5.0, "steps": 1000}
    agreed = resolve(expert="high", boundary=0.875, fractions=(0.0, 0.417), **same)
    assert agreed == resolve(expert="high", boundary=None, fractions=None, **same)
    for expert, boundary, fractions in (
        ("low", None, (0.0, 0.417)),
        ("high", 0.9, (0.0, 0.417)),
        (None, 0.875, None),
        (None, 0.875, (0.0, 1.0)),
        (None, None, (0.5, 0.5)),
    ):
        with pytest.raises(ConfigError):
            resolve(expert=expert, boundary=boundary, fractions=fractions, **same)


def test_flags_override_files_and_the_last_one_wins(world: World):
    for name in ("max_timestep_boundary", "min_timestep_boundary"):
        del world.model["diffusion"][name]
    config = parse(world.argv("--expert", "low", "--boundary=0.9", "--lr", "3e-5", "--lr", "2e-5", "--fp32",
                              "--timestep-weighting", "mm", "--no-save-optim", "--seed", "0"), EIGHT)  # fmt: skip
    assert config.diffusion.sigma_range == (0.0, 0.9)
    assert config.optimizer.lr == 2e-5 and config.training.seed == 0
    assert config.diffusion.weighting == "mm"
    assert config.training.precision == "fp32" and config.fsdp2.param_dtype == "fp32"
    assert any("--fp32 overrides param_dtype bf16" in note for note in config.notes)


@pytest.mark.parametrize(
    ("flags", "fsdp2", "dtype", "expected"),
    [
        ([], False, None, "fp32"),
        ([], False, "bf16", "bf16"),
        ([], True, "fp32", "bf16"),
        (["--fp32"], True, "bf16", "fp32"),
        (["--bf16"], False, "fp32", "bf16"),
    ],
)
def test_precision_order(world: World, flags: list[str], fsdp2: bool, dtype: str | None, expected: str):
    world.model["predictor"]["dtype"] = dtype
    argv = [word for word in world.argv(*flags) if word not in ("--downcast-to-bf16", "--use-torch-fsdp2")]
    config = parse([*argv, *(["--use-torch-fsdp2"] if fsdp2 else [])], EIGHT)
    assert config.training.precision == expected
    assert not fsdp2 or config.fsdp2.param_dtype == expected


def test_lengths_in_clips_and_fractions(world: World):
    argv = world.argv("--train-samples", "801", "--lr-warmup-samples", "20", "--lr-decay-samples", "400")
    at = argv.index("--train-iters")
    del argv[at : at + 2]
    config = parse(argv, EIGHT)
    assert config.training.train_iters == 101
    assert (config.optimizer.warmup_iters, config.optimizer.decay_iters) == (2.5, 50.0)
    config = parse(world.argv("--lr-warmup-fraction", "0.01"), EIGHT)
    assert config.optimizer.warmup_iters == pytest.approx(50.0)


def test_gradients_are_reduced_in_fp32_unless_the_file_says_otherwise(world: World):
    world.fsdp2 = FSDP2.replace('reduce_dtype: "fp32"\n', "")
    assert parse(world.argv(), EIGHT).fsdp2.reduce_dtype == "fp32"
    world.fsdp2 = FSDP2.replace('reduce_dtype: "fp32"', "reduce_dtype: null")
    assert parse(world.argv(), EIGHT).fsdp2.reduce_dtype is None


def test_class_dialect_of_fsdp2(world: World):
    world.fsdp2 = "sub_modules_to_wrap:\n  - mindspeed_mm.models.wan_dit.WanDiTBlock\nsharding_size: null\n"
    config = parse(world.argv(), EIGHT)
    assert config.fsdp2.sub_modules_to_wrap == ("mindspeed_mm.models.wan_dit.WanDiTBlock",)
    assert config.fsdp2.sharding_size == "auto"
    world.fsdp2 = FSDP2.replace("sharding_size: auto\n", "")
    config = parse(world.argv(), EIGHT)
    assert config.fsdp2.sharding_size is None and config.shard_size(8) == 1
    assert any("replicated" in note for note in config.notes)


def test_tiles_in_latent_units(world: World):
    world.model["ae"]["tiling_param"] = {"tile_size": [30, 52], "tile_stride": [15, 26]}
    vae = parse(world.argv(), EIGHT).model.vae
    assert (vae.tile_size, vae.tile_stride) == ((240, 416), (120, 208))


def test_paths_beside_the_file_and_in_the_working_directory(world: World, monkeypatch, tmp_path: Path):
    other = tmp_path / "cwd"
    (other / "weights/vae").mkdir(parents=True)
    monkeypatch.chdir(other)
    config = parse(world.argv(), EIGHT)
    assert config.model.vae.path == str(other / "weights/vae")
    assert config.model.text_encoder.path == str(world.root / "weights/umt5")


def test_comments_in_the_users_files(world: World):
    argv = world.argv()
    path = world.root / "model.json"
    path.write_text("// my model\n" + path.read_text().replace('"eps": 1e-06,', '"eps": 1e-06, /* small */'))
    assert parse(argv, EIGHT).model.wan.eps == 1e-6


def test_dry_run_without_a_job_size(world: World):
    config = parse(world.argv("--dry-run", "--tensor-model-parallel-size", "4"), {})
    assert config.training.dry_run
    text = describe(config)
    assert "tensor 4" in text and "t2v high noise, sigma 0.875 to 1" in text
    assert len(text.splitlines()) < 30
    assert "data" not in next(line for line in text.splitlines() if line.startswith("ranks"))
    described = describe(parse(world.argv("--dry-run", "--tensor-model-parallel-size", "4", "--world-size", "8"), {}))
    assert "data 2" in described and "4 passes" in described
    with pytest.raises(ConfigError, match="12 ranks cannot be split"):
        parse(world.argv("--dry-run", "--tensor-model-parallel-size", "8", "--world-size", "12"), {})
