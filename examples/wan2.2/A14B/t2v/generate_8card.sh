#!/usr/bin/env bash
# One 1280*720 video of 81 frames on eight cards: weights of DiT and UMT5 sharded, Ulysses 8, exact parallel VAE.
#   CKPT_DIR=./Wan2.2-T2V-A14B PROMPT="a fox in the snow" generate_8card.sh [flags...]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
exec bash "$HERE/inference.sh" --task t2v-A14B --ckpt_dir "${CKPT_DIR:-./Wan2.2-T2V-A14B}" --size "1280*720" --frame_num 81 \
    --sample_steps 40 --base_seed 100 --dit_fsdp --t5_fsdp --cfg_size 1 --ulysses_size "$NPROC_PER_NODE" --vae_parallel \
    --prompt "${PROMPT:-Two cats in boxing gear fight on a spotlighted stage.}" --save_file "${SAVE_FILE:-./samples/t2v_8card.mp4}" "$@"
