"""ModelArts: the body of ``POST /v2/{project_id}/training-jobs`` with a custom image."""

from __future__ import annotations

import shlex
from typing import Any

from mindspeed_wan.errors import ConfigError
from mindspeed_wan.planning.cluster.environment import node_environment
from mindspeed_wan.planning.cluster.kubernetes import ENTRY
from mindspeed_wan.planning.cluster.spec import ClusterSpec, Mount

MAX_RETRIES = 128


def training_job(spec: ClusterSpec) -> dict[str, Any]:
    """Return the request body.

    Any exit code but 0 starts the job again while retries last; ModelArts does not tell codes apart.
    """
    if spec.container is None:
        raise ConfigError("ModelArts needs an image", where="container", fix="add container: {image: ...}")
    if spec.modelarts is None:
        raise ConfigError("ModelArts needs its flavor and log_url", where="modelarts",
                          fix="add modelarts: {flavor: ..., log_url: obs://...}")
    resource: dict[str, Any] = {"flavor_id": spec.modelarts.flavor, "node_count": spec.nodes}
    volumes = [_volume(mount, i) for i, mount in enumerate(spec.mounts)]
    if spec.modelarts.pool:
        resource["pool_id"] = spec.modelarts.pool
    command = shlex.join(["bash", ENTRY, spec.script, *spec.arguments])
    retries = min(spec.requeue.limit, MAX_RETRIES)
    annotations = {"fault-tolerance/job-retry-num": str(retries),
                   "fault-tolerance/job-unconditional-retry": "true"} if retries else {}
    return {
        "kind": "job",
        "metadata": {"name": spec.name, "workspace_id": spec.modelarts.workspace,
                     "description": "mindspeed-wan", "annotations": annotations},
        "algorithm": {
            "engine": {"image_url": spec.container.image},
            "command": f"cd {shlex.quote(spec.workdir)} && exec {command}",
            "environments": node_environment(spec),
        },
        "spec": {"resource": resource, "log_export_path": {"obs_url": spec.modelarts.log_url},
                 **({"volumes": volumes} if volumes else {})},
    }


def _volume(mount: Mount, number: int) -> dict[str, Any]:
    if mount.nfs is None:
        raise ConfigError("ModelArts mounts network file systems (SFS Turbo)", where=f"mounts[{number}]",
                          fix="add nfs: SERVER:/PATH")
    return {"nfs": {"nfs_server_path": mount.nfs, "local_path": mount.target, "read_only": mount.read_only}}
