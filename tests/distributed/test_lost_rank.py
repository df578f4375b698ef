"""A rank that is gone while a video is made: the others say so, with what to do, and end with exit code 6."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from mindspeed_wan.errors import EXIT_DISTRIBUTED, WanError
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny_pipeline_folder


def generate_until_lost(rank: int, world_size: int, folder: str, out: str) -> tuple[int, str]:
    """Generate with tokens over all ranks; the last rank leaves after its second step."""
    from mindspeed_wan.inference import generate

    class Gone(Exception):
        pass

    def step(self: object, number: int, *args: object) -> None:
        if rank == world_size - 1 and number >= 2:
            raise Gone

    generate.ProgressBar.step = step  # type: ignore[method-assign]
    try:
        generate.main(["--task", "t2v-A14B", "--ckpt_dir", folder, "--size", "96*64", "--frame_num", "5", "--dtype",
                       "fp32", "--sample_steps", "6", "--ulysses_size", str(world_size), "--prompt", "a red circle",
                       "--save_file", str(Path(out) / "video.mp4"), "--device", "cpu"])
    except Gone:
        dist.destroy_process_group()
        return 0, "gone"
    except WanError as error:
        dist.destroy_process_group()
        return error.exit_code, str(error)
    return 0, "finished"


def test_a_lost_rank_of_a_generation_is_explained(tmp_path: Path) -> None:
    (code, told), (_, left) = run_ranks(generate_until_lost, 2, str(tiny_pipeline_folder()), str(tmp_path))
    assert left == "gone" and code == EXIT_DISTRIBUTED
    assert "waited in vain for another rank" in told and "finished videos are kept" in told
    assert not list(tmp_path.glob("*.mp4"))
