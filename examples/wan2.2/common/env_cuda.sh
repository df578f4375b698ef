# NVIDIA GPU.
# 1 makes FSDP2's communication wait for its computation.
[[ ${CUDA_DEVICE_MAX_CONNECTIONS:-2} == 1 ]] && echo "note: CUDA_DEVICE_MAX_CONNECTIONS=1 slows FSDP2 down; using 2" >&2
[[ ${CUDA_DEVICE_MAX_CONNECTIONS:-1} == 1 ]] && export CUDA_DEVICE_MAX_CONNECTIONS=2
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
