"""The held-out captions through diffusers' own WanPipeline, from our export: an outsider's view of what was trained.

    python -m mindspeed_wan.demo.world.diffusers_videos '{"model": ..., "out": ..., "steps": 20, "copies": 8}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mindspeed_wan.errors import run_main


def main() -> int:
    """Generate every video; the settings come as one JSON argument."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from mindspeed_wan.demo.clips import write_mp4
    from mindspeed_wan.demo.world import scenes
    from mindspeed_wan.demo.world.files import SIZES
    from mindspeed_wan.demo.world.judging import GUIDANCE, SHIFT, asked

    settings = json.loads(sys.argv[1])
    pipe = WanPipeline.from_pretrained(settings["model"], torch_dtype=torch.float32)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=SHIFT)
    pipe.set_progress_bar_config(disable=True)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    height, width = scenes.SIZE
    for index, item in enumerate(asked(scenes.held_out(), settings["copies"])):
        video = pipe(
            prompt=item.scene.caption, negative_prompt="", height=height, width=width, num_frames=scenes.NUM_FRAMES,
            num_inference_steps=settings["steps"], guidance_scale=GUIDANCE, max_sequence_length=SIZES["text_len"],
            generator=torch.Generator().manual_seed(item.seed), output_type="np",
        ).frames[0]
        write_mp4(out / f"video_{index}.mp4", (video * 255).round().astype("uint8"), fps=scenes.FPS, quality=8)
        print(f"{index}: {item.scene.caption}", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
