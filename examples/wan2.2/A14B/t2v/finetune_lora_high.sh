#!/usr/bin/env bash
# Train a LoRA on the high-noise expert of Wan2.2 T2V A14B (sigma from 1 down to 0.875); iter_*/adapter.safetensors is the result.
# LORA_R LORA_ALPHA LORA_TARGETS LR and every variable of ../../README.md can be set, further flags are appended.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export MM_DATA=${MM_DATA:-$HERE/data.json} MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_high.json}
export FSDP_CONFIG=${FSDP_CONFIG-${HERE%/*}/fsdp2_config.yaml} LR=${LR:-1e-4}
export LOAD_PATH=${LOAD_PATH-./ckpt/t2v/transformer} SAVE_PATH=${SAVE_PATH-./runs/t2v_A14B_high_lora}

exec bash "$HERE/../../common/launch.sh" pretrain --lora-r "${LORA_R:-32}" --lora-alpha "${LORA_ALPHA:-32}" \
    --lora-target-modules "${LORA_TARGETS:-proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2}" "$@"
