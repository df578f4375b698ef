"""Somebody else's code loads and runs an exported folder: ``python -m mindspeed_wan.demo.diffusers_check FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from mindspeed_wan.errors import CheckpointError, ConfigError, run_main


def check(folder: Path, *, height: int = 64, width: int = 96) -> tuple[int, ...]:
    """Load ``folder`` with diffusers' WanPipeline, sample three steps over both experts, return the latent's shape.

    Raises:
        CheckpointError: the latent is not finite (loading errors are diffusers' own).
    """
    import torch
    from diffusers import WanPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(prompt="a red circle moves left", height=height, width=width, num_frames=5, num_inference_steps=3,
                   guidance_scale=4.0, guidance_scale_2=3.0, output_type="latent").frames
    if not torch.isfinite(latents).all():
        raise CheckpointError("diffusers made a latent that is not finite", where=str(folder))
    return tuple(latents.shape)


def main() -> int:
    """Check the folder named on the command line."""
    if len(sys.argv) != 2:
        raise ConfigError("usage: python -m mindspeed_wan.demo.diffusers_check FOLDER")
    shape = check(Path(sys.argv[1]))
    print(f"diffusers' WanPipeline loaded {sys.argv[1]} and sampled a latent of shape {list(shape)}")
    return 0


if __name__ == "__main__":
    run_main(main)
