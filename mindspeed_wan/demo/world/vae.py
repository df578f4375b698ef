"""The world's VAE: diffusers' AutoencoderKLWan, very small, trained on the scenes.

The trained weights ship as ``assets/vae`` (fp16, 1.3 MB); this is the script that made them:

    python -m mindspeed_wan.demo.world.vae --out vae

Shapes: clips [B, 3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_wan.demo.world import scenes
from mindspeed_wan.errors import run_main

if TYPE_CHECKING:
    import torch

ASSET = Path(__file__).parent / "assets" / "vae"
"""The shipped VAE, a Diffusers ``vae/`` folder."""

_ARCHITECTURE: dict[str, Any] = {
    "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
_CLIPS_PER_SCENE = 6
_LATENT_NOISE = 0.02
"""Noise on the latents while training, so that decoding forgives a sampler's small errors."""


@dataclass(frozen=True)
class Stage:
    """Part of the schedule: pictures first (fast), then longer and longer clips."""

    num_frames: int
    batch_size: int
    num_steps: int
    learning_rate: float


SCHEDULE = (Stage(1, 8, 3000, 1.2e-3), Stage(5, 6, 2200, 1e-3), Stage(9, 4, 1200, 6e-4))


def train_vae(out: Path, *, schedule: tuple[Stage, ...] = SCHEDULE, seed: int = 0, start: Path | None = None) -> float:
    """Train the VAE, write it as a Diffusers folder, return the mean PSNR in dB on clips it has not seen.

    Args:
        out: the folder to write.
        schedule: stages in order.
        seed: of the clips and of the initial weights.
        start: a folder to continue from instead of fresh weights.
    """
    import torch
    from diffusers import AutoencoderKLWan
    from tqdm import tqdm

    torch.manual_seed(seed)
    vae: Any = AutoencoderKLWan.from_pretrained(start) if start else AutoencoderKLWan(**_ARCHITECTURE)
    rng = np.random.default_rng(seed)
    everything = scenes.combinations((*scenes.COLOURS, scenes.NEW_COLOUR))
    pool = np.stack([scenes.render(scene, rng) for scene in everything * _CLIPS_PER_SCENE])
    for stage in schedule:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        bar = tqdm(range(stage.num_steps), desc=f"VAE, {stage.num_frames} frames")
        for step in bar:
            rate = min(1.0, (step + 1) / 200) * max(0.05, 1 - step / stage.num_steps)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * rate
            loss = _loss(vae, _batch(pool, rng, stage))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    _measure_latents(vae, pool)
    vae.half().save_pretrained(out)
    return reconstruction_psnr(out)


def reconstruction_psnr(folder: Path, *, num_clips: int = 16, seed: int = 99) -> float:
    """Return the mean PSNR in dB of decode(encode(x)) over fresh clips of every kind."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    rng = np.random.default_rng(seed)
    everything = scenes.combinations((*scenes.COLOURS, scenes.NEW_COLOUR))
    chosen = [everything[i] for i in rng.choice(len(everything), num_clips, replace=False)]
    clips = _to_tensor(np.stack([scenes.render(scene, rng) for scene in chosen]))
    with torch.no_grad():
        again = vae.decode(vae.encode(clips).latent_dist.mean).sample.clamp(-1, 1)
    squared = ((again - clips) / 2).pow(2).mean(dim=(1, 2, 3, 4))
    return float((-10 * squared.log10()).mean())


def _loss(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """L1 + 2 L2, and a weak pull of the latents towards zero."""
    import torch

    mean = vae.encode(clips).latent_dist.mean
    error = vae.decode(mean + _LATENT_NOISE * torch.randn_like(mean)).sample - clips
    return error.abs().mean() + 2 * error.pow(2).mean() + 1e-4 * mean.pow(2).mean()


def _batch(pool: np.ndarray, rng: np.random.Generator, stage: Stage) -> torch.Tensor:
    clips = rng.integers(0, len(pool), stage.batch_size)
    starts = rng.integers(0, scenes.NUM_FRAMES - stage.num_frames + 1, stage.batch_size)
    return _to_tensor(np.stack([pool[c, s : s + stage.num_frames] for c, s in zip(clips, starts, strict=True)]))


def _to_tensor(frames: np.ndarray) -> torch.Tensor:
    """[B, F, H, W, 3] uint8 -> [B, 3, F, H, W] fp32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _measure_latents(vae: Any, pool: np.ndarray) -> None:
    """Write each latent channel's mean and std into the config, as the released VAE carries them."""
    import torch

    with torch.no_grad():
        latents = torch.cat([vae.encode(_to_tensor(part)).latent_dist.mean for part in np.array_split(pool[:120], 15)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=[round(v, 4) for v in mean.tolist()],
                           latents_std=[round(v, 4) for v in std.tolist()])


def main() -> int:
    """Train from the command line and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps({"psnr_db": train_vae(args.out, seed=args.seed), "folder": str(args.out)}))
    return 0


if __name__ == "__main__":
    run_main(main)
