#!/usr/bin/env bash
# Text to video with Wan2.2-Fun A14B-InP and a reward LoRA on each expert: 832*480, 81 frames, 50 steps, guidance 6.
# Device: the first of NPU, CUDA, CPU (DEVICE=...). GPU_MEMORY_MODE: model_full_load, model_cpu_offload or
# sequential_cpu_offload, auto if unset. LORA_LOW or LORA_HIGH empty: that expert runs without. Flags are appended.
set -euo pipefail
COMMON=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../common" && pwd)

LORA_HIGH=${LORA_HIGH-./weights/Wan2.2-Fun-Reward-LoRAs/Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors}
LORA_LOW=${LORA_LOW-./weights/Wan2.2-Fun-Reward-LoRAs/Wan2.2-Fun-A14B-InP-low-noise-HPS2.1.safetensors}
adapters=()
[[ -n $LORA_HIGH ]] && adapters+=(--lora_high_path "$LORA_HIGH" --lora_high_weight "${LORA_HIGH_WEIGHT:-0.55}")
[[ -n $LORA_LOW ]] && adapters+=(--lora_path "$LORA_LOW" --lora_weight "${LORA_WEIGHT:-0.55}")

exec bash "$COMMON/launch.sh" inference --task inp-A14B --ckpt_dir "${CKPT_DIR:-./weights/Wan2.2-Fun-A14B-InP}" \
    --size "832*480" --frame_num 81 --fps 16 --sample_steps 50 --sample_guide_scale 6.0 --base_seed 43 \
    --memory "${GPU_MEMORY_MODE:-auto}" --save_file "${SAVE_FILE:-./samples/inp/predict_t2v.mp4}" \
    --prompt "${PROMPT:-A brown dog shakes its head on a light coloured sofa in a bright, tidy living room.}" \
    ${adapters[@]+"${adapters[@]}"} "$@"
