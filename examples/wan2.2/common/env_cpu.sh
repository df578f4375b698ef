# CPU and gloo: every rank gets its share of the cores, and GPUs that may be there stay out of it.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))
fi
export CUDA_VISIBLE_DEVICES=
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
