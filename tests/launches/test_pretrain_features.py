"""Training from cached features prints the losses of training online, bit for bit; stale caches are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from mindspeed_wan.cli import features
from mindspeed_wan.config.load import load_files
from mindspeed_wan.data.build import open_data
from mindspeed_wan.errors import ConfigError, DataError
from tests.helpers.spawn import run_ranks
from tests.helpers.world import World, edit_json, losses, make_world, train_rank, write_json

ITERATIONS = 4


def command(*argv: str) -> int:
    """Run ``mindspeed-wan features``."""
    parser = argparse.ArgumentParser()
    features.add_arguments(parser)
    return features.run(parser.parse_args(argv))


def build_cache(world: World, out: Path, *more: str) -> None:
    """Encode the world's clips."""
    assert command("build", "--mm-data", str(world.files / "data.json"), "--mm-model",
                   str(world.files / "model_high.json"), "--out", str(out), "--device", "cpu", "--seed", "7",
                   "--shard-samples", "4", *more) == 0


def feature_flags(world: World, data_path: Path, folder: Path, **preprocess: object) -> list[str]:
    """Return the flags that point a run of ``world`` at features."""
    folder.mkdir(parents=True, exist_ok=True)
    edit_json(world.files / "model_high.json", folder / "model.json", load_video_features=True,
              load_text_features=True)
    data = json.loads((world.files / "data.json").read_text())
    data["dataset_param"]["dataset_type"] = "feature"
    data["dataset_param"]["basic_parameters"] = {"data_path": str(data_path)}
    data["dataset_param"]["preprocess_parameters"].update(preprocess)
    write_json(folder / "data.json", data)
    return ["--mm-model", str(folder / "model.json"), "--mm-data", str(folder / "data.json")]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_cached_losses_equal_online_losses(task: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", task=task, num_frames=5, size=(32, 48))
    run_ranks(train_rank, 1, world.flags(tmp_path / "online", iters=ITERATIONS), init=False)
    build_cache(world, tmp_path / "cache")
    flags = feature_flags(world, tmp_path / "cache", tmp_path / "files")
    run_ranks(train_rank, 1, world.flags(tmp_path / "cached", *flags, iters=ITERATIONS), init=False)
    assert losses(tmp_path / "cached") == losses(tmp_path / "online")
    run_ranks(train_rank, 2, world.flags(tmp_path / "two", *flags, "--use-torch-fsdp2", iters=ITERATIONS))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)


def test_a_stale_cache_is_refused_and_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    build_cache(world, tmp_path / "cache")
    assert "the cache is complete: 6 clips" in capsys.readouterr().out
    flags = feature_flags(world, tmp_path / "cache", tmp_path / "files", num_frames=1)
    with pytest.raises(Exception, match="num_frames: 5 -> 1"):
        run_ranks(train_rank, 1, world.flags(tmp_path / "run", *flags), init=False)
    assert command("info", str(tmp_path / "cache")) == 0 and command("check", str(tmp_path / "cache")) == 0
    assert "6 of 5x32x48" in capsys.readouterr().out
    shard = next((tmp_path / "cache" / "shards").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-8] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="1 tensors are damaged"):
        command("check", str(tmp_path / "cache"))


def test_what_no_training_would_read_is_not_encoded(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    model = json.loads((world.files / "model_high.json").read_text())
    write_json(world.files / "model_high.json", {**model, "ae": {**model["ae"], "do_sample": True}})
    with pytest.raises(ConfigError, match="do_sample draws new latents"):
        build_cache(world, tmp_path / "cache")
    world = make_world(tmp_path / "masks", task="i2v", num_frames=5, size=(32, 48))
    model = json.loads((world.files / "model_high.json").read_text())
    processor = {**model["ae"].get("i2v_processor", {}), "conditioning": {"mode": "masks"}}
    write_json(world.files / "model_high.json", {**model, "ae": {**model["ae"], "i2v_processor": processor}})
    with pytest.raises(ConfigError, match="masks are drawn while training"):
        build_cache(world, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_text_encoder_is_refused_without_it(tmp_path: Path) -> None:
    """The text encoder is not on the training machine, but its states do not fit the model."""
    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    build_cache(world, tmp_path / "cache")
    feature_flags(world, tmp_path / "cache", tmp_path / "files")
    model = json.loads((tmp_path / "files" / "model.json").read_text())
    model["predictor"]["text_dim"] *= 2
    model["text_encoder"]["from_pretrained"] = str(tmp_path / "nowhere")
    write_json(tmp_path / "files" / "model.json", model)
    config = load_files(model=tmp_path / "files" / "model.json", data=tmp_path / "files" / "data.json")
    with pytest.raises(DataError, match="text states have 32 channels, the model reads 64"):
        open_data(config)


def test_mindspeed_mm_features_train(tmp_path: Path) -> None:
    """The cache rewritten as MindSpeed-MM's extraction writes it gives the losses of the cache."""
    from mindspeed_wan.data.features import FeatureDataset
    from mindspeed_wan.models.text_encoder import pad_states

    world = make_world(tmp_path / "world", num_frames=5, size=(32, 48))
    build_cache(world, tmp_path / "cache")
    (tmp_path / "mm" / "features").mkdir(parents=True)
    dataset, rows = FeatureDataset(tmp_path / "cache"), []
    for index in range(len(dataset)):
        sample = dataset[(0, index)]
        mask = (torch.arange(512) < len(sample.text)).long()[None]
        torch.save({"video": sample.latents[None], "prompt_ids": pad_states([sample.text]), "prompt_mask": mask},
                   tmp_path / "mm" / "features" / f"{index}.pt")
        rows.append(json.dumps({"file": f"features/{index}.pt"}))
    (tmp_path / "mm" / "data.jsonl").write_text("\n".join(rows))
    for name, path in (("cache", tmp_path / "cache"), ("mm", tmp_path / "mm" / "data.jsonl")):
        flags = feature_flags(world, path, tmp_path / f"files-{name}")
        run_ranks(train_rank, 1, world.flags(tmp_path / f"run-{name}", *flags, iters=ITERATIONS), init=False)
    assert losses(tmp_path / "run-mm") == losses(tmp_path / "run-cache")
