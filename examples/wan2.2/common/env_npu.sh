# Ascend NPU: CANN, if this shell has not loaded it, and the variables of MindSpeed-MM's Wan2.2 scripts.
if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    for cann in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit "${HOME:-/root}/Ascend/ascend-toolkit"; do
        if [[ -f $cann/set_env.sh ]]; then
            set +u # the vendor's script reads unset variables
            # shellcheck disable=SC1091
            source "$cann/set_env.sh"
            set -u
            break
        fi
    done
fi
if [[ -d /usr/local/Ascend/driver/lib64 && :${LD_LIBRARY_PATH:-}: != *:/usr/local/Ascend/driver/lib64/driver:* ]]; then
    driver=/usr/local/Ascend/driver/lib64 # the host's, mounted into a container
    export LD_LIBRARY_PATH=$driver/common:$driver/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
# 1 makes FSDP2's communication wait for its computation.
[[ ${CUDA_DEVICE_MAX_CONNECTIONS:-2} == 1 ]] && echo "note: CUDA_DEVICE_MAX_CONNECTIONS=1 slows FSDP2 down; using 2" >&2
[[ ${CUDA_DEVICE_MAX_CONNECTIONS:-1} == 1 ]] && export CUDA_DEVICE_MAX_CONNECTIONS=2
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
