#!/usr/bin/env bash
# Pretrain Wan2.1 I2V 14B (one expert, all sigmas) from converted weights.
# Every value can be set from the environment, further flags are appended: see ../../../wan2.2/README.md.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
COMMON=$(cd "$HERE/../../../wan2.2/common" && pwd)

export MM_DATA=${MM_DATA:-$HERE/data.json}
export MM_MODEL=${MM_MODEL:-$HERE/pretrain_model.json}
export FSDP_CONFIG=${FSDP_CONFIG-${COMMON%/*}/A14B/fsdp2_config.yaml}
export LOAD_PATH=${LOAD_PATH-./ckpt/wan2.1_i2v/transformer}
export SAVE_PATH=${SAVE_PATH-./runs/wan2.1_i2v_14B}

exec bash "$COMMON/launch.sh" pretrain "$@"
