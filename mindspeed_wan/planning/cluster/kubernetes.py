"""Jobs on Kubernetes: Kubeflow's PyTorchJob, Volcano's Job, MindCluster's AscendJob.

How each starts again after a save (exit code 75) or a lost rank (6):

- PyTorchJob: restart policy ``ExitCode`` takes 128 and above as worth another try, so ``cluster/entry.sh`` turns both
  codes into 138, the code Kubeflow leaves to users; a wrong flag (2) stays permanent.
- Volcano: a policy per exit code restarts the whole job.
- AscendJob: ``fault-retry-times`` restarts the job after any failure; ``backoffLimit`` counts.
"""

from __future__ import annotations

from typing import Any

from mindspeed_wan.errors import EXIT_DISTRIBUTED, EXIT_REQUEUE, ConfigError
from mindspeed_wan.planning.cluster.environment import node_environment
from mindspeed_wan.planning.cluster.spec import ClusterSpec, Mount

RETRY_CODE = 138
"""128 + SIGUSR1: Kubeflow's "user-defined, retryable"."""
ENTRY = "examples/wan2.2/cluster/entry.sh"
_RESOURCE = {"npu": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu"}
_DRIVER = ("/usr/local/Ascend/driver", "/usr/local/Ascend/add-ons", "/usr/local/sbin/npu-smi",
           "/etc/ascend_install.info")


def pytorch_job(spec: ClusterSpec) -> dict[str, Any]:
    """Return a Kubeflow PyTorchJob: one master, the other nodes are workers."""
    def replicas(count: int) -> dict[str, Any]:
        pod = _pod(spec, "pytorch", {"RETRY_EXIT_CODE": str(RETRY_CODE)})  # Kubeflow wants this container name
        return {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": pod}}

    specs = {"Master": replicas(1)} | ({"Worker": replicas(spec.nodes - 1)} if spec.nodes > 1 else {})
    policy: dict[str, Any] = {"backoffLimit": spec.requeue.limit, "cleanPodPolicy": "Running"}
    if spec.kubernetes.queue:
        policy["schedulingPolicy"] = {"queue": spec.kubernetes.queue, "minAvailable": spec.nodes}
    return {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(spec),
        "spec": {"nprocPerNode": str(spec.devices_per_node), "runPolicy": policy, "pytorchReplicaSpecs": specs},
    }


def volcano_job(spec: ClusterSpec) -> dict[str, Any]:
    """Return a Volcano Job; its ``svc`` and ``env`` plugins tell the nodes about each other."""
    pod = {**_pod(spec, "worker", {}), "restartPolicy": "Never"}
    pod.pop("priorityClassName", None)
    job = {
        "minAvailable": spec.nodes, "schedulerName": "volcano", "maxRetry": spec.requeue.limit,
        "plugins": {"svc": [], "env": []},
        "policies": [
            {"event": "PodEvicted", "action": "RestartJob"},
            {"exitCode": EXIT_REQUEUE, "action": "RestartJob"},
            {"exitCode": EXIT_DISTRIBUTED, "action": "RestartJob"},
        ],
        "tasks": [{"name": "worker", "replicas": spec.nodes,
                   "policies": [{"event": "TaskCompleted", "action": "CompleteJob"}], "template": {"spec": pod}}],
    }
    for key, value in (("queue", spec.kubernetes.queue), ("priorityClassName", spec.kubernetes.priority_class)):
        if value:
            job[key] = value
    return {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": _metadata(spec), "spec": job}


def ascend_job(spec: ClusterSpec) -> dict[str, Any]:
    """Return a MindCluster AscendJob (Ascend operator and Volcano)."""
    if spec.device != "npu":
        raise ConfigError(f"AscendJob runs on npu, the description says {spec.device}", where="device")
    chip = {"ring-controller.atlas": "ascend-910b"}

    def replicas(count: int) -> dict[str, Any]:
        pod = _pod(spec, "ascend", {})  # MindCluster wants this container name
        pod["containers"][0]["env"] += _ascend_variables(spec)
        pod["affinity"] = _one_pod_per_node(spec)
        return {"replicas": count, "restartPolicy": "Never", "template": {"metadata": {"labels": chip}, "spec": pod}}

    specs = {"Master": replicas(1)} | ({"Worker": replicas(spec.nodes - 1)} if spec.nodes > 1 else {})
    metadata = _metadata(spec)
    metadata["labels"] |= {"framework": "pytorch", **chip, "fault-scheduling": "grace",
                           "fault-retry-times": str(spec.requeue.limit)}
    return {
        "apiVersion": "mindxdl.gitee.com/v1", "kind": "AscendJob", "metadata": metadata,
        "spec": {
            "schedulerName": "volcano",
            "runPolicy": {"backoffLimit": spec.requeue.limit, "schedulingPolicy": {
                "minAvailable": spec.nodes, "queue": spec.kubernetes.queue or "default"}},
            "successPolicy": "AllWorkers",
            "replicaSpecs": specs,
        },
    }


def _metadata(spec: ClusterSpec) -> dict[str, Any]:
    return {"name": spec.name, "namespace": spec.kubernetes.namespace, "labels": {"app": "mindspeed-wan"}}


def _pod(spec: ClusterSpec, container_name: str, more: dict[str, str]) -> dict[str, Any]:
    if spec.container is None:
        raise ConfigError("Kubernetes needs an image", where="container", fix="add container: {image: ...}")
    mounts, volumes = _volumes(spec)
    resources = _resources(spec)
    variables = {**node_environment(spec), **more}
    pod: dict[str, Any] = {
        "hostNetwork": spec.container.host_network,
        "terminationGracePeriodSeconds": spec.requeue.grace_seconds + 60,
        "securityContext": {"runAsUser": spec.kubernetes.user, "runAsNonRoot": True, "fsGroup": spec.kubernetes.user},
        "containers": [{
            "name": container_name,
            "image": spec.container.image,
            "imagePullPolicy": spec.container.pull_policy,
            "workingDir": spec.workdir,
            "command": [_literal(word) for word in ("bash", ENTRY, spec.script, *spec.arguments)],
            "env": [{"name": name, "value": _literal(value)} for name, value in variables.items()],
            "resources": {"limits": resources, "requests": dict(resources)},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"add": ["IPC_LOCK"]}},
            "volumeMounts": mounts,
        }],
        "volumes": volumes,
    }
    if spec.container.host_network:
        pod["dnsPolicy"] = "ClusterFirstWithHostNet"
    if spec.kubernetes.node_selector:
        pod["nodeSelector"] = dict(spec.kubernetes.node_selector)
    if spec.kubernetes.priority_class:
        pod["priorityClassName"] = spec.kubernetes.priority_class
    return pod


def _literal(text: str) -> str:
    """Kubernetes puts variables in the place of ``$(NAME)`` in commands and values; ``$$(`` is a plain ``$(``."""
    return text.replace("$(", "$$(")


def _resources(spec: ClusterSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    resource = spec.kubernetes.resource or _RESOURCE.get(spec.device)
    if resource:
        found[resource] = spec.devices_per_node
    if spec.resources.cpus:
        found["cpu"] = str(spec.resources.cpus)
    if spec.resources.memory_gib:
        found["memory"] = f"{spec.resources.memory_gib}Gi"
    return found


def _volumes(spec: ClusterSpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (mounts of the container, volumes of the pod): shared memory, the description's, Ascend's driver."""
    assert spec.container is not None
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    size = f"{spec.container.shared_memory_gib}Gi"
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
    for i, mount in enumerate(spec.mounts):
        name = f"mount-{i}"
        mounts.append({"name": name, "mountPath": mount.target, "readOnly": mount.read_only})
        volumes.append({"name": name, **_volume_source(mount)})
    if spec.device == "npu" and spec.kubernetes.driver_mounts:
        for i, path in enumerate(_DRIVER):
            mounts.append({"name": f"driver-{i}", "mountPath": path, "readOnly": True})
            volumes.append({"name": f"driver-{i}", "hostPath": {"path": path}})
    return mounts, volumes


def _volume_source(mount: Mount) -> dict[str, Any]:
    if mount.claim is not None:
        return {"persistentVolumeClaim": {"claimName": mount.claim}}
    if mount.source is not None:
        return {"hostPath": {"path": mount.source}}
    server, _, path = (mount.nfs or "").partition(":")
    return {"nfs": {"server": server, "path": path}}


def _ascend_variables(spec: ClusterSpec) -> list[dict[str, Any]]:
    """What the operator and the container runtime fill in on the node."""
    resource = spec.kubernetes.resource or _RESOURCE["npu"]
    return [
        {"name": "XDL_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
        {"name": "ASCEND_VISIBLE_DEVICES",
         "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{resource}']"}}},
    ]


def _one_pod_per_node(spec: ClusterSpec) -> dict[str, Any]:
    same_job = {"key": "job-name", "operator": "In", "values": [spec.name]}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchExpressions": [same_job]}, "topologyKey": "kubernetes.io/hostname"}]}}
