#!/usr/bin/env bash
# Pretrain the low-noise expert of Wan2.2 I2V A14B (sigma from 0.900 down to 0) from converted weights.
# Every value can be set from the environment, further flags are appended: see ../../README.md.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export MM_DATA=${MM_DATA:-$HERE/data.json}
export MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_low.json}
export FSDP_CONFIG=${FSDP_CONFIG-${HERE%/*}/fsdp2_config.yaml}
export LOAD_PATH=${LOAD_PATH-./ckpt/i2v/transformer_2}
export SAVE_PATH=${SAVE_PATH-./runs/i2v_A14B_low}

exec bash "$HERE/../../common/launch.sh" pretrain "$@"
