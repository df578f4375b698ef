"""DCP folders written by several ranks: chunks in rows, in columns, uneven, and in both at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.errors import CheckpointError
from mindspeed_wan_converters.cli import run
from mindspeed_wan_converters.tensors import Box, Chunk, StoredTensor, check_tiling
from tests.converters.tiny_weights import CONFIGS, assert_same, random_state, read_expert, write_expert
from tests.helpers.spawn import run_ranks


def save_sharded(rank: int, world_size: int, folder: str, tensor_parallel: int) -> None:
    """Save the tiny model as DTensors on a (tp, dp) mesh, as a training run does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from mindspeed_wan.models.wan.param_map import parameter_table

    mesh = init_device_mesh("cpu", (tensor_parallel, world_size // tensor_parallel), mesh_dim_names=("tp", "dp"))
    state = random_state("i2v", "bf16")
    model = {}
    for param in parameter_table(CONFIGS["i2v"]):
        across = Replicate() if param.tp_axis is None else Shard(param.tp_axis)
        model[param.mm] = distribute_tensor(state[param.hf], mesh, [across, Shard(0)])
    dcp.save({"model": model, "optimizer": {n: t.float() for n, t in list(model.items())[:3]}}, checkpoint_id=folder)


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 1), (2, 2), (4, 2), (3, 1)])
def test_sharded_training_checkpoints_are_assembled(tmp_path: Path, ranks: int, tensor_parallel: int) -> None:
    run_ranks(save_sharded, ranks, str(tmp_path / "iter_0000001"), tensor_parallel)
    state = random_state("i2v", "bf16")
    hf_dir = write_expert(tmp_path / "hf", "i2v", state)
    for verb, back in (("dcp_to_hf", None), ("dcp_to_mm", "mm_to_hf")):
        out = tmp_path / verb
        options = ["--cfg.hf_dir", str(hf_dir), "--quiet"]
        layout = ["--cfg.target_parallel_config.tp_size", "4"] if verb == "dcp_to_mm" else []
        assert run([verb, str(tmp_path / "iter_0000001"), str(out), *options, *layout]) == 0
        if back:
            assert run([back, str(out), str(tmp_path / "back"), "--quiet"]) == 0
            out = tmp_path / "back"
        assert_same(read_expert(out), state)


def tensor(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> StoredTensor:
    return StoredTensor("w", "F32", (4, 6), tuple(Chunk(Path("f"), 0, Box(o, s)) for o, s in boxes))


def test_chunks_must_tile_their_tensor() -> None:
    check_tiling(tensor(((0, 0), (4, 6))))
    check_tiling(tensor(((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 6))))
    for boxes in ([((0, 0), (3, 6))], [((0, 0), (2, 6)), ((0, 0), (2, 6))], [((0, 0), (4, 3)), ((0, 2), (4, 3))],
                  [((0, 0), (2, 6)), ((1, 0), (2, 6))], []):
        with pytest.raises(CheckpointError):
            check_tiling(tensor(*boxes))


def test_replicated_tensors_of_an_mm_checkpoint_must_agree(tmp_path: Path) -> None:
    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    mm = tmp_path / "mm"
    assert run(["hf_to_mm", str(hf), str(mm), "--cfg.target_parallel_config.tp_size", "2", "--quiet"]) == 0
    file = mm / "release/mp_rank_01/model_optim_rng.pt"
    model = torch.load(file, weights_only=True)
    model["model"]["blocks.2.norm3.weight"][5] += 1
    torch.save(model, file)
    (mm / "release/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"blocks\.2\.norm3\.weight.*differ"):
        run(["mm_to_hf", str(mm), str(tmp_path / "out")])


def test_a_missing_rank_file_is_named(tmp_path: Path) -> None:
    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    for number, rank in enumerate(("mp_rank_00_001", "mp_rank_01_000")):
        mm = tmp_path / f"mm{number}"
        assert run(["hf_to_mm", str(hf), str(mm), "--cfg.target_parallel_config.tp_size", "2",
                    "--cfg.target_parallel_config.pp_layers", "[2,2]", "--quiet"]) == 0
        (mm / "release/manifest.json").unlink()
        (mm / "release" / rank / "model_optim_rng.pt").unlink()
        (mm / "release" / rank).rmdir()
        with pytest.raises(CheckpointError, match="missing"):
            run(["mm_to_hf", str(mm), str(tmp_path / "out")])
