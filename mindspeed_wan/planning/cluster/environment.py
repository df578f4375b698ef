"""The variables every node of a job gets: the launch script's, and those of the device's collectives.

Which node this is, and where node 0 is, the launch script finds out on the spot (``common/cluster.sh``).
"""

from __future__ import annotations

from mindspeed_wan.planning.cluster.spec import ClusterSpec


def node_environment(spec: ClusterSpec) -> dict[str, str]:
    """Return variable -> value, the description's own ``env`` last."""
    return {**_launch(spec), **_collectives(spec), **spec.env}


def _launch(spec: ClusterSpec) -> dict[str, str]:
    layout = spec.layout
    values = {
        "DEVICE": spec.device,
        "NNODES": str(spec.nodes),
        "NPROC_PER_NODE": str(spec.devices_per_node),
        "TP": str(layout.tensor),
        "SP": str(int(layout.sequence_parallel)),
        "CP": str(layout.context),
        "MBS": str(layout.micro_batch),
        "GRAD_ACC_STEP": str(layout.accumulation),
        "GRACE_SECONDS": str(spec.requeue.grace_seconds),
        "LOG_FOLDER": spec.logs,
    }
    if spec.dims.ring > 1:
        values["CP_ALGO"] = "megatron_cp_algo" if spec.dims.ulysses_size == 1 else "hybrid_cp_algo"
        if spec.dims.ulysses_size > 1:
            values["ULYSSES_DEGREE"] = str(spec.dims.ulysses_size)
    for name, degree in (("PP", layout.pipeline), ("VP", layout.virtual)):
        if degree > 1:
            values[name] = str(degree)
    if layout.expert_ranks is not None:
        values["EXPERT_RANKS"] = layout.expert_ranks
    if not layout.fsdp2:
        values["FSDP_CONFIG"] = ""
    return values


def _collectives(spec: ClusterSpec) -> dict[str, str]:
    """Start-up may take minutes while images are pulled; adapters are named, never guessed by the library."""
    interface = spec.network.interface
    values = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    if spec.device == "npu":
        # Nodes of a big job start minutes apart; the allow-list of addresses is of no use inside a cluster.
        values |= {"HCCL_CONNECT_TIMEOUT": "3600", "HCCL_EXEC_TIMEOUT": "3600", "HCCL_WHITELIST_DISABLE": "1"}
        values |= {"HCCL_SOCKET_IFNAME": interface} if interface else {}
    elif spec.device == "cuda":
        values |= {"NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
        values |= {"NCCL_SOCKET_IFNAME": interface} if interface else {}
        values |= {"NCCL_IB_HCA": spec.network.infiniband} if spec.network.infiniband else {}
    return values
