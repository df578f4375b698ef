#!/usr/bin/env bash
# Train a LoRA on each expert of Wan2.2 T2V A14B, high noise first: two runs in one job, two adapters in SAVE_PATH.
# EXPERT_RANKS=even (or HIGH,LOW) trains them side by side instead, each on its own ranks. LOAD_PATH holds both experts
# (transformer/ and transformer_2/). Variables and flags as in finetune_lora_high.sh.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export MM_DATA=${MM_DATA:-$HERE/data.json} MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_{expert\}.json}
export FSDP_CONFIG=${FSDP_CONFIG-${HERE%/*}/fsdp2_config.yaml} LR=${LR:-1e-4}
export LOAD_PATH=${LOAD_PATH-./ckpt/t2v} SAVE_PATH=${SAVE_PATH-./runs/t2v_A14B_lora}

exec bash "$HERE/../../common/launch.sh" pretrain --expert both --lora-r "${LORA_R:-32}" \
    --lora-alpha "${LORA_ALPHA:-32}" --lora-target-modules "${LORA_TARGETS:-proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2}" "$@"
