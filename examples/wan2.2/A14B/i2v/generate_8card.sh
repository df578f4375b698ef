#!/usr/bin/env bash
# One 1280*720 video of 81 frames from an image on eight cards: weights sharded, Ulysses 8, exact parallel VAE.
#   CKPT_DIR=./Wan2.2-I2V-A14B IMAGE=first.png PROMPT="the cat surfs" generate_8card.sh [flags...]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
exec bash "$HERE/inference.sh" --task i2v-A14B --ckpt_dir "${CKPT_DIR:-./Wan2.2-I2V-A14B}" --size "1280*720" --frame_num 81 \
    --sample_steps 40 --base_seed 100 --dit_fsdp --t5_fsdp --cfg_size 1 --ulysses_size "$NPROC_PER_NODE" --vae_parallel \
    --image "${IMAGE:-first_frame.png}" --prompt "${PROMPT:-The camera slowly moves closer.}" \
    --save_file "${SAVE_FILE:-./samples/i2v_8card.mp4}" "$@"
