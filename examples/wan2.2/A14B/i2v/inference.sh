#!/usr/bin/env bash
# Generate videos with Wan2.2 I2V A14B. Without --ckpt_dir or --mm-model: inference_model.json and LOAD_PATH (high expert).
# Ranks: NPROC_PER_NODE=8 inference.sh ... --ulysses_size 8. All variables: ../../README.md, all flags: --help.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case " $* " in
    *" --ckpt_dir"* | *" --ckpt-dir"* | *" --mm-model"* | *" --mm_model"* | *" --help "* | *" -h "*) ;;
    *) set -- --mm-model "${MM_MODEL:-$HERE/inference_model.json}" --load "${LOAD_PATH:-./ckpt/i2v/transformer}" "$@" ;;
esac

exec bash "$HERE/../../common/launch.sh" inference "$@"
