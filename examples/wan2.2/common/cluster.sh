# Sourced by launch.sh: where a scheduler says which node this is, its words become NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT. What is set already stays.

from_slurm() { # one task per node, inside srun
    local hosts
    [[ ${SLURM_STEP_NUM_TASKS:-$SLURM_STEP_NUM_NODES} == "$SLURM_STEP_NUM_NODES" ]] ||
        fail 2 "Slurm started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes; the launcher starts the ranks" \
            "use srun --ntasks-per-node=1"
    NNODES=${NNODES:-$SLURM_STEP_NUM_NODES}
    NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
    if [[ -z ${MASTER_ADDR:-} ]]; then
        hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}" 2>/dev/null) && [[ -n $hosts ]] ||
            fail 2 "scontrol does not list this job's nodes" "set MASTER_ADDR to the first one"
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
}

from_torchrun_variables() { # Kubeflow PyTorchJob and TrainJob
    NNODES=${NNODES:-${PET_NNODES##*:}}
    NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${RANK:-0}}}
    MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
    MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-}}
}

from_volcano() { # Volcano (plugins svc and env) and ModelArts, which is built on it
    NNODES=${NNODES:-${MA_NUM_HOSTS:-${VC_WORKER_NUM:-}}}
    NODE_RANK=${NODE_RANK:-${VC_TASK_INDEX:-${VK_TASK_INDEX:-}}}
    MASTER_ADDR=${MASTER_ADDR:-${VC_WORKER_HOSTS%%,*}}
}

from_pod_ranks() { # AscendJob counts ranks and says how many are here; an old PyTorchJob counts pods
    NNODES=${NNODES:-$((WORLD_SIZE / ${LOCAL_WORLD_SIZE:-1}))}
    NODE_RANK=${NODE_RANK:-$RANK}
}

if ((${SLURM_STEP_NUM_NODES:-1} > 1)) && [[ -n ${SLURM_NODEID:-} ]]; then
    from_slurm
elif [[ -n ${PET_NNODES:-} ]]; then
    from_torchrun_variables
elif [[ -n ${VC_WORKER_HOSTS:-} && -n ${VC_TASK_INDEX:-${VK_TASK_INDEX:-}} ]]; then
    from_volcano
elif [[ -n ${KUBERNETES_SERVICE_HOST:-} && -n ${MASTER_ADDR:-} && -n ${RANK:-} && -n ${WORLD_SIZE:-} ]]; then
    from_pod_ranks
fi
