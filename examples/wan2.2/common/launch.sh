#!/usr/bin/env bash
# Starts a job: chooses the device, sets its environment, turns variables into flags and starts the ranks.
#
#   launch.sh pretrain|inference [flags...]
#
# The scripts beside the model files call this one; ../README.md lists every variable. Flags after the name are passed
# on last, so they win. The exit code is that of the rank that failed first (README: exit codes).
set -euo pipefail

COMMON=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$COMMON/../../.." && pwd)

fail() { # fail CODE MESSAGE FIX
    printf 'error: %s\n  fix: %s\n' "$2" "$3" >&2
    exit "$1"
}

flag_value() { # flag_value --name "$@": the last value of a flag, if it is given
    local name=$1 value="" previous="" word
    shift
    for word in "$@"; do
        [[ $previous == "$name" ]] && value=$word
        [[ $word == "$name="* ]] && value=${word#*=}
        previous=$word
    done
    printf '%s' "$value"
}

has_flag() { # has_flag --name "$@"
    local name=$1 word
    shift
    for word in "$@"; do
        [[ $word == "$name" || $word == "$name="* ]] && return 0
    done
    return 1
}

whole_number() { # whole_number VARIABLE LEAST: leading zeros, which bash takes for octal, are dropped
    local value=${!1}
    [[ $value =~ ^0*([0-9]{1,9})$ && $((10#$value)) -ge $2 ]] ||
        fail 2 "$1 is '$value', which is not a whole number from $2 up" "set $1 to a number"
    printf -v "$1" '%d' "$((10#$value))"
}

filled_in() { # filled_in VARIABLE: a path left as a template had it is an error
    local value=${!1} placeholder='(path[ _/-]?to([^a-z]|$)|your[ _/-]|/your$|^your$|\[[a-z _-]+\]|<[^<>]+>|xxx|\.\.\.$|\$)'
    shopt -s nocasematch
    if [[ $value =~ $placeholder && ! -e $value ]]; then
        fail 2 "$1 is still a placeholder: '$value'" "set $1 to a real path"
    fi
    shopt -u nocasematch
}

find_device() {
    if compgen -G "/dev/davinci[0-9]*" >/dev/null; then
        echo npu
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo cuda
    else
        echo cpu
    fi
}

KIND=${1:-}
[[ $KIND == pretrain || $KIND == inference ]] ||
    fail 2 "launch.sh got '$KIND' instead of pretrain or inference" "start one of the scripts under examples/wan2.2"
shift

# ---- device ---------------------------------------------------------------------------------------------------------
DEVICE=$(flag_value --device "$@")$(has_flag --device "$@" || printf '%s' "${DEVICE:-${MINDSPEED_WAN_DEVICE:-auto}}")
[[ $DEVICE == auto || -z $DEVICE ]] && DEVICE=$(find_device)
[[ -f $COMMON/env_$DEVICE.sh ]] || fail 2 "DEVICE is '$DEVICE'" "set DEVICE to npu, cuda, cpu or auto"
export MINDSPEED_WAN_DEVICE=$DEVICE

case $DEVICE in cpu) DEVICES=1 WORKERS=2 PRECISION=${PRECISION:-fp32} ;; *) DEVICES=8 WORKERS=8 ;; esac
[[ $KIND == inference ]] && DEVICES=1
NPROC_PER_NODE=${NPROC_PER_NODE:-${NPUS_PER_NODE:-$DEVICES}}
# shellcheck source=cluster.sh
source "$COMMON/cluster.sh"
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-}
MAX_RESTARTS=${MAX_RESTARTS:-0}
whole_number NPROC_PER_NODE 1
whole_number NNODES 1
whole_number NODE_RANK 0
whole_number MAX_RESTARTS 0
[[ -z $MASTER_PORT ]] || whole_number MASTER_PORT 1
WORLD_SIZE=$((NPROC_PER_NODE * NNODES))
# shellcheck source=env_cpu.sh
source "$COMMON/env_$DEVICE.sh"

# ---- python ---------------------------------------------------------------------------------------------------------
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $ROOT/.venv/bin/python ]] && PYTHON=$ROOT/.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || fail 3 "no Python: '$PYTHON' does not run" "set PYTHON to the interpreter to use"
[[ -d $ROOT/mindspeed_wan ]] && export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
SCRIPT=${LAUNCH_SCRIPT:-$ROOT/${KIND}_sora.py}

# ---- flags ----------------------------------------------------------------------------------------------------------
FLAGS=()
# shellcheck source=pretrain_flags.sh
[[ $KIND == pretrain ]] && source "$COMMON/pretrain_flags.sh"

LAUNCHER=(
    --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" ${MASTER_PORT:+--master-port "$MASTER_PORT"}
    --max-restarts "$MAX_RESTARTS" --grace-seconds "${GRACE_SECONDS:-600}"
    --hang-timeout-minutes "${HANG_TIMEOUT_MINUTES:-60}" --script-variables
)
if [[ -n ${LOG_FOLDER:-}${SAVE_PATH:-} ]] && ! has_flag --dry-run "$@" && ! has_flag --help "$@"; then
    LAUNCHER+=(--log-file "${LOG_FOLDER:-$SAVE_PATH/logs}/${KIND}_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log")
fi

# `exec`: signals reach the launcher itself, which passes them on and waits for the save. It also writes the log, so
# that no pipe stands between its exit code and the caller.
exec "$PYTHON" -m mindspeed_wan.cli.launch "${LAUNCHER[@]}" "$SCRIPT" ${FLAGS[@]+"${FLAGS[@]}"} "$@"
