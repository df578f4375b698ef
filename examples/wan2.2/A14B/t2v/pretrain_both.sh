#!/usr/bin/env bash
# Pretrain both experts of Wan2.2 T2V A14B side by side in one job: half of the ranks each, every clip encoded once.
# EXPERT_RANKS=HIGH,LOW divides otherwise, empty trains one after the other; LOAD_PATH holds transformer/ and transformer_2/.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export MM_DATA=${MM_DATA:-$HERE/data.json} MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_{expert\}.json}
export FSDP_CONFIG=${FSDP_CONFIG-${HERE%/*}/fsdp2_config.yaml} EXPERT_RANKS=${EXPERT_RANKS-even}
export LOAD_PATH=${LOAD_PATH-./ckpt/t2v} SAVE_PATH=${SAVE_PATH-./runs/t2v_A14B}

exec bash "$HERE/../../common/launch.sh" pretrain --expert both "$@"
